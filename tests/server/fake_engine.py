"""An HTTP server that stands where an engine does and shows what the router sent, how it streams and how it dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from act_serve.delta.composition import Composition
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.held import HELD_PATH, Held
from act_serve.engine.settings import MODEL_HEADER
from act_serve.server.lease import DEAD_HEADER


class FakeEngine:
    """Records requests; the body's ``fake`` field says how to answer."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.cancelled = threading.Event()
        self.held: list[Held] = []
        self.url = ""
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route(f"{HELD_PATH}/{{name}}", self._held),
                Route("/{path:path}", self._answer, methods=["GET", "POST", "DELETE"]),
            ]
        )

    def resident(self) -> list[str]:
        """All abilities that it was ever asked for."""
        models = [headers[MODEL_HEADER] for _, headers, _ in self.requests if MODEL_HEADER in headers]
        compositions = [Composition.parse(model.rpartition(":")[2]) for model in models]
        return sorted({str(AbilityKey.of(ability)) for each in compositions for ability in each.abilities})

    async def check_health(self) -> None:
        """As vLLM's engine client has it."""

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _held(self, request: Request) -> Response:
        return JSONResponse([asdict(held) for held in self.held])

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse('# HELP m help\n# TYPE m counter\nm{a="1"} 2.0\nplain 3\n')

    async def _answer(self, request: Request) -> Response:
        raw = await request.body()
        body = json.loads(raw) if request.headers.get("content-type") == "application/json" else raw.decode()
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        self.requests.append((target, dict(request.headers), body))
        how = body.get("fake", "") if isinstance(body, dict) else ""
        if how == "error":
            return JSONResponse({"error": {"message": "the engine's own words", "code": 400}}, 400)
        if how == "busy":
            return JSONResponse({"error": {"message": "starting"}}, 503)
        if how == "dead engine":
            return JSONResponse({"error": {"message": "EngineCore died"}}, 500, {DEAD_HEADER: "1"})
        if how == "hang":
            await asyncio.sleep(60)
        if how == "slow":
            await asyncio.sleep(0.5)
            return JSONResponse({"id": "x"})
        if how == "kill one":
            if _only_once(raw):
                os.kill(os.getpid(), signal.SIGKILL)
            return JSONResponse({"id": "x"})
        if how == "usage":
            return JSONResponse({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}})
        if how == "array":
            return JSONResponse([1, 2])
        if how:
            return StreamingResponse(self._stream(how), 200, {"x-process": str(os.getpid())}, "text/event-stream")
        return JSONResponse({"id": "x", "model": body.get("model") if isinstance(body, dict) else None})

    async def _stream(self, how: str) -> AsyncIterator[bytes]:
        try:
            if how == "hang in the head":
                await asyncio.sleep(60)
            if how == "die at once":
                raise ConnectionError
            if how == "split head":
                yield b"da"
                await asyncio.sleep(0.05)
                yield b'ta: {"n": 0}\n\n'
            else:
                yield b'data: {"n": 0}\n\n'
            for n in range(1, 4 if how != "endless" else 1_000_000):
                await asyncio.sleep(0.02)
                if how == "hang in the middle" and n == 2:
                    await asyncio.sleep(60)
                if how == "die" and n == 2:
                    yield b'data: {"n": 2'
                    raise ConnectionError
                yield f'data: {{"n": {n}}}\n\n'.encode()
            if how == "stream with usage":
                yield b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":9}}\n\n'
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise


def _only_once(raw: bytes) -> bool:
    """Whether no process has been asked this body before; the body names the file that remembers."""
    try:
        os.close(os.open(json.loads(raw)["once"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@contextmanager
def serving(app: Any, log_level: str = "critical") -> Iterator[str]:
    """Runs an ASGI app on a free port of this machine; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level=log_level, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def fake_engine() -> Iterator[FakeEngine]:
    """A running fake engine."""
    engine = FakeEngine()
    with serving(engine.app) as engine.url:
        yield engine
