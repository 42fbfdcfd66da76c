"""Which form of the operation runs where."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from act_serve.kernels.packed import PackedRows
from act_serve.kernels.torch_impl import add_rows_torch

AddRows = Callable[[torch.Tensor, torch.Tensor, PackedRows, torch.Tensor], None]


@cache
def choose_add_rows(device: torch.device, dtype: torch.dtype) -> AddRows:
    """The fastest form for activations of ``dtype`` on ``device``; warm, so that no request pays for its compilation.

    All have the contract of :func:`act_serve.kernels.reference.add_rows_reference`.
    """
    if device.type != "cpu":
        return add_rows_torch
    try:
        from act_serve.kernels.numba_impl import DTYPES, add_rows_numba
    except (ImportError, RuntimeError):  # not installed, or numba finds no folder for its compiled code
        return add_rows_torch
    if dtype not in DTYPES:
        return add_rows_torch
    for tokens in (1, 1 << 18):  # one of each size that it treats differently
        one = PackedRows(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, dtype=torch.int64), (1,))
        x_TI, y_TO = torch.zeros(tokens, 1, dtype=dtype), torch.zeros(tokens, 1, dtype=dtype)
        add_rows_numba(x_TI, y_TO, one, torch.ones(tokens, 1))
    return add_rows_numba
