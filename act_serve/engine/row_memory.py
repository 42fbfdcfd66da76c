"""Memory for the rows of one ability."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch

_HUGE_PAGE = 2 << 20
_CACHE_LINE = 64


class RowMemory:
    """One piece of main memory that an ability's tensors are taken from; it is freed with the last of them.

    An ability has hundreds of tensors of some ten kB. In pages of 4 kB, which Linux clears one by one as they are
    first written, filling such memory takes longer than reading the rows, and a step that reads them has to look up
    each of these pages. So it lies in huge pages, as far as it fills them (Linux, admin-guide/mm/transhuge.html).

    Args:
        nbytes: at least what will be taken, every tensor rounded up to 64 bytes; the rest takes no memory.
    """

    def __init__(self, nbytes: int) -> None:
        # The room for a huge page's alignment is an address range and no memory.
        memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`
        self._taken = -self._bytes.data_ptr() % _HUGE_PAGE
        whole = nbytes // _HUGE_PAGE * _HUGE_PAGE
        if whole and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE, self._taken, whole)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor, not initialised, at a multiple of 64 bytes."""
        nbytes = rounded_up(prod(shape) * dtype.itemsize)
        part = self._bytes[self._taken : self._taken + nbytes]
        self._taken += nbytes
        return part.view(dtype)[: prod(shape)].view(*shape)


def rounded_up(nbytes: int) -> int:
    """What a tensor of so many bytes takes."""
    return -(-nbytes // _CACHE_LINE) * _CACHE_LINE
