"""What the router does with Ray's choice of a replica when nobody waits for it any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentResponse

from act_serve.errors import NotReadyError, OverloadedError
from act_serve.server.lost import ReplicaLostError, until_lost
from act_serve.server.ray_router import RayUpstream
from act_serve.server.route import Route


class Handle:
    """Stands for a deployment without a replica, whose choice of one ends when there is one."""

    def __init__(self) -> None:
        self.hold = SimpleNamespace(choose_replica=self._choose, dispatch=self._dispatch)
        self.there = asyncio.Event()
        self.choosing, self.left = 0, 0

    @asynccontextmanager
    async def _choose(self, ask: Any) -> AsyncIterator[Any]:
        self.choosing += 1
        await self.there.wait()
        yield SimpleNamespace(replica_id="one", replica_metadata={"url": "http://127.0.0.1:1", "token": "t"})
        self.left += 1

    def _dispatch(self, selection: Any, lease: str) -> DeploymentResponse[Any]:
        """Ray's answer for a replica that has just left."""
        sent: Future[Any] = Future()
        sent.set_exception(ReplicaUnavailableError("it has left"))
        metadata: Any = SimpleNamespace(request_id="r", _by_reference=True)
        return DeploymentResponse(sent, metadata, _is_router_running_in_separate_loop=True)


async def lease(upstream: RayUpstream) -> None:
    async with upstream.lease(Route()):
        raise AssertionError("there is no replica")


async def test_requests_that_gave_up_do_not_pile_up_inside_ray() -> None:
    handle: Any = Handle()
    upstream = RayUpstream(handle, wait_s=0.1, max_waiting=3, places=2)
    expected: set[type] = {NotReadyError}
    for _ in range(3):
        ended = await asyncio.gather(*(lease(upstream) for _ in range(5)), return_exceptions=True)
        assert {type(each) for each in ended} == expected
        expected = {NotReadyError, OverloadedError}  # from now on three wait, and two are refused
    assert handle.choosing == 2, "those have the places until Ray has chosen"
    handle.there.set()
    while handle.left < 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    assert upstream._queue._taken == 0
    assert not upstream.waiting


async def test_a_client_that_leaves_while_ray_chooses_keeps_no_place() -> None:
    handle: Any = Handle()
    upstream = RayUpstream(handle, wait_s=60.0, max_waiting=3, places=1)
    task = asyncio.create_task(lease(upstream))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert upstream._queue._taken == 1
    handle.there.set()
    await asyncio.sleep(0.05)
    assert (handle.left, upstream._queue._taken) == (1, 0)


async def test_a_replica_that_leaves_between_choice_and_call_is_lost() -> None:
    handle: Any = Handle()
    handle.there.set()
    upstream = RayUpstream(handle, wait_s=60.0, max_waiting=3, places=1)
    with pytest.raises(ReplicaLostError, match="ReplicaUnavailableError"):
        async with upstream.lease(Route()) as replica, until_lost(replica.lost):
            await asyncio.sleep(60)
    await asyncio.sleep(0.05)
    assert (handle.left, upstream._queue._taken) == (1, 0)
