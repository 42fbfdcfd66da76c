"""The Engine deployment: vLLM's app on an HTTP port of the replica's own, its load and health known to Ray.

Answers go from that port to the router as plain HTTP. Ray's handles stream every item as an object of its own,
which costs more per token than the model of a small server does (ray-project/ray#59681).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import ray
import uvicorn
from ray import serve

from act_serve.abilities.location import absolute
from act_serve.server.config import ServerSettings
from act_serve.server.lease import TOKEN_HEADER, Leases
from act_serve.server.model_source import model_folder

_log = logging.getLogger(__name__)
ENGINE = "Engine"
# In a replica's report: the abilities that it has in memory.
RESIDENT = "resident"
_KEEP_ALIVE_S = 120


class Engine:
    """One engine replica.

    Args:
        settings: of the server.
        folder: of the base checkpoint; None is the embedded model.
        name: that clients use for the base.
    """

    async def __init__(self, settings: ServerSettings, folder: Path | None, name: str) -> None:  # type: ignore[misc]
        # Ray sets it to the replica's CPUs, often 1; vLLM chooses its threads itself.
        os.environ.pop("OMP_NUM_THREADS", None)
        if settings.otlp_endpoint:  # vLLM's default is gRPC (vllm/tracing/otel.py)
            os.environ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"
        from act_serve.engine.app import engine_app
        from act_serve.engine.settings import EngineSettings

        base = await asyncio.to_thread(model_folder, folder)
        engine = EngineSettings(
            model=str(base),
            served_model_name=name,
            store=absolute(settings.store),
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            enforce_eager=settings.enforce_eager,
            kv_cache_gib=settings.kv_cache_gib,
            max_resident_bytes=settings.max_resident_bytes,
            abilities_per_request=settings.abilities_per_request,
            engine_args=_engine_args(settings),
        )
        self._token = secrets.token_urlsafe(24)
        self._exit = AsyncExitStack()
        app = await self._exit.enter_async_context(engine_app(engine))
        self._app = app
        self._leases = Leases(app, self._token, lambda: app.state.engine_client.errored)
        await self._listen(settings.engine_host or ray.util.get_node_ip_address())

    async def _listen(self, host: str) -> None:
        listener = socket.socket()
        listener.bind((host, 0))
        _, port = listener.getsockname()
        self._url = f"http://{host}:{port}"
        config = uvicorn.Config(
            self._leases, log_level="warning", access_log=False, timeout_keep_alive=_KEEP_ALIVE_S, lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._app.state.server = self._server  # vLLM stops it when its engine has died
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        self._serving.add_done_callback(_end_process)

    def record_replica_metadata(self) -> dict[str, str]:
        """What Ray tells the routers about this replica, once it is ready."""
        return {"url": self._url, "token": self._token}

    async def record_routing_stats(self) -> dict[str, list[str]]:
        """What Ray tells the routers from time to time."""
        seats = self._app.state.compositions.seats.occupancy()
        return {RESIDENT: [str(key) for key, seat in seats.items() if seat.size and not seat.closing]}

    async def address(self) -> dict[str, str]:
        """The same with the replica's id, for those who ask all replicas."""
        return {**self.record_replica_metadata(), "name": serve.get_replica_context().replica_tag}

    async def hold(self, lease: str) -> None:
        """Stays open while the request with this lease runs, so that Ray counts it."""
        await self._leases.hold(lease)

    async def check_health(self) -> None:
        """Raises when the engine's process is dead; the replica ends then, and Ray replaces it."""
        try:
            await self._app.state.engine_client.check_health()
        except Exception:
            self._server.should_exit = True
            raise

    async def __del__(self) -> None:
        if hasattr(self, "_server"):  # Ray calls this after a failed start, too
            self._serving.remove_done_callback(_end_process)
            self._server.should_exit = True
            await self._exit.aclose()


def _end_process(serving: asyncio.Task[None]) -> None:
    """Ends a replica whose server vLLM has stopped because the engine is dead.

    Ray would replace it after three health checks. Until then it refuses requests so fast that it looks like the least
    busy one, and gets most of them, second attempts too.
    """
    _log.error("the engine is dead; this replica ends so that Ray replaces it")
    os._exit(1)


def _engine_args(settings: ServerSettings) -> dict[str, Any]:
    args = dict(settings.engine_args)
    if settings.tool_call_parser:
        args |= {"enable_auto_tool_choice": True, "tool_call_parser": settings.tool_call_parser}
    if settings.otlp_endpoint:
        args["otlp_traces_endpoint"] = settings.otlp_endpoint
    return args


def replica_headers(token: str) -> dict[str, str]:
    """What a replica demands of whoever calls its port."""
    return {TOKEN_HEADER: token}
