"""Runs a function over many items: those of alike length together, and in smaller parts where memory is too little."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from act_serve.models.free_memory import out_of_memory, return_freed

T = TypeVar("T")
R = TypeVar("R")


def in_batches(
    run: Callable[[Sequence[T]], list[R]], items: Sequence[T], *, size: int, length: Callable[[T], int]
) -> list[R]:
    """The results of `run`, in the items' order; it gets at most `size` of them at once, so that little is padded."""
    order = sorted(range(len(items)), key=lambda index: length(items[index]))
    found: dict[int, R] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        found.update(zip(chosen, _in_parts(run, [items[index] for index in chosen]), strict=True))
    return [found[index] for index in range(len(items))]


def _in_parts(run: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """`run(items)`; in halves, and halves of these, where memory is too little for all at once."""
    try:
        return run(items)
    except (MemoryError, RuntimeError) as exc:
        if len(items) == 1 or not out_of_memory(exc):
            raise
    # Not inside `except`: the error's frames hold what the attempt had taken.
    return_freed()
    torch.cuda.empty_cache()
    half = len(items) // 2
    return [*_in_parts(run, items[:half]), *_in_parts(run, items[half:])]
