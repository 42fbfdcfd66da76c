"""Which form of the operation runs where."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from act_serve.kernels.native import DTYPES, NativeRows, compile_native
from act_serve.kernels.rows import ActiveRows, TokenWeights
from act_serve.kernels.torch_impl import add_rows_torch

AddRows = Callable[[torch.Tensor, torch.Tensor, ActiveRows, TokenWeights], None]

_log = logging.getLogger(__name__)


def choose_add_rows(device: torch.device, dtype: torch.dtype, folder: Path) -> AddRows:
    """The fastest form for activations of ``dtype`` on ``device``.

    All have the contract of :func:`act_serve.kernels.reference.add_rows_reference`.

    Args:
        folder: keeps compiled code from one start to the next.
    """
    if device.type != "cpu" or dtype not in DTYPES:
        return add_rows_torch
    try:
        return NativeRows(compile_native(folder), dtype)
    except (OSError, subprocess.CalledProcessError) as exc:
        reason = exc.stderr.decode(errors="replace")[-300:] if isinstance(exc, subprocess.CalledProcessError) else exc
        _log.warning("abilities run several times slower without compiled code (%s); install g++ 10 or newer", reason)
        return add_rows_torch
