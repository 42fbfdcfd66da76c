"""Ends what a server started and clears what it left: child processes and shared-memory files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

_SHARED_MEMORY = Path("/dev/shm")
_GRACE_S = 5.0


def children() -> list[psutil.Process]:
    """All living descendants of this process."""
    return psutil.Process().children(recursive=True)


def end_processes(processes: Iterable[psutil.Process]) -> None:
    """Asks every process to end, and kills those that have not after five seconds."""
    alive = list(processes)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(alive, timeout=_GRACE_S)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=_GRACE_S)


def shared_memory_of(processes: Iterable[psutil.Process]) -> frozenset[Path]:
    """The shared-memory files that these processes have mapped (Linux; empty elsewhere).

    vLLM and Ray remove theirs only when they end in good order.
    """
    found: set[Path] = set()
    for process in processes:
        with suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            found |= {Path(line.split(maxsplit=5)[5]) for line in lines if f" {_SHARED_MEMORY}/" in line}
    return frozenset(found)


def orphaned_semaphores(since: float) -> frozenset[Path]:
    """Semaphores of multiprocessing and of joblib's loky that nobody has open any more (Linux; empty elsewhere).

    A spawned process that ends without running its finalizers leaves them, and vLLM's do. While one is in use, some
    process has it mapped; names are random and never used again.

    Args:
        since: seconds of the epoch; older ones are not ours.
    """
    files = set()
    for file in (*_SHARED_MEMORY.glob("sem.mp-*"), *_SHARED_MEMORY.glob("sem.loky-*")):
        with suppress(OSError):
            status = file.stat()
            if status.st_uid == os.getuid() and status.st_mtime >= since:
                files.add(file)
    return frozenset(files - shared_memory_of(psutil.process_iter()))


def remove_files(files: Iterable[Path]) -> None:
    """Removes those of the files that are still there."""
    for file in files:
        with suppress(OSError):
            file.unlink()
