"""The profiles of real pairs are valid, and their models' modules are found, as far as public configs say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from act_serve.errors import PairMismatchError
from act_serve.models.families import channel_modules
from act_serve.models.pairs import check_pair
from act_serve.pipeline.datasets.catalogue import MAKERS, OPTIONS
from act_serve.profile.load import load_profile
from tests.tiny_models import make_tokenizer

FOLDER = Path(__file__).parents[2] / "profiles" / "real-pairs"
# As the models' config.json on the hub say.
QWEN: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
# Class, shapes, context lengths of base and ability model, and the public number of parameters.
PAIRS: dict[str, tuple[type[PretrainedConfig], dict[str, Any], tuple[int, int], int]] = {
    "math": (Qwen2Config, QWEN, (32768, 4096), 7_615_616_512),
    "ja": (LlamaConfig, LLAMA, (131072, 131072), 8_030_261_248),
}
SMALL = ("hidden_size", "intermediate_size")


def test_every_profile_has_a_pair() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_profile_is_valid_and_marked(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    profile = load_profile(path)
    assert profile.name == name
    assert profile.source.model is not None
    assert "NOT RUN" in path.read_text()
    assert all(task.items >= 200 for task in (*profile.score, *profile.retain))
    for data in (profile.data, *(task.data for task in (*profile.score, *profile.retain))):
        assert data.maker is None or (data.maker in MAKERS and set(data.options) <= OPTIONS.get(data.maker, set()))


@pytest.mark.parametrize("name", PAIRS)
def test_every_linear_module_of_the_layers_is_found(tmp_path: Path, name: str) -> None:
    made, shapes, _, parameters = PAIRS[name]
    config = made(**shapes)
    config.save_pretrained(tmp_path)
    found = {module.name: (module.out_features, module.in_features) for module in channel_modules(tmp_path)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(each.numel() for each in model.parameters()) == parameters  # the public model's own number
    assert found == {
        module_name: tuple(module.weight.shape)
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module_name != "lm_head"
    }


@pytest.mark.parametrize("name", PAIRS)
def test_the_pair_fits(tmp_path: Path, name: str) -> None:
    """Models of one layer and 1/32 of the width pass the check; one with another number of heads does not."""
    made, shapes, lengths, _ = PAIRS[name]
    small = {**shapes, "num_hidden_layers": 1, "vocab_size": 300, **{key: shapes[key] // 32 for key in SMALL}}
    for folder, length in zip(("base", "source"), lengths, strict=True):
        save(tmp_path / folder, made(**small, max_position_embeddings=length))
    check_pair(tmp_path / "base", tmp_path / "source")
    save(tmp_path / "other", made(**{**small, "num_key_value_heads": 1}))
    with pytest.raises(PairMismatchError, match="num_key_value_heads"):
        check_pair(tmp_path / "base", tmp_path / "other")


def save(folder: Path, config: PretrainedConfig) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
