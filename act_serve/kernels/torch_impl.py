"""The operation in three torch calls, on any device: one product over all packed rows, scaled, added where they lie."""

from __future__ import annotations

import torch

from act_serve.kernels.packed import PackedRows


def add_rows_torch(x_TI: torch.Tensor, y_TO: torch.Tensor, packed: PackedRows, weight_TA: torch.Tensor) -> None:
    """As :func:`act_serve.kernels.reference.add_rows_reference`; the product is rounded to the dtype of ``x_TI``."""
    tokens = weight_TA.shape[0]
    counts_A = torch.tensor(packed.counts, device=weight_TA.device)
    weight_TN = weight_TA.repeat_interleave(counts_A, dim=1, output_size=sum(packed.counts))
    value_TN = packed.products(x_TI[:tokens])
    torch.mul(value_TN, weight_TN, out=value_TN)
    y_TO[:tokens].index_add_(1, packed.rows_N, value_TN)
