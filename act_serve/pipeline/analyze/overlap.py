"""How many channels two masks have in common, against what chance alone gives."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, isin

Mask = Mapping[str, Tensor]
"""The chosen rows of each module, ascending integers `[K]`."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """`share` of the smaller mask's rows that the other has too, and what random masks would share.

    `chance`: two masks of these sizes, drawn from all channels. `chance_in_modules`: drawn within each module, as many
    rows there as the masks have; higher when both prefer the same modules.
    """

    rows: int
    share: float
    chance: float
    chance_in_modules: float


def overlap(left: Mask, right: Mask, channels: Mapping[str, int]) -> Overlap:
    """Compares two masks over modules of `channels` channels each."""
    shared = {name: int(isin(left[name], right[name]).sum()) for name in left.keys() & right.keys()}
    expected = sum(len(left[name]) * len(right[name]) / channels[name] for name in shared)
    sizes = [sum(map(len, mask.values())) for mask in (left, right)]
    smaller = max(1, min(sizes))
    total = sum(shared.values())
    return Overlap(
        rows=total,
        share=total / smaller,
        chance=max(sizes) / max(1, sum(channels.values())),
        chance_in_modules=expected / smaller,
    )
