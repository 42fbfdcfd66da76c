"""Reads single tensors and single rows out of a checkpoint's safetensors shards, never the whole model."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from act_serve.delta.channels import EMBEDDING, kind_of
from act_serve.errors import ModelError

_INDEX = "model.safetensors.index.json"
_BLOCK = 4096


def as_rows(module: str, weight: Tensor) -> Tensor:
    """A module's stored weight as `[O, I]`, a row per channel; a view, so that what is written there is written."""
    kind = kind_of(module)
    if kind == "norms":
        return weight[:, None]
    return weight.t() if kind == "embedding" else weight


def weight_names(module: str) -> list[str]:
    """Tensors that may hold the module's weight; the first that there is does: a tied lm_head has none of its own."""
    return [f"{module}.weight", *([f"{EMBEDDING}.weight"] if kind_of(module) == "lm_head" else [])]


class RowReader:
    """An open checkpoint; make one with `open_rows`."""

    def __init__(self, folder: Path, shard_of: dict[str, Any]) -> None:
        self._folder = folder
        self._shard_of = shard_of

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`; raises ModelError when there is none."""
        return tuple(self._shard(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """The whole tensor `name`; raises ModelError when there is none."""
        return self._shard(name).get_tensor(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor `name` in parts, in their order, of at most `_BLOCK` along its first dimension."""
        shape, view = self.shape(name), self._shard(name).get_slice(name)
        if not shape:
            yield self.tensor(name)
            return
        for start in range(0, shape[0], _BLOCK):
            yield view[start : min(start + _BLOCK, shape[0])]

    def weight_name(self, module: str) -> str:
        """Name of the tensor that holds the module's weight, or would if it is missing."""
        names = weight_names(module)
        return next((name for name in names if name in self._shard_of), names[0])

    def matrix(self, module: str) -> Tensor:
        """The module's weight, `[O, I]` with a row per channel; raises ModelError when there is none."""
        return as_rows(module, self.tensor(self.weight_name(module)))

    def matrix_shape(self, module: str) -> tuple[int, ...]:
        """Shape of `matrix`, without reading it."""
        return tuple(as_rows(module, torch.empty(self.shape(self.weight_name(module)), device="meta")).shape)

    def channels(self, module: str, rows: Sequence[int]) -> Tensor:
        """Rows of `matrix`, `[len(rows), I]`, in the order asked for."""
        if kind_of(module) == "embedding":  # columns of what is stored
            return self.matrix(module)[list(rows)]
        return as_rows(module, self.rows(self.weight_name(module), rows))

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Rows of a matrix or entries of a vector, `[len(rows), ...]`, in the order asked for."""
        view = self._shard(name).get_slice(name)
        return torch.cat([view[row : row + 1] for row in rows])

    def _shard(self, name: str) -> Any:
        if name not in self._shard_of:
            raise ModelError(f"{self._folder} has no tensor {name}")
        return self._shard_of[name]


@contextmanager
def open_rows(folder: Path, names: Sequence[str] | None = None) -> Iterator[RowReader]:
    """Opens the safetensors shards of the checkpoint in `folder`, or those alone that hold the tensors `names`.

    What was read stays mapped until the reader is closed. Raises ModelError when there are none, or one is missing or
    damaged.
    """
    with ExitStack() as stack:
        shard_of: dict[str, Any] = {}
        for path in shards(folder, names):
            try:
                shard = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as exc:
                raise ModelError(f"{path} can't be read as safetensors: {exc}") from exc
            shard_of |= dict.fromkeys(shard.keys(), shard)
        yield RowReader(folder, shard_of)


def shards(folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """The safetensors files of the checkpoint in `folder`, or those of `names`.

    Raises ModelError when there are none, or their index is damaged.
    """
    index = folder / _INDEX
    if index.exists():
        shard_of = _read_index(index)
        named = shard_of.values() if names is None else (shard_of[name] for name in names if name in shard_of)
        return [folder / name for name in sorted(set(named))]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{folder} holds no .safetensors files; convert the checkpoint with save_pretrained first")
    return found


def _read_index(path: Path) -> dict[str, str]:
    """The shard of every tensor, by name."""
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in shard_of.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(
            f"{path} is no index of a checkpoint's shards, as after a download that broke off: {exc!r}; download the "
            "model again"
        ) from exc
