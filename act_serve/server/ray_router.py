"""The Router deployment, and how it asks Ray for engine replicas."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve._private import constants, replica
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from act_serve.errors import NotReadyError
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.fair_queue import FairQueue
from act_serve.server.lease import LEASE_HEADER
from act_serve.server.ray_engine import ENGINE, replica_headers
from act_serve.server.route import Route
from act_serve.server.upstream import Replica
from act_serve.server.warmth import Ask, Warmth

_log = logging.getLogger(__name__)
_PROBE_TIMEOUT_S = 2.0
_END_TIMEOUT_S = 5.0
# Places at each engine that a router may take beyond its share.
_SPARE = 8


class RayUpstream:
    """Engine replicas through a deployment handle.

    Args:
        handle: of the Engine deployment.
        wait_s: how long a request may wait for a replica.
        max_waiting: requests that may wait for one.
        places: requests that this router may have at each replica.
    """

    def __init__(self, handle: DeploymentHandle[Any], wait_s: float, max_waiting: int, places: int) -> None:
        self._handle = handle
        self._hold = handle.hold
        self._wait_s = wait_s
        self._places = places
        self._queue = FairQueue(max_waiting, places)
        self._warmth = Warmth()
        self._ending: set[asyncio.Task[None]] = set()
        self._listed: dict[str, Replica] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait for a place at an engine."""
        return self._queue.waiting

    @asynccontextmanager
    async def lease(self, route: Route, avoid: Collection[str] = ()) -> AsyncIterator[Replica]:
        """Reserves a slot on the best replica that has one (ray_affinity.py)."""
        resize = partial(self._resize, asyncio.get_running_loop())
        ask, lease = Ask(route, tuple(avoid), self._warmth, resize), uuid.uuid4().hex
        try:
            async with asyncio.timeout(self._wait_s):
                await self._queue.enter(route.group)
                choice = self._hold.choose_replica(ask)
                choosing = asyncio.ensure_future(choice.__aenter__())
                try:
                    selection = await asyncio.shield(choosing)
                    held = self._hold.dispatch(selection, lease)
                except BaseException:
                    self._finish(self._give_up(choosing, choice))
                    raise
        except TimeoutError:
            raise NotReadyError(f"no engine replica was free within {self._wait_s:g} s; try again later") from None
        except DeploymentUnavailableError as exc:
            raise NotReadyError("the engines are not available; see the server's log") from exc
        self._warmth.sent(route, selection.replica_id)
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        watch = asyncio.create_task(_watch(held, lost))
        address = selection.replica_metadata
        headers = {**replica_headers(address["token"]), LEASE_HEADER: lease}
        try:
            yield Replica(selection.replica_id, address["url"], headers, lost)
        except BaseException:
            _cancel(held)
            raise
        finally:  # the client has its answer by now and must not wait for Ray's bookkeeping
            self._finish(self._end(held, watch, choice))

    def _resize(self, loop: asyncio.AbstractEventLoop, replicas: int) -> None:
        """Takes the number of replicas from Ray's thread."""
        loop.call_soon_threadsafe(self._queue.resize, self._places * max(replicas, 1))

    def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _give_up(self, choosing: asyncio.Future[Any], choice: AbstractAsyncContextManager[Any]) -> None:
        """Gives the place back once Ray has chosen: it goes on choosing, whoever waits for it no more."""
        try:
            with suppress(RayError, RayServeException):
                await choosing
                await choice.__aexit__(None, None, None)
        finally:
            self._queue.leave()

    async def _end(
        self, held: DeploymentResponse[Any], watch: asyncio.Task[None], choice: AbstractAsyncContextManager[Any]
    ) -> None:
        try:
            done, _ = await asyncio.wait({watch}, timeout=_END_TIMEOUT_S)
            if not done:
                _cancel(held)
                await asyncio.wait({watch}, timeout=_END_TIMEOUT_S)
            await choice.__aexit__(None, None, None)
        finally:
            self._queue.leave()

    async def replicas(self) -> Sequence[Replica]:
        """All replicas that Ray knows; one that is silent or dead hides no other, and stays until Ray drops it."""
        with suppress(RayError, RayServeException, TimeoutError, RuntimeError):
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                found = await self._handle.broadcast("address").results_async(return_exceptions=True)
            answered = [a for a in found if isinstance(a, dict)]
            if len(answered) == len(found):
                self._listed = {}
            self._listed |= {a["name"]: Replica(a["name"], a["url"], replica_headers(a["token"])) for a in answered}
        return list(self._listed.values())


def _cancel(held: DeploymentResponse[Any]) -> None:
    """Cancels a lease's call; one that Ray could not even send raises its own error here, which its watch has seen."""
    with suppress(RayError, RayServeException):
        held.cancel()


async def _watch(held: DeploymentResponse[Any], lost: asyncio.Future[str]) -> None:
    """Waits for the end of a lease's call; one that ends with an error has lost its replica."""
    try:
        await held
    except (RayError, RayServeException, asyncio.CancelledError) as exc:
        if not lost.done():
            lost.set_result(f"the call that its lease holds ended with {type(exc).__name__}")


def _take_over_port() -> None:
    """Lets a router listen on the only port there is while the kernel remembers connections of its killed predecessor.

    Ray binds a replica's own port without SO_REUSEADDR, has no setting for that, and never again tries a port that
    was refused once (ray/serve/_private/replica.py). Where it has a range of ports it takes another one.
    """
    if constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT - constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT > 1:
        return
    start = replica.start_asgi_http_server

    async def start_again(*args: Any, **options: Any) -> Any:
        return await start(*args, **{**options, "enable_so_reuseport": True})

    replica.start_asgi_http_server = start_again


def places_of_a_router(settings: ServerSettings) -> int:
    """Requests that one router may have at each engine.

    Beside other routers that is its share, one batch at least, and some that the others may not need; where all need
    theirs, these wait inside Ray, which serves them in any order.
    """
    if settings.router_replicas == 1:
        return settings.ongoing_limit
    share = -(-settings.ongoing_limit // settings.router_replicas)
    return min(max(share, settings.max_num_seqs) + _SPARE, settings.ongoing_limit)


def router_class(settings: ServerSettings, base_model: str) -> type:
    """The class of the Router deployment; its app is built in the replica."""

    def build() -> FastAPI:
        _take_over_port()
        application = serve.get_replica_context().app_name
        open_upstream: Callable[[], RayUpstream] = lambda: RayUpstream(  # noqa: E731
            serve.get_deployment_handle(ENGINE, application),
            settings.replica_wait_s,
            settings.max_queued_requests,
            places_of_a_router(settings),
        )
        return build_app(settings, base_model, open_upstream, named_in_front=True)

    @serve.ingress(build)
    class Router:
        """Front of the application; takes the engines so that Ray deploys them with it."""

        def __init__(self, engine: DeploymentHandle[Any]) -> None:
            self.engine = engine

    return Router
