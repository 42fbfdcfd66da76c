"""The operation as its formula reads; slow, and what every fast form is compared with."""

from __future__ import annotations

import torch

from act_serve.kernels.rows import ActiveRows, TokenWeights


def add_rows_reference(x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
    """Adds each token's weighted ability rows to its output, in place, accumulating in fp32.

    ``y_TO[t, rows_N[n]] += weight_TA[t, a] * (x_TI[t] · delta_NI[n] + bias_N[n])`` for every row n of every ability a

    Args:
        x_TI: ``[T, I]`` bf16, fp16 or fp32.
        y_TO: ``[T, O]``, same dtype, changed in place; untouched bit for bit where no weighted row falls.
        active: the rows of A abilities in this layer.
        weights: of T' <= T tokens; those from T' on are padding, which uses no ability.
    """
    weight_TA = torch.from_numpy(weights.weight_TA).to(x_TI.device)
    tokens = len(weight_TA)
    x, y = x_TI[:tokens].float(), y_TO[:tokens].float()
    for number, ability in enumerate(active.abilities):
        used_T = weight_TA[:, number] != 0
        for n, row in enumerate(ability.rows_N.tolist()):
            value_T = x @ ability.delta_NI[n].float() + (0.0 if ability.bias_N is None else ability.bias_N[n].float())
            y[used_T, row] += (weight_TA[:, number] * value_T)[used_T]
    y_TO[:tokens] = y.to(y_TO.dtype)
