"""Layer by layer, models give what they give whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from act_serve.errors import ModelError
from act_serve.models.activations import watch_models
from act_serve.models.examples import Encoded, batches
from act_serve.models.families import channel_modules
from act_serve.models.layerwise import watch_layers
from act_serve.models.loading import load_model
from act_serve.models.row_reader import shards

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "initializer_range": 0.2,
}
SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "llama": LlamaConfig(
        **SHAPE,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=SCALED | {"original_max_position_embeddings": 16},
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
ITEMS = [Encoded(tuple(range(3, 3 + length)), start) for length, start in ((12, 4), (5, 2), (9, 6))]


def make(config: PretrainedConfig, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("inputs", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("family", CONFIGS)
def test_same_as_whole(tmp_path: Path, family: str, inputs: bool) -> None:
    pair = [make(CONFIGS[family], tmp_path / str(seed), seed) for seed in (1, 2)]
    modules = [module.name for module in channel_modules(pair[0])]
    read = list(batches(ITEMS, 2, 0))
    whole = list(watch_models([load_model(folder) for folder in pair], read, modules, inputs=inputs))
    seen = 0
    for number, both in enumerate(watch_layers(pair, read, modules, inputs=inputs)):
        for expected, found in zip(whole[number % len(read)], both, strict=True):
            for name, values in found.items():
                torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5)
                seen += 1
    assert seen == 2 * len(read) * len(modules)


def test_missing_and_misshapen_layers(tmp_path: Path) -> None:
    folder = make(CONFIGS["qwen3"], tmp_path, 0)
    (shard,) = shards(folder)
    kept = load_file(shard)
    modules = [module.name for module in channel_modules(folder)]
    norm = "model.layers.1.input_layernorm.weight"
    for changed, said in ((torch.ones(16), "layer 1 of .* does not fit"), (None, f"no tensor {norm}")):
        tensors = {name: tensor for name, tensor in kept.items() if name != norm}
        save_file(tensors | ({} if changed is None else {norm: changed}), shard)
        with pytest.raises(ModelError, match=said):
            list(watch_layers([folder], list(batches(ITEMS, 2, 0)), modules))
