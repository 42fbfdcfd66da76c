"""Passes a request to an engine replica and its answer back, bytes as they come.

The hot path of a streamed token is one read from the engine's socket and one write to the client's: nothing is
parsed after the first event, which gets the ``act`` object; the meter searches bytes.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from starlette.types import Send
from yarl import URL

from act_serve.errors import NotReadyError
from act_serve.server import splice
from act_serve.server.answer_meter import AnswerMeter
from act_serve.server.http_errors import error_event
from act_serve.server.lease import DEAD_HEADER
from act_serve.server.lost import ReplicaLostError, until_lost
from act_serve.server.metrics import RouterMetrics
from act_serve.server.route import ANYWHERE, Route
from act_serve.server.upstream import Replica, Upstream

_log = logging.getLogger(__name__)
_ATTEMPTS = 2
_CONNECT_TIMEOUT_S = 5.0
# Below the engine server's keep-alive, so that a pooled connection is never one that is just being closed.
_KEEPALIVE_S = 30.0
_MAX_HEAD_BYTES = 1 << 20
# RFC 9110, section 7.6.1; and what this hop sets itself.
_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "host", "content-length", "date", "server", "expect", "accept-encoding"}
)

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as the engine is to see it, and what the answer gets on its way back.

    Attributes:
        method, path: of the request; the path with its query, percent-encoded, from the first slash.
        headers: the client's; those of this hop are dropped.
        body: the whole body.
        report: JSON of the ``act`` object, or None for answers to leave as they are.
        answer_headers: added to an answer that is no error.
        meter: counts such an answer; None where nothing is generated.
        route: which replica is best.
    """

    method: str
    path: str
    headers: Iterable[tuple[str, str]]
    body: bytes | None
    report: bytes | None = None
    answer_headers: tuple[tuple[bytes, bytes], ...] = ()
    meter: AnswerMeter | None = None
    route: Route = ANYWHERE


def open_session() -> aiohttp.ClientSession:
    """The connection pool to the engines; close it at the end. No limits: the replicas bound their requests."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
    return aiohttp.ClientSession(
        connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    )


@dataclass(frozen=True, slots=True)
class Forwarder:
    """Sends exchanges to the engines, once more elsewhere when a replica dies before its first byte."""

    upstream: Upstream
    session: aiohttp.ClientSession
    metrics: RouterMetrics

    async def forward(self, exchange: Exchange, send: Send) -> None:
        """Answers the client.

        Raises:
            NotReadyError: no replica answered; nothing was sent.
            OverloadedError: every queue is full; nothing was sent.
        """
        failed: list[str] = []
        for attempt in range(_ATTEMPTS):
            try:
                async with self.upstream.lease(exchange.route, failed) as replica:
                    failed.append(replica.name)
                    await self._relay(exchange, replica, send)
                    return
            except ReplicaLostError as exc:
                _log.warning("a replica failed before its first byte (attempt %d): %s", attempt + 1, exc)
                self.metrics.retries.inc()
        raise NotReadyError("the engine replica failed twice before it began to answer; try again in a few seconds")

    async def _relay(self, exchange: Exchange, replica: Replica, send: Send) -> None:
        headers = [(name, value) for name, value in exchange.headers if name.lower() not in _HOP]
        headers += replica.headers.items()
        async with _sure(replica):
            reply = await self.session.request(
                exchange.method,
                URL(replica.url + exchange.path, encoded=True),
                data=exchange.body,
                headers=headers,
                allow_redirects=False,
            )
        async with reply:
            if DEAD_HEADER in reply.headers:
                raise ReplicaLostError(f"{replica.name}: its engine is dead")
            if reply.content_type == "text/event-stream":
                await _relay_events(exchange, replica, reply, send)
            else:
                await _relay_whole(exchange, replica, reply, send)


@asynccontextmanager
async def _sure(replica: Replica) -> AsyncIterator[None]:
    """Around what needs the replica alive: any end of it is a ReplicaLostError."""
    try:
        async with until_lost(replica.lost):
            yield
    except (aiohttp.ClientError, OSError) as exc:
        raise ReplicaLostError(f"{replica.name}: {exc!r}") from exc


async def _relay_whole(exchange: Exchange, replica: Replica, reply: aiohttp.ClientResponse, send: Send) -> None:
    async with _sure(replica):
        body = await reply.read()
    if exchange.report is not None and reply.status < 400 and reply.content_type == "application/json":
        if exchange.meter is not None:
            exchange.meter.whole(body)
        body = splice.into_object(body, exchange.report)
    length = (b"content-length", str(len(body)).encode())
    await send(_start(exchange, reply, [length]))
    await send({"type": "http.response.body", "body": body})


async def _relay_events(exchange: Exchange, replica: Replica, reply: aiohttp.ClientResponse, send: Send) -> None:
    async with _sure(replica):
        pending = await _first_event(reply)
    if exchange.report is not None:
        pending = splice.into_first_event(pending, exchange.report)
    await send(_start(exchange, reply, []))
    try:
        async with _sure(replica):
            while True:
                if pending.endswith(b"\n\n"):
                    whole, pending = pending, b""
                else:
                    whole, pending = splice.whole_events(pending)
                if whole:
                    await send({"type": "http.response.body", "body": whole, "more_body": True})
                    if exchange.meter is not None:
                        exchange.meter.passed(whole)
                chunk = await reply.content.readany()
                if not chunk:
                    break
                pending = pending + chunk if pending else chunk
    except ReplicaLostError as exc:
        _log.warning("a replica failed in the middle of a stream: %s", exc)
        pending = error_event("the engine replica failed in the middle of this answer; send it again", exchange.path)
    finally:
        if exchange.meter is not None:
            exchange.meter.stream_ended()
    await send({"type": "http.response.body", "body": pending})


async def _first_event(reply: aiohttp.ClientResponse) -> bytes:
    head = b""
    while not splice.has_event(head) and len(head) < _MAX_HEAD_BYTES:
        chunk = await reply.content.readany()
        if not chunk:
            break
        head += chunk
    return head


def _start(exchange: Exchange, reply: aiohttp.ClientResponse, more: Headers) -> dict[str, object]:
    kept = [(name, value) for name, value in reply.raw_headers if name.lower().decode("latin-1") not in _HOP]
    ours = exchange.answer_headers if reply.status < 400 else ()
    headers = [*kept, *ours, *more]
    return {"type": "http.response.start", "status": reply.status, "headers": headers}


async def fetch_text(session: aiohttp.ClientSession, replica: Replica, path: str, timeout_s: float) -> str | None:
    """The body of a GET on a replica, or None when it does not answer 200 in time."""
    try:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with session.get(replica.url + path, headers=dict(replica.headers), timeout=timeout) as reply:
            return await reply.text() if reply.status == 200 else None
    except (aiohttp.ClientError, OSError):
        return None
