"""A fingerprint tells models apart, and says in what they differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from act_serve.delta.fingerprint import check_base, fingerprint_model
from act_serve.errors import BaseMismatchError, ModelError


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_copy_is_the_same_model(tiny_llama: Path, copy: Path) -> None:
    assert fingerprint_model(copy) == fingerprint_model(tiny_llama)


def test_the_message_says_what_differs(tiny_llama: Path, tiny_qwen: Path, copy: Path) -> None:
    expected = fingerprint_model(tiny_llama)
    with pytest.raises(BaseMismatchError, match="LlamaForCausalLM, the base is Qwen2ForCausalLM"):
        check_base(expected, fingerprint_model(tiny_qwen), what="ability fr@1")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(BaseMismatchError, match=r"hidden_act \(silu when built, gelu here\)"):
        check_base(expected, fingerprint_model(copy), what="ability fr@1")


def rewrite(folder: Path, drop: tuple[str, ...] = (), **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps({**kept, **fields}))


def test_defaults_and_older_spellings_are_the_same_model(tiny_llama: Path, copy: Path) -> None:
    rope = json.loads((copy / "config.json").read_text())["rope_parameters"]
    rewrite(copy, ("attention_bias", "head_dim", "hidden_act", "rope_parameters"), rope_theta=rope["rope_theta"])
    assert fingerprint_model(copy) == fingerprint_model(tiny_llama)


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": None}, {"sliding_window": 16},
     {"num_key_value_heads": 4}, {"rms_norm_eps": 1e-5}],
)  # fmt: skip
def test_other_maths_is_another_model(change: dict[str, object], tiny_llama: Path, copy: Path) -> None:
    rewrite(copy, **change)
    with pytest.raises(BaseMismatchError, match=r"config\.json differs"):
        check_base(fingerprint_model(tiny_llama), fingerprint_model(copy), what="ability fr@1")


def test_other_weights_are_another_model(tiny_llama: Path, copy: Path) -> None:
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BaseMismatchError, match="other weights"):
        check_base(fingerprint_model(tiny_llama), fingerprint_model(copy), what="ability fr@1")


def test_what_is_no_model_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        fingerprint_model(tmp_path)
    (copy / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="not a safetensors file"):
        fingerprint_model(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors file"):
        fingerprint_model(copy)
