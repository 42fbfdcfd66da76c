"""The operation in torch calls, on any device: per ability one product of its tokens and rows, added where they lie."""

from __future__ import annotations

import torch

from act_serve.kernels.rows import ActiveRows, TokenWeights


def add_rows_torch(x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
    """As :func:`act_serve.kernels.reference.add_rows_reference`; products are rounded to the dtype of ``x_TI``."""
    for ability, (tokens_P, weight_P1) in zip(active.abilities, weights.on(x_TI.device), strict=True):
        if not len(tokens_P) or not len(ability.rows_N):
            continue
        value_PN = ability.products(x_TI[tokens_P]).float().mul_(weight_P1)
        place = (tokens_P[:, None], ability.rows_N.long())
        y_TO[place] = (y_TO[place].float() + value_PN).to(y_TO.dtype)
