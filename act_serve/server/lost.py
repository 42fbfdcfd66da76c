"""Ends what waits for a replica that will never answer.

A process that hangs, or a node without power, closes no connection: only Ray's health checks notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ReplicaLostError(Exception):
    """The replica failed: before the first byte of its answer, another one may be asked."""


@asynccontextmanager
async def until_lost(lost: asyncio.Future[str] | None) -> AsyncIterator[None]:
    """Runs its body until ``lost`` is done; costs the body nothing, as :func:`asyncio.timeout` does.

    Raises:
        ReplicaLostError: ``lost`` was done first; what the body waited for is cancelled.
    """
    task = asyncio.current_task()
    if lost is None or task is None:
        yield
        return
    cancelled_before, by_us = task.cancelling(), False

    def cancel(_: asyncio.Future[str]) -> None:
        nonlocal by_us
        by_us = True
        task.cancel()

    lost.add_done_callback(cancel)
    try:
        yield
    except asyncio.CancelledError:
        if by_us and task.uncancel() <= cancelled_before:
            raise ReplicaLostError(lost.result()) from None
        raise
    finally:
        lost.remove_done_callback(cancel)
