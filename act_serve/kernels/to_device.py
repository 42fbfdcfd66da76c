"""How tables reach a device."""

from __future__ import annotations

import numpy as np
import torch


def copy_in_order(target: torch.Tensor, values: np.ndarray) -> None:
    """Copies host values into a tensor on a device, after the work that was launched on the stream before.

    The host does not wait, and ``values`` may be changed or freed at once: what the device reads is pinned memory of
    its own. torch's host allocator gives that to nobody else before the copy has run, because a non-blocking copy
    leaves an event with it (aten/src/ATen/native/cuda/Copy.cu).

    Args:
        target: contiguous; the stream is the current one of its device, so call this where kernels are launched from.
        values: same shape and dtype.
    """
    host = torch.from_numpy(values)
    if target.device.type == "cuda":
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)
