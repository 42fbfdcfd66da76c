"""Writes a base with deltas added as an ordinary checkpoint, one shard in memory at a time."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import BaseMismatchError
from act_serve.models.families import read_config
from act_serve.models.row_reader import open_rows, shards
from act_serve.pipeline.new_folder import new_folder

_INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def export_hf(*, base: Path, deltas: Mapping[str, ModuleDelta], folder: Path, dtype: str | None = None) -> Path:
    """Saves `base` with the deltas' rows added as a checkpoint that transformers loads.

    Rows are added in float32 and rounded once to `dtype`, by default each tensor's own. Everything else is copied as
    it is. Raises ModelError when `folder` exists already or can't be written, BaseMismatchError when the base has no
    such rows.
    """
    changes = tensor_changes(deltas)
    check_changes(base, changes)
    with new_folder(folder) as staging:
        for path in base.iterdir():
            if path.is_file() and path.suffix not in _OTHER_WEIGHTS:
                shutil.copyfile(path, staging / path.name)
        size = sum(_write_shard(path, staging / path.name, changes, dtype) for path in shards(base))
        if dtype is not None:
            _declare(staging, dtype, size)
    return folder


def tensor_changes(deltas: Mapping[str, ModuleDelta]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per tensor of the checkpoint, its rows that change, int64 `[K]`, and what is added, float32 `[K, ...]`."""
    changes = {}
    for name, module in deltas.items():
        changes[f"{name}.weight"] = (module.rows.long(), module.delta.float())
        if module.bias_delta is not None:
            changes[f"{name}.bias"] = (module.rows.long(), module.bias_delta.float())
    return changes


def check_changes(base: Path, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raises BaseMismatchError unless the checkpoint in `base` has every row that changes, of the same length."""
    with open_rows(base) as reader:
        names = set(reader.names())
        for name, (rows, added) in changes.items():
            shape = reader.shape(name) if name in names else None
            if shape is None or shape[1:] != added.shape[1:] or int(rows.max()) >= shape[0]:
                there = "there is no such tensor" if shape is None else f"it has the shape {shape}"
                raise BaseMismatchError(
                    f"the delta changes row {int(rows.max())} of {name}, {tuple(added.shape[1:])} long; "
                    f"in {base} {there}"
                )


def _write_shard(source: Path, target: Path, changes: Mapping[str, tuple[Tensor, Tensor]], dtype: str | None) -> int:
    """Returns the size of its tensors in bytes."""
    tensors = load_file(source)
    for name, tensor in tensors.items():
        wanted = getattr(torch, dtype) if dtype is not None and tensor.is_floating_point() else tensor.dtype
        new = tensor.to(wanted)
        if name in changes:
            rows, added = changes[name]
            new = new.clone()
            new[rows] = (tensor[rows].float() + added).to(wanted)
        tensors[name] = new
    save_file(tensors, target, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _declare(folder: Path, dtype: str, size: int) -> None:
    """Makes config and index say what the tensors have become."""
    config = read_config(folder)
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
