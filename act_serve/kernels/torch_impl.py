"""The operations in torch calls, on any device: per ability a product of its tokens and rows, added where they lie."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding

from act_serve.kernels.rows import ActiveRows, TokenWeights


def add_rows_torch(x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
    """As :func:`act_serve.kernels.reference.add_rows_reference`; products are rounded to the dtype of ``x_TI``."""
    for ability, (tokens_P, weight_P1) in zip(active.abilities, weights.on(x_TI.device), strict=True):
        if not len(tokens_P) or not len(ability.rows_N):
            continue
        value_PN = ability.products(x_TI[tokens_P]).float().mul_(weight_P1)
        place = (tokens_P[:, None], ability.rows_N.long())
        y_TO[place] = (y_TO[place].float() + value_PN).to(y_TO.dtype)


def add_scales_torch(
    x_TC: torch.Tensor, y_TC: torch.Tensor, active: ActiveRows, weights: TokenWeights, *, eps: float
) -> None:
    """As :func:`act_serve.kernels.reference.add_scales_reference`."""
    for ability, (tokens_P, weight_P1) in zip(active.abilities, weights.on(x_TC.device), strict=True):
        if not len(tokens_P) or not len(ability.rows_N):
            continue
        rows_N = ability.rows_N.long()
        x_PC = x_TC[tokens_P].float()
        size_P1 = torch.rsqrt(x_PC.square().mean(-1, keepdim=True) + eps)
        size_P1 *= weight_P1.view(-1, *[1] * (x_PC.dim() - 1))
        y_PC = y_TC[tokens_P]  # whole tokens, as a norm of heads has its channels once per head
        y_PC[..., rows_N] = (
            y_PC[..., rows_N].float() + x_PC[..., rows_N] * size_P1 * ability.delta_NI[:, 0].float()
        ).to(y_TC.dtype)
        y_TC[tokens_P] = y_PC


def add_columns_torch(ids_T: torch.Tensor, y_TC: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
    """As :func:`act_serve.kernels.reference.add_columns_reference`; fastest where ``delta_NI.t()`` is contiguous."""
    for ability, (tokens_P, weight_P1) in zip(active.abilities, weights.on(ids_T.device), strict=True):
        if not len(tokens_P) or not len(ability.rows_N):
            continue
        value_PN = embedding(ids_T[tokens_P], ability.delta_NI.t()).float() * weight_P1
        place = (tokens_P[:, None], ability.rows_N.long())
        y_TC[place] = (y_TC[place].float() + value_PN).to(y_TC.dtype)
