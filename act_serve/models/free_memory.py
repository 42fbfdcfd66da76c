"""How much memory is free where models are loaded, giving back what was freed, telling when there was too little."""

import ctypes
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# How the RuntimeErrors of torch's allocators say it; only the GPU's has a class of its own.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def free_bytes() -> int | None:
    """Bytes that can still be taken: on the GPU where there is one, else in main memory and its container's limit.

    None where the system doesn't say.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    known = [value for value in (_available(), _left_in_container()) if value is not None]
    return min(known, default=None)


def return_freed() -> None:
    """Gives freed memory back to the system, which glibc keeps where a small block lies above it (malloc_trim(3))."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one that it was raised from, says that there was too little memory."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
            return True
        error = error.__cause__
    return False


def _available() -> int | None:
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        return None
    return None


def _left_in_container() -> int | None:
    """Of cgroup v2's limit; pages of files count as used there although they give way."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if limit == "max":
        return None
    giving_way = sum(int(line.split()[1]) for line in stat if line.startswith(("inactive_file ", "active_file ")))
    return max(int(limit) - used + giving_way, 0)
