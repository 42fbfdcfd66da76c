"""Writes a base with deltas added as an ordinary checkpoint, one shard in memory at a time."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from act_serve.delta.artifact import ModuleDelta
from act_serve.delta.channels import EMBEDDING, LM_HEAD
from act_serve.errors import BaseMismatchError
from act_serve.models.families import read_config
from act_serve.models.row_reader import as_rows, open_rows, shards
from act_serve.pipeline.new_folder import new_folder

_INDEX = "model.safetensors.index.json"
_HEAD, _EMBEDDING = f"{LM_HEAD}.weight", f"{EMBEDDING}.weight"
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def export_hf(*, base: Path, deltas: Mapping[str, ModuleDelta], folder: Path, dtype: str | None = None) -> Path:
    """Saves `base` with the deltas' rows added as a checkpoint that transformers loads.

    Rows are added in float32 and rounded once to `dtype`, by default each tensor's own. Everything else is copied as
    it is; but where lm_head is tied to the embedding and one of the two changes, which abilities do apart from each
    other, the checkpoint gets an lm_head of its own. Raises ModelError when `folder` exists already or can't be
    written, BaseMismatchError when the base has no such rows.
    """
    changes = tensor_changes(deltas)
    check_changes(base, changes)
    untied = changes_tied(base, deltas)
    with new_folder(folder) as staging:
        for path in base.iterdir():
            if path.is_file() and path.suffix not in _OTHER_WEIGHTS:
                shutil.copyfile(path, staging / path.name)
        size = sum(_write_shard(path, staging / path.name, changes, dtype, untied) for path in shards(base))
        if dtype is not None or untied:
            _declare(staging, dtype, size, untied)
    return folder


def changes_tied(base: Path, deltas: Mapping[str, ModuleDelta]) -> bool:
    """Whether the deltas change lm_head or the embedding of a base in which these are one tensor."""
    with open_rows(base) as reader:
        tied = _HEAD not in reader.names() or bool(read_config(base).get("tie_word_embeddings"))
    return tied and not deltas.keys().isdisjoint({LM_HEAD, EMBEDDING})


def tensor_rows(name: str, tensor: Tensor) -> Tensor:
    """A view of the checkpoint's tensor `name` with a row for each channel, or of a bias with an entry for each."""
    return as_rows(name.removesuffix(".weight"), tensor)


def tensor_changes(deltas: Mapping[str, ModuleDelta]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per tensor of the checkpoint, its channels that change, int64 `[K]`, and what is added to each in `tensor_rows`.

    What is added is float32 `[K, ...]`.
    """
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
            stored = reader.weight_name(name.removesuffix(".weight")) if name.endswith(".weight") else name
            shape = None
            if stored in names:
                shape = tensor_rows(name, torch.empty(reader.shape(stored), device="meta")).shape
            if shape is None or shape[1:] != added.shape[1:] or int(rows.max()) >= shape[0]:
                there = "there is no such tensor" if shape is None else f"it has the shape {tuple(shape)}"
                raise BaseMismatchError(
                    f"the delta changes row {int(rows.max())} of {name}, {tuple(added.shape[1:])} long; "
                    f"in {base} {there}"
                )


def _write_shard(
    source: Path, target: Path, changes: Mapping[str, tuple[Tensor, Tensor]], dtype: str | None, untied: bool
) -> int:
    """Returns the size of its tensors in bytes."""
    tensors = load_file(source)
    if untied and _EMBEDDING in tensors:
        tensors[_HEAD] = tensors[_EMBEDDING].clone()
    for name, tensor in tensors.items():
        wanted = getattr(torch, dtype) if dtype is not None and tensor.is_floating_point() else tensor.dtype
        new = tensor.to(wanted)
        if name in changes:
            rows, added = changes[name]
            new = new.clone()
            tensor_rows(name, new)[rows] = (tensor_rows(name, tensor)[rows].float() + added).to(wanted)
        tensors[name] = new
    save_file(tensors, target, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _declare(folder: Path, dtype: str | None, size: int, untied: bool) -> None:
    """Makes config and index say what the tensors have become."""
    config = read_config(folder)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if untied:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        if untied:
            index["weight_map"][_HEAD] = index["weight_map"][_EMBEDDING]
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
