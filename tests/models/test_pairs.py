"""Pairs that don't fit are refused with what differs."""

import json
from pathlib import Path

import pytest

from act_serve.errors import PairMismatchError
from act_serve.models.pairs import check_pair
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


def test_tokens_with_another_id(tmp_path: Path) -> None:
    base, source = make_llama(tmp_path / "a"), make_llama(tmp_path / "b")
    path = source / "tokenizer.json"
    saved = json.loads(path.read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(saved))
    with pytest.raises(PairMismatchError, match="another id, for example a, b"):
        check_pair(base, source)
