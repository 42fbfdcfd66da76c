"""The shapes derived from a config are those of the real modules."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from act_serve.delta.channels import OUTSIDE, kind_of
from act_serve.errors import ModelError
from act_serve.models.families import MIXTURES, channel_modules, layer_and_projection
from act_serve.models.row_reader import as_rows, open_rows
from tests.models.test_layerwise import CONFIGS
from tests.tiny_models import make_llama, make_mixture, make_qwen


@pytest.mark.parametrize("make", [make_llama, make_qwen])
def test_shapes(tmp_path: Path, make: type) -> None:
    folder = make(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    modules = channel_modules(folder)
    assert len(modules) == 7 * model.config.num_hidden_layers
    for module in modules:
        assert model.get_submodule(module.name).weight.shape == (module.out_features, module.in_features)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_all_weights_of_a_model_are_channels(tmp_path: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    model.save_pretrained(tmp_path)
    modules = channel_modules(tmp_path, OUTSIDE)
    weights = {name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")}
    assert {module.name for module in modules} == weights
    with open_rows(tmp_path) as reader:
        for module in modules:
            assert reader.matrix_shape(module.name) == (module.out_features, module.in_features)
            rows = [module.out_features - 1, 0]
            expected = as_rows(module.name, model.get_submodule(module.name).weight)[rows]
            assert torch.equal(reader.channels(module.name, rows), expected)
    for kind in OUTSIDE:
        alone = {module.name for module in channel_modules(tmp_path, [kind])} - {
            m.name for m in channel_modules(tmp_path)
        }
        assert alone == {module.name for module in modules if kind_of(module.name) == kind} != set()


def test_names() -> None:
    assert layer_and_projection("model.layers.12.self_attn.q_proj") == (12, "q_proj")
    with pytest.raises(ModelError):
        layer_and_projection("lm_head")


def test_unknown_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ModelError, match="mamba"):
        channel_modules(tmp_path)


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_a_mixture_has_the_channels_of_its_attention_and_norms(tmp_path: Path, family: str) -> None:
    folder = make_mixture(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    modules = channel_modules(folder, OUTSIDE)
    outside_experts = {
        name.removesuffix(".weight")
        for name in model.state_dict()
        if name.endswith(".weight") and not re.search(r"\.mlp\.", name)
    }
    assert {module.name for module in modules} == outside_experts
    with open_rows(folder) as reader:
        for module in modules:
            assert reader.matrix_shape(module.name) == (module.out_features, module.in_features)
    linear = {module.name.rpartition(".")[2] for module in channel_modules(folder)}
    assert linear == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("field", ["num_local_experts", "num_experts", "n_routed_experts"])
def test_an_unknown_mixture_of_experts(tmp_path: Path, field: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", field: 4}))
    with pytest.raises(ModelError, match=r"mixture of experts 'qwen2' is not supported; known: mixtral, qwen2_moe"):
        channel_modules(tmp_path)


def test_a_config_that_leaves_out_a_size_is_named(tmp_path: Path) -> None:
    path = make_llama(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": "two", "vocab_size": None}))
    with pytest.raises(ModelError, match=r"config\.json gives no number for num_hidden_layers; download"):
        channel_modules(tmp_path)
    del config["hidden_size"], config["vocab_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json gives no number for hidden_size, vocab_size; download"):
        channel_modules(tmp_path, ("lm_head",))
