"""Finding 2: different abilities lie in different channels (arXiv 2601.09398, section 3.1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from act_serve.pipeline.analyze.overlap import Mask, Overlap, overlap


@dataclass(frozen=True, slots=True)
class Disentanglement:
    """Overlap of the masks of two abilities that one ranking chose at one p."""

    left: str
    right: str
    ranking: str
    p: float
    overlap: Overlap


def disentanglement(
    masks: Mapping[str, Mask], channels: Mapping[str, int], *, ranking: str, p: float
) -> list[Disentanglement]:
    """Compares the masks, by ability name, of every two abilities."""
    return [
        Disentanglement(left, right, ranking, p, overlap(masks[left], masks[right], channels))
        for left, right in combinations(masks, 2)
    ]
