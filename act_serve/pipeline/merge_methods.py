"""How values of several abilities become one value, method by method.

A method thins out each ability's own values, or not, and then combines the abilities row by row. Weights are strengths
as in a composition: they scale an ability before anything else, and no method divides them out again.
Shapes: N abilities, U rows that any of them changes, K rows of one ability, I inputs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Thin = Callable[[Tensor, float, Generator], Tensor]
Combine = Callable[[Tensor, Tensor], Tensor]


def trim(values_KI: Tensor, density: float, _draw: Generator) -> Tensor:
    """Keeps the share `density` of the values with the largest magnitudes (TIES, arXiv 2306.01708, section 4)."""
    values = values_KI.flatten()
    kept = values.abs().topk(math.ceil(density * len(values))).indices  # of equal ones as many as there is room for
    return torch.zeros_like(values).index_copy(0, kept, values[kept]).view_as(values_KI)


def drop(values_KI: Tensor, density: float, draw: Generator) -> Tensor:
    """Keeps each value with probability `density` and divides it by that (DARE, arXiv 2311.03099, section 3)."""
    return values_KI * (torch.rand(values_KI.shape, generator=draw) < density) / density


def total(values_NUI: Tensor, _owns_NU: Tensor) -> Tensor:
    """The sum, as in a composition (arXiv 2601.09398: the union of the masks)."""
    return values_NUI.sum(0)


def mean_of_owners(values_NUI: Tensor, owns_NU: Tensor) -> Tensor:
    """The mean over the abilities that change the row; a row that one ability changes stays as it is."""
    return values_NUI.sum(0) / owns_NU.sum(0)[:, None]


def first(values_NUI: Tensor, owns_NU: Tensor) -> Tensor:
    """The row of the first ability that changes it."""
    return values_NUI[owns_NU.int().argmax(0), torch.arange(owns_NU.shape[1])]


def elected_mean(values_NUI: Tensor, _owns_NU: Tensor) -> Tensor:
    """The mean of the values that have the sign of their sum (TIES: elect, then disjoint mean)."""
    agrees_NUI = (values_NUI.sign() == values_NUI.sum(0).sign()) & (values_NUI != 0)
    return (values_NUI * agrees_NUI).sum(0) / agrees_NUI.sum(0).clamp_min(1)


@dataclass(frozen=True, slots=True)
class Method:
    """How to `thin` each ability and `combine` all; `density` is the default share of values that thinning keeps."""

    combine: Combine
    thin: Thin | None = None
    density: float = 1.0


METHODS: Mapping[str, Method] = {
    "sum": Method(total),
    "mean": Method(mean_of_owners),
    "priority": Method(first),
    "ties": Method(elected_mean, trim),
    "dare": Method(total, drop, 0.5),
    "dare_ties": Method(elected_mean, drop, 0.5),
}
