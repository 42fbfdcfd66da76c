"""Finding 1: few channels carry most of the activation difference (arXiv 2601.09398, section 3.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CURVE_POINTS = 160
HEADLINE_P = 0.05


@dataclass(frozen=True, slots=True)
class Concentration:
    """How unevenly Δa lies over the channels of one ability.

    `top_shares`: for each p, the share of the summed Δa in the top p of the channels; chance is p itself.
    `top_shares_in_modules`: the same after each Δa is divided by the mean of its module, which takes out that some
    modules simply have larger outputs. `ccdf`: pairs (x, share of channels with Δa > x). `curve`: pairs (p, share).
    """

    ability: str
    channels: int
    median: float
    largest: float
    top_shares: Mapping[float, float]
    top_shares_in_modules: Mapping[float, float]
    ccdf: tuple[tuple[float, float], ...]
    curve: tuple[tuple[float, float], ...]


def concentration(ability: str, differences: Mapping[str, Tensor], shares: Sequence[float]) -> Concentration:
    """Measures Δa, `[O]` per module name, at the given shares p of the channels."""
    ranked = _ranked(torch.cat(list(differences.values())))
    levelled = _ranked(torch.cat([values / values.mean().clamp_min(1e-30) for values in differences.values()]))
    total = len(ranked)
    counts = torch.logspace(0, torch.log10(torch.tensor(float(total))).item(), CURVE_POINTS).round().long().unique()
    return Concentration(
        ability=ability,
        channels=total,
        median=float(ranked.median()),
        largest=float(ranked[0]),
        top_shares={p: _top_share(ranked, p) for p in shares},
        top_shares_in_modules={p: _top_share(levelled, p) for p in shares},
        ccdf=tuple((float(ranked[count - 1]), (int(count) - 1) / total) for count in counts.flip(0)),
        curve=tuple((int(count) / total, float(ranked[:count].sum() / ranked.sum())) for count in counts),
    )


def _ranked(values: Tensor) -> Tensor:
    return values.double().sort(descending=True).values


def _top_share(ranked: Tensor, p: float) -> float:
    return float(ranked[: max(1, round(p * len(ranked)))].sum() / ranked.sum().clamp_min(1e-30))
