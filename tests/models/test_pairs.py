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
