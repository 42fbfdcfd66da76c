"""How long something takes."""

from __future__ import annotations

import time
from collections.abc import Callable


def milliseconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000
