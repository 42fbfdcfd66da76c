"""Pairs that don't fit are refused with what differs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_serve.errors import ModelError, PairMismatchError
from act_serve.models import pairs, row_reader
from act_serve.models.pairs import check_pair, differing_maths, differing_templates, others_that_differ
from tests.tiny_models import make_llama, make_qwen, make_tokenizer


def test_same_shapes_fit(tmp_path: Path) -> None:
    check_pair(make_llama(tmp_path / "a"), make_llama(tmp_path / "b", seed=1))


def test_other_size_and_family(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "a")
    with pytest.raises(PairMismatchError, match="hidden_size"):
        check_pair(base, make_llama(tmp_path / "b", hidden=64))
    with pytest.raises(PairMismatchError, match="model_type"):
        check_pair(base, make_qwen(tmp_path / "c"))


def test_added_token(tmp_path: Path) -> None:
    base, source = make_llama(tmp_path / "a"), make_llama(tmp_path / "b")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(source)
    with pytest.raises(PairMismatchError, match="<new>"):
        check_pair(base, source)


def test_one_vocabulary_split_in_another_way(tmp_path: Path) -> None:
    base, source = make_llama(tmp_path / "a"), make_llama(tmp_path / "b")
    path = source / "tokenizer.json"
    settings = json.loads(path.read_text())
    lowercase = {"type": "Lowercase"}
    path.write_text(json.dumps({**settings, "normalizer": lowercase}))
    with pytest.raises(PairMismatchError, match=r"split text differently: of \"The quick.*base makes \['T', 'h'"):
        check_pair(base, source)


def test_other_chat_template_is_said(tmp_path: Path) -> None:
    base, source = make_llama(tmp_path / "a"), make_llama(tmp_path / "b")
    assert differing_templates(base, source) == ""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(source)
    assert "different chat templates" in differing_templates(base, source)


@pytest.mark.parametrize("mapped", [1, 1 << 20])
def test_tensors_outside_the_channels_are_compared_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: int
) -> None:
    monkeypatch.setattr(row_reader, "_BLOCK", 7)
    monkeypatch.setattr(pairs, "_MAPPED_VALUES", mapped)
    base, source = make_llama(tmp_path / "a"), tmp_path / "b"
    assert others_that_differ(base, base) == 0
    source.mkdir()
    for file in base.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1, -1] += 1.0
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    tensors["model.layers.0.mlp.up_proj.weight"] += 1.0  # channels: no others
    tensors["only.here"] = torch.ones(1)
    save_file(tensors, source / "model.safetensors")
    assert others_that_differ(base, source) == 3


def test_config_that_lies(tmp_path: Path) -> None:
    base, source = make_llama(tmp_path / "a"), make_llama(tmp_path / "b", hidden=64)
    config = json.loads((base / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(PairMismatchError, match="has shape"):
        check_pair(base, source)


def test_fields_left_out_mean_their_defaults(tmp_path: Path) -> None:
    base, source = make_llama(tmp_path / "a"), make_llama(tmp_path / "b")
    config = json.loads((source / "config.json").read_text())
    for field in ("head_dim", "attention_bias", "mlp_bias"):
        config.pop(field, None)
    (source / "config.json").write_text(json.dumps(config))
    check_pair(base, source)
    (source / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(PairMismatchError, match="attention_bias"):
        check_pair(base, source)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("side", ["a", "b"])
def test_quantised_models(tmp_path: Path, side: str) -> None:
    base, source = make_llama(tmp_path / "a"), make_llama(tmp_path / "b")
    change_config(tmp_path / side, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match=rf"{tmp_path / side} is quantised .* use the unquantised checkpoint"):
        check_pair(base, source)


def test_other_maths_are_named_with_both_values(tmp_path: Path) -> None:
    base, source = make_qwen(tmp_path / "a"), make_qwen(tmp_path / "b")
    assert differing_maths(base, source) == ""
    change_config(source, layer_types=None)
    assert differing_maths(base, source) == "", "what is left out means the same layers"
    change_config(source, rms_norm_eps=1e-5, rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0})
    check_pair(base, source)
    said = differing_maths(base, source)
    for named in (
        "rms_norm_eps (1e-06 in the base, 1e-05 in the ability model)",
        "rope_theta (10000.0 in the base, 50000.0 in the ability model)",
        "rope_type (default in the base, linear in the ability model)",
        "factor (None in the base, 2.0 in the ability model)",
    ):
        assert named in said
    change_config(source, layer_types=["sliding_attention"], sliding_window=64, use_sliding_window=True)
    said = differing_maths(base, source)
    assert "layer_types" in said
    assert "sliding_window (None in the base, 64 in the ability model)" in said


def test_tokens_with_another_id(tmp_path: Path) -> None:
    base, source = make_llama(tmp_path / "a"), make_llama(tmp_path / "b")
    path = source / "tokenizer.json"
    saved = json.loads(path.read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(saved))
    with pytest.raises(PairMismatchError, match="another id, for example a, b"):
        check_pair(base, source)
