"""The operations as their formulas read; slow, and what every fast form is compared with."""

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


def add_scales_reference(
    x_TC: torch.Tensor, y_TC: torch.Tensor, active: ActiveRows, weights: TokenWeights, *, eps: float
) -> None:
    """Adds each token's weighted changes of an RMSNorm's scale to the norm's output, in place.

    ``y_TC[t, rows_N[n]] += weight_TA[t, a] * delta_N1[n] * x_TC[t, rows_N[n]] / sqrt(mean(x_TC[t]²) + eps)``

    Args:
        x_TC: ``[T, C]`` what is normalised, or ``[T, heads, C]`` where each head is normalised by itself.
        y_TC: same shape, changed in place; untouched bit for bit where no weighted row falls.
        active, weights: as in :func:`add_rows_reference`; the delta is ``[N, 1]``.
    """
    for t, weight_A in enumerate(weights.weight_TA.tolist()):
        x, y = x_TC[t].float(), y_TC[t].float()
        normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        for weight, ability in zip(weight_A, active.abilities, strict=True):
            for n, row in enumerate(ability.rows_N.tolist() if weight else ()):
                y[..., row] += weight * ability.delta_NI[n, 0].float() * normed[..., row]
        y_TC[t] = y.to(y_TC.dtype)


def add_columns_reference(ids_T: torch.Tensor, y_TC: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
    """Adds each token's weighted changes of the embedding's columns to its embedding, in place.

    ``y_TC[t, rows_N[n]] += weight_TA[t, a] * delta_NV[n, ids_T[t]]``

    Args:
        ids_T: ``[T]`` token ids in ``[0, V)``, the V tokens that this worker has.
        y_TC: ``[T, C]``, changed in place; untouched bit for bit where no weighted row falls.
        active, weights: as in :func:`add_rows_reference`; the delta is ``[N, V]``.
    """
    for t, weight_A in enumerate(weights.weight_TA.tolist()):
        y = y_TC[t].float()
        for weight, ability in zip(weight_A, active.abilities, strict=True):
            for n, row in enumerate(ability.rows_N.tolist() if weight else ()):
                y[row] += weight * ability.delta_NI[n, int(ids_T[t])].float()
        y_TC[t] = y.to(y_TC.dtype)
