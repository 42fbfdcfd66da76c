"""The operation as its formula reads; slow, and what every fast form is compared with."""

from __future__ import annotations

import torch

from act_serve.kernels.packed import PackedRows


def add_rows_reference(x_TI: torch.Tensor, y_TO: torch.Tensor, packed: PackedRows, weight_TA: torch.Tensor) -> None:
    """Adds each token's weighted ability rows to its output, in place, accumulating in fp32.

    ``y_TO[t, rows_N[n]] += weight_TA[t, owner_N[n]] * (x_TI[t] · delta_NI[n] + bias_N[n])``

    Args:
        x_TI: ``[T, I]`` bf16, fp16 or fp32.
        y_TO: ``[T, O]``, same dtype, changed in place; untouched bit for bit where no weighted row falls.
        packed: the rows of A abilities.
        weight_TA: ``[T', A]`` fp32, T' <= T; 0 means that the token does not use the ability, and tokens from T' on
            are padding, which uses none.
    """
    tokens = weight_TA.shape[0]
    x, y = x_TI[:tokens].float(), y_TO[:tokens].float()
    n = 0
    for owner, count in enumerate(packed.counts):
        weight_T = weight_TA[:, owner]
        used_T = weight_T != 0
        for n in range(n, n + count):  # noqa: B020 - goes on where the last ability ended
            value_T = x @ packed.delta_NI[n].float() + (0.0 if packed.bias_N is None else packed.bias_N[n].float())
            y[used_T, packed.rows_N[n]] += (weight_T * value_T)[used_T]
        n += bool(count)
    y_TO[:tokens] = y.to(y_TO.dtype)
