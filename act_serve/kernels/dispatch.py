"""Which form of the operation runs where."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from act_serve.kernels.native import DTYPES, NativeRows, compile_native
from act_serve.kernels.row_table import RowAddresses
from act_serve.kernels.rows import AbilityRows, ActiveRows, TokenWeights
from act_serve.kernels.step_table import StepTable
from act_serve.kernels.torch_impl import add_rows_torch

AddRows = Callable[[torch.Tensor, torch.Tensor, ActiveRows, TokenWeights], None]
AddRowsFrom = Callable[[torch.Tensor, torch.Tensor, RowAddresses, StepTable, int | None], None]

_log = logging.getLogger(__name__)


def choose_add_rows(device: torch.device, dtype: torch.dtype, folder: Path) -> AddRows:
    """The fastest form for activations of ``dtype`` on ``device``.

    All have the contract of :func:`act_serve.kernels.reference.add_rows_reference`.

    Args:
        folder: keeps compiled code from one start to the next.
    """
    if device.type == "cuda":
        return _on_gpu(device, dtype)
    if device.type != "cpu" or dtype not in DTYPES:
        _log.warning("abilities in %s on %s have no compiled code and run several times slower", dtype, device.type)
        return add_rows_torch
    try:
        return NativeRows(compile_native(folder), dtype)
    except (OSError, subprocess.CalledProcessError) as exc:
        reason = exc.stderr.decode(errors="replace")[-300:] if isinstance(exc, subprocess.CalledProcessError) else exc
        _log.warning("abilities run several times slower without compiled code (%s); install g++ 10 or newer", reason)
        return add_rows_torch


def graph_form(form: AddRows) -> AddRowsFrom | None:
    """The same operation from tables on the device, whose launches can be captured in a CUDA graph.

    None where a form has none: it reads the step on the host, and would replay the one of the capture for ever.
    """
    return getattr(form, "from_tables", None)


def agrees_with_torch(
    form: AddRows, device: torch.device, dtype: torch.dtype, tokens: Sequence[int] = (3, 600, 5000)
) -> bool:
    """Whether a form does what torch does, in steps of so many tokens: a guard against a compiler's mistakes.

    On a GPU it also compiles the kernels, each for one of these lengths, before the server needs them: the sizes are
    multiples of 128 or 16, as those of real layers are, for which Triton compiles kernels of their own.
    """
    random = torch.Generator().manual_seed(0)
    for length in tokens:
        rows_N = torch.arange(20, dtype=torch.int32, device=device) * 2
        delta_ANI = torch.randn(2, 20, 128, generator=random).to(device, dtype)
        active = ActiveRows([AbilityRows(rows_N, delta_ANI[0]), AbilityRows(rows_N + rows_N % 4 // 2, delta_ANI[1])])
        weights = TokenWeights(np.array([[1.0, 0.0], [0.5, -2.0], [0.0, 1.0]])[np.arange(length) % 3])
        x_TI = torch.randn(length, 128, generator=random).to(device, dtype)
        expected, got = torch.zeros(2, length, 48, dtype=dtype, device=device)
        add_rows_torch(x_TI, expected, active, weights)
        form(x_TI, got, active, weights)
        tolerance = expected.float().abs().max().item() * (1e-4 if dtype == torch.float32 else 2**-6)
        if not torch.allclose(got.float(), expected.float(), atol=tolerance, rtol=0):
            return False
    return True


def _on_gpu(device: torch.device, dtype: torch.dtype) -> AddRows:
    try:
        from act_serve.kernels.triton_impl import TritonError, TritonRows
    except ImportError as exc:
        _log.warning("abilities run several times slower without Triton: %s", exc)
        return add_rows_torch
    form = TritonRows()
    try:
        if agrees_with_torch(form, device, dtype):
            return form
        reason = "its results are wrong"
    except (TritonError, RuntimeError) as exc:
        reason = str(exc)
    _log.warning("the Triton kernel does not work on this GPU, so abilities run several times slower: %s", reason)
    return add_rows_torch
