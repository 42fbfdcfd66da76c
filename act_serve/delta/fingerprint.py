"""Identity of a checkpoint, read without loading it and without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from act_serve.delta.manifest import ModelFingerprint
from act_serve.errors import BaseMismatchError, ModelError

# Fields of config.json that change shapes or maths, with what their absence means; transformers leaves out fields that
# have their class's default, and which do differs between its versions.
CONFIG_DEFAULTS: dict[str, Any] = {
    "model_type": None, "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None,
    "num_attention_heads": None, "vocab_size": None, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "attention_bias": False, "mlp_bias": False, "layer_types": None,
}  # fmt: skip
_SAMPLE_BYTES = 64
_MAX_HEADER_BYTES = 100_000_000


def fingerprint_model(folder: Path) -> ModelFingerprint:
    """Fingerprints the checkpoint in ``folder`` (config.json and its safetensors files).

    Reads the files' headers and 192 bytes of each tensor: milliseconds for any size of model.

    Raises:
        ModelError: no config.json or no safetensors file there, or one is malformed.
    """
    config = _read_config(folder)
    names, sample = hashlib.sha256(), hashlib.sha256()
    for name, dtype, shape, data in sorted(_tensors(folder)):
        names.update(f"{name} {dtype} {shape}\n".encode())
        sample.update(data)
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    return ModelFingerprint(
        architecture=architectures[0],
        config=_maths(config),
        tensors=names.hexdigest(),
        sample=sample.hexdigest(),
    )


def check_base(expected: ModelFingerprint, actual: ModelFingerprint, *, what: str) -> None:
    """Refuses a delta that was built for another base.

    Args:
        expected: the fingerprint in the manifest; ``actual``: that of the model that is served.
        what: the artifact, for the message.

    Raises:
        BaseMismatchError: they differ; the message says in what.
    """
    if expected == actual:
        return
    if expected.architecture != actual.architecture:
        reason = f"it is a delta for {expected.architecture}, the base is {actual.architecture}"
    elif expected.config != actual.config:
        fields = sorted(k for k in expected.config.keys() | actual.config.keys()
                        if expected.config.get(k) != actual.config.get(k))  # fmt: skip
        reason = "config.json differs in " + ", ".join(
            f"{k} ({expected.config.get(k)} when built, {actual.config.get(k)} here)" for k in fields
        )
    elif expected.tensors != actual.tensors:
        reason = "the base has other tensor names, shapes or dtypes"
    else:
        reason = "the base has the same shapes but other weights (another revision or a fine-tuned model?)"
    raise BaseMismatchError(f"{what} does not fit this base model: {reason}; rebuild it with act-serve build-delta")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{folder} holds no config.json: it is not a model folder") from None
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


def _maths(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that matter, every default spelled out and every older spelling made the newer one."""
    maths = {field: config.get(field, default) for field, default in CONFIG_DEFAULTS.items()}
    heads = config.get("num_attention_heads") or 1
    maths["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    maths["head_dim"] = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    maths["sliding_window"] = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    # transformers 5 has rope_parameters where 4 had rope_scaling and rope_theta.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    maths["rope"] = rope
    return maths


def _tensors(folder: Path) -> Iterator[tuple[str, str, list[int], bytes]]:
    """Name, dtype, shape and sampled bytes of every tensor of the checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} holds no safetensors file; convert the checkpoint with transformers' save_pretrained"
        )
    for path in files:
        with path.open("rb") as file:
            # https://huggingface.co/docs/safetensors: 8 bytes of little-endian length, then a JSON header.
            length = int.from_bytes(file.read(8), "little")
            try:
                if length > _MAX_HEADER_BYTES:
                    raise ValueError("the header's length is absurd")
                header = json.loads(file.read(length))
                entries = [(name, entry["dtype"], entry["shape"], *entry["data_offsets"])
                           for name, entry in header.items() if name != "__metadata__"]  # fmt: skip
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise ModelError(f"{path} is not a safetensors file: {exc}") from exc
            for name, dtype, shape, begin, end in entries:
                yield name, dtype, shape, _sample(file, 8 + length + begin, end - begin)


def _sample(file: Any, begin: int, size: int) -> bytes:
    """64 bytes each from the start, the middle and the end of a tensor's data."""
    data = b""
    for offset in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
        file.seek(begin + offset)
        data += file.read(min(_SAMPLE_BYTES, size - offset))
    return data
