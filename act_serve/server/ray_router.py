"""The Router deployment, and how it asks Ray for engine replicas."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve._private import constants, replica
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from act_serve.errors import NotReadyError, OverloadedError
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.lease import LEASE_HEADER
from act_serve.server.ray_engine import ENGINE, replica_headers
from act_serve.server.upstream import Replica

_log = logging.getLogger(__name__)
_PROBE_TIMEOUT_S = 2.0
_END_TIMEOUT_S = 5.0
# How long a second attempt looks for a replica other than the one that failed, and how often.
_OTHER_S = 2.0
_OTHER_POLL_S = 0.1


class RayUpstream:
    """Engine replicas through a deployment handle.

    Args:
        handle: of the Engine deployment.
        wait_s: how long a request may wait for a replica.
    """

    def __init__(self, handle: DeploymentHandle[Any], wait_s: float) -> None:
        self._handle = handle
        self._hold = handle.hold
        self._wait_s = wait_s
        self._ending: set[asyncio.Task[None]] = set()
        self._listed: dict[str, Replica] = {}

    @asynccontextmanager
    async def lease(self, avoid: Collection[str] = ()) -> AsyncIterator[Replica]:
        """Reserves a slot on the least busy of two replicas; Ray skips full ones, and dead ones once it knows."""
        lease = uuid.uuid4().hex
        try:
            async with asyncio.timeout(self._wait_s):
                choice, selection = await self._choose(lease, avoid)
        except TimeoutError:
            raise NotReadyError(f"no engine replica was free within {self._wait_s:g} s; try again later") from None
        except BackPressureError as exc:
            raise OverloadedError("every engine's queue is full; try again in a moment") from exc
        except DeploymentUnavailableError as exc:
            raise NotReadyError("the engines are not available; see the server's log") from exc
        held = self._hold.dispatch(selection, lease)
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        watch = asyncio.create_task(_watch(held, lost))
        address = selection.replica_metadata
        headers = {**replica_headers(address["token"]), LEASE_HEADER: lease}
        try:
            yield Replica(selection.replica_id, address["url"], headers, lost)
        except BaseException:
            held.cancel()
            raise
        finally:  # the client has its answer by now and must not wait for Ray's bookkeeping
            ending = asyncio.create_task(_end(held, watch, choice))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def _choose(self, lease: str, avoid: Collection[str]) -> tuple[AbstractAsyncContextManager[Any], Any]:
        deadline = asyncio.get_running_loop().time() + _OTHER_S
        while True:
            choice = self._hold.choose_replica(lease)
            selection = await choice.__aenter__()
            if selection.replica_id not in avoid or asyncio.get_running_loop().time() > deadline:
                return choice, selection
            await choice.__aexit__(None, None, None)
            await asyncio.sleep(_OTHER_POLL_S)

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


async def _watch(held: DeploymentResponse[Any], lost: asyncio.Future[str]) -> None:
    """Waits for the end of a lease's call; one that ends with an error has lost its replica."""
    try:
        await held
    except (RayError, RayServeException, asyncio.CancelledError) as exc:
        if not lost.done():
            lost.set_result(f"the call that its lease holds ended with {type(exc).__name__}")


async def _end(
    held: DeploymentResponse[Any], watch: asyncio.Task[None], choice: AbstractAsyncContextManager[Any]
) -> None:
    done, _ = await asyncio.wait({watch}, timeout=_END_TIMEOUT_S)
    if not done:
        held.cancel()
        await asyncio.wait({watch}, timeout=_END_TIMEOUT_S)
    await choice.__aexit__(None, None, None)


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


def router_class(settings: ServerSettings, base_model: str) -> type:
    """The class of the Router deployment; its app is built in the replica."""

    def build() -> FastAPI:
        _take_over_port()
        application = serve.get_replica_context().app_name
        open_upstream: Callable[[], RayUpstream] = lambda: RayUpstream(  # noqa: E731
            serve.get_deployment_handle(ENGINE, application), settings.replica_wait_s
        )
        return build_app(settings, base_model, open_upstream, named_in_front=True)

    @serve.ingress(build)
    class Router:
        """Front of the application; takes the engines so that Ray deploys them with it."""

        def __init__(self, engine: DeploymentHandle[Any]) -> None:
            self.engine = engine

    return Router
