"""Decides whether a pair of models is compared whole or layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from act_serve.errors import BuildError
from act_serve.models.families import is_mixture, read_config
from act_serve.models.free_memory import free_bytes
from act_serve.models.loading import computing_dtype
from act_serve.models.row_reader import open_rows
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.profile.schema import Memory, Ranking

# What running both models takes beside their weights.
_HEADROOM = 1.2


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Whether one layer of each model is held at a time, and in words for the plan what is held."""

    layerwise: bool
    what: str


def memory_use(ranking: Ranking, memory: Memory, base: Path, include: Sequence[str] = ()) -> MemoryUse:
    """What the profile asks for, or with `auto` layer by layer when the pair doesn't fit in free memory.

    With `auto`, what can't go layer by layer takes the models whole. Raises BuildError where a mixture of experts is
    asked for layer by layer.
    """
    if not RANKINGS[ranking].reads_text:
        return MemoryUse(False, "one tensor of each at a time")
    if memory == "layerwise" and is_mixture(read_config(base)):
        raise BuildError(
            f"{base} is a mixture of experts, which can't go layer by layer; set localize.memory to together, or "
            "localize.ranking to weight_relative, which reads one tensor at a time"
        )
    if memory != "auto" or not can_go_layerwise(ranking, base, include):
        layerwise = memory == "layerwise"
        return MemoryUse(layerwise, "layer by layer" if layerwise else "both in memory")
    free, needed = free_bytes(), 2 * _HEADROOM * model_bytes(base)
    if free is None or needed <= free:
        return MemoryUse(False, "both in memory")
    return MemoryUse(True, f"layer by layer: the pair needs {_gib(needed)}, {_gib(free)} are free")


def fits(folder: Path) -> bool:
    """Whether this one model can be run in the memory that is free, as far as the system says."""
    free = free_bytes()
    return free is None or _HEADROOM * model_bytes(folder) <= free


def can_go_layerwise(ranking: Ranking, base: Path, include: Sequence[str] = ()) -> bool:
    """Whether one layer of each model at a time is enough.

    It is not for channels outside the linear modules, some of which lie in no layer, nor for mixtures of experts, whose
    layers run in another form than they are stored in.
    """
    return RANKINGS[ranking].layerwise and not include and not is_mixture(read_config(base))


def model_bytes(folder: Path) -> int:
    """Bytes of all weights in the dtype that they are computed in, from the headers of the checkpoint."""
    with open_rows(folder) as reader:
        return computing_dtype().itemsize * sum(prod(reader.shape(name)) for name in reader.names())


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
