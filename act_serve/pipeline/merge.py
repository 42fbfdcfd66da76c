"""Merges the deltas of several abilities into one (offline; the engine composes abilities without merging them).

Shapes: N abilities, U rows that any of them changes, K rows of one ability, I inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import DataError
from act_serve.pipeline.merge_methods import METHODS, Method


@dataclass(frozen=True, slots=True)
class Share:
    """One ability's part in a merge: its deltas, their strength, and the share of its own values to keep."""

    deltas: Mapping[str, ModuleDelta]
    weight: float = 1.0
    density: float = 1.0


def merge_deltas(shares: Sequence[Share], method: str, seed: int = 0) -> dict[str, ModuleDelta]:
    """Returns the merged deltas in float32; rows that came out as zero are left out.

    `method` is one of METHODS; `density` is of the values of each module's changed rows, not of the whole matrix. The
    random methods give the same result for the same `seed` and order of `shares`. Raises DataError when nothing is
    left.
    """
    how, draw = METHODS[method], torch.Generator().manual_seed(seed)
    merged = {}
    for name in sorted({name for share in shares for name in share.deltas}):
        parts = [(share.deltas[name], share) for share in shares if name in share.deltas]
        module = _merge_module([_thinned(delta, share, how, draw) for delta, share in parts], how)
        if len(module.rows):
            merged[name] = module
    if not merged:
        raise DataError(f"merging by {method} leaves no row; raise the densities or the weights")
    return merged


def _thinned(module: ModuleDelta, share: Share, how: Method, draw: torch.Generator) -> ModuleDelta:
    def ready(values_KI: Tensor) -> Tensor:
        weighted = share.weight * values_KI.float()
        return weighted if how.thin is None else how.thin(weighted, share.density, draw)

    bias = None if module.bias_delta is None else ready(module.bias_delta[:, None])[:, 0]
    return ModuleDelta(module.rows.long(), ready(module.delta), bias)


def _merge_module(parts: Sequence[ModuleDelta], how: Method) -> ModuleDelta:
    rows_U = torch.cat([part.rows for part in parts]).unique()
    places = [torch.searchsorted(rows_U, part.rows) for part in parts]
    owns_NU = torch.zeros(len(parts), len(rows_U), dtype=torch.bool)
    for owner, place in enumerate(places):
        owns_NU[owner, place] = True

    def combined(values: Sequence[Tensor]) -> Tensor:
        aligned_NUI = torch.zeros(len(parts), len(rows_U), values[0].shape[1])
        for owner, place in enumerate(places):
            aligned_NUI[owner, place] = values[owner]
        return how.combine(aligned_NUI, owns_NU)

    delta_UI = combined([part.delta for part in parts])
    biases = [part.delta.new_zeros(len(part.rows)) if part.bias_delta is None else part.bias_delta for part in parts]
    bias_U = combined([bias[:, None] for bias in biases])[:, 0]
    changed_U = delta_UI.any(dim=1) | (bias_U != 0)
    has_bias = any(part.bias_delta is not None for part in parts)
    return ModuleDelta(rows_U[changed_U].int(), delta_UI[changed_U], bias_U[changed_U] if has_bias else None)
