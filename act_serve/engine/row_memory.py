"""Memory for the rows of one ability."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
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
        memory = self._mmap = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`
        self._start = self._taken = -self._bytes.data_ptr() % _HUGE_PAGE
        whole = nbytes // _HUGE_PAGE * _HUGE_PAGE
        if whole and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages; they are faster, no more
                memory.madvise(mmap.MADV_HUGEPAGE, self._taken, whole)
        self._end = self._taken + nbytes

    @property
    def nbytes(self) -> int:
        """What can still be taken."""
        return self._end - self._taken

    def prefault(self) -> None:
        """Has Linux find all of the memory now, so that filling it does not wait for that."""
        for start in range(self._taken, self._end, _HUGE_PAGE):  # one by one, so that other threads get their turns
            self._bytes[start : min(start + _HUGE_PAGE, self._end) : mmap.PAGESIZE] = 0

    def shrink(self, nbytes: int) -> None:
        """Gives back what is more than so many bytes."""
        end = self._taken + nbytes
        free = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        if free < self._end and hasattr(mmap, "MADV_DONTNEED"):
            self._mmap.madvise(mmap.MADV_DONTNEED, free, self._end - free)
        self._end = end

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor, not initialised, at a multiple of 64 bytes."""
        start, count = self._taken, prod(shape)
        self._taken += rounded_up(count * dtype.itemsize)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._mmap, dtype=dtype, count=count, offset=start).view(shape)

    def copy_to(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """Copies all that was taken in one piece; returns what finds a tensor's copy.

        On a GPU a copy waits for what the stream has to do, so that one for every tensor would wait hundreds of times.
        """
        copy = self._bytes[self._start : self._taken].to(device, copy=True)
        here = self._bytes.data_ptr() + self._start

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.numel():
                return tensor.to(device)
            place = tensor.data_ptr() - here
            return copy[place : place + tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

        return copied


class SpareMemory:
    """Hands out memory, and keeps one piece ready; for one thread.

    In a virtual machine, memory that was never used before has to be found by the host, too. On two cores of one that
    took 3 ms a MB, as long as all the rest of loading.

    Args:
        most: bytes of the largest piece that is kept ready.
    """

    def __init__(self, most: int) -> None:
        self._most, self._wanted = most, 0
        self._ready: RowMemory | None = None

    def take(self, nbytes: int) -> RowMemory:
        """A piece of so many bytes."""
        self._wanted = nbytes
        spare, self._ready = self._ready, None
        if spare is None or spare.nbytes < nbytes:
            return RowMemory(nbytes)
        spare.shrink(nbytes)
        return spare

    def renew(self) -> None:
        """Makes a piece ready that is as large as the last one taken, which takes a while."""
        if self._ready is not None or not 0 < self._wanted <= self._most:
            return
        spare = RowMemory(self._wanted)
        spare.prefault()
        self._ready = spare


def rounded_up(nbytes: int) -> int:
    """What a tensor of so many bytes takes."""
    return -(-nbytes // _CACHE_LINE) * _CACHE_LINE
