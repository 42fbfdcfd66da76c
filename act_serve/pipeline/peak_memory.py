"""The most memory that a stage of a build held, on the GPU where there is one, else of the process."""

import resource
import sys
from pathlib import Path

import torch

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def forget_peak() -> None:
    """Starts the peak anew at what is held now; without Linux's /proc the peak stays that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        _RESET.write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return


def peak_bytes() -> int:
    """Bytes at the peak since `forget_peak`: allocated on the GPU, or else resident in main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of macOS counts bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
