"""How the tensors of a stage lie on disk."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from act_serve.delta.artifact import ModuleDelta, serialize_modules

_DELTAS = "deltas.safetensors"
_TENSORS = "tensors.safetensors"


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keeps named tensors in a stage's folder."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _TENSORS)


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads what `save_tensors` wrote."""
    return load_file(folder / _TENSORS)


def save_deltas(folder: Path, deltas: Mapping[str, ModuleDelta]) -> None:
    """Keeps deltas in a stage's folder."""
    (folder / _DELTAS).write_bytes(serialize_modules(deltas))


def load_deltas(folder: Path) -> dict[str, ModuleDelta]:
    """Reads what `save_deltas` wrote."""
    tensors = load_file(folder / _DELTAS)
    names = [name.removesuffix(".rows") for name in tensors if name.endswith(".rows")]
    return {
        name: ModuleDelta(tensors[f"{name}.rows"], tensors[f"{name}.delta"], tensors.get(f"{name}.bias_delta"))
        for name in sorted(names)
    }
