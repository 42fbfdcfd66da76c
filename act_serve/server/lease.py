"""Leases: what makes a request that arrives over plain HTTP count as work of a replica.

The router holds a call open for every request, under an id that the request carries in a header. The replica
ends the call when the HTTP request ends, however that happens, so neither a vanished router nor a vanished
client can leave a replica busy for ever.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEASE_HEADER = "x-act-lease"
TOKEN_HEADER = "x-act-token"
# On an answer that is none, because the engine behind it is dead; a status alone cannot say that.
DEAD_HEADER = "x-act-engine-dead"
# A lease whose request does not arrive: the router died in between, or could not connect.
UNCLAIMED_S = 30.0
# How long an answer waits for its lease. One that does not come was refused by Ray, and the router knows.
UNHELD_S = 5.0


@dataclass(frozen=True, slots=True)
class _Lease:
    held: asyncio.Event = field(default_factory=asyncio.Event)
    claimed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Leases:
    """The leases of one replica, and the gate that only requests with its token pass.

    Args:
        app: vLLM's app.
        token: what every request must carry; the replica tells it to the routers through Ray.
        dead: whether the engine can answer nothing any more.
    """

    def __init__(self, app: ASGIApp, token: str, dead: Callable[[], bool] = lambda: False) -> None:
        self._app, self._token, self._dead = app, token.encode(), dead
        self._leases: dict[str, _Lease] = {}

    async def hold(self, lease: str) -> None:
        """Returns when the request with this lease has ended, or did not begin for half a minute."""
        found = self._leases.setdefault(lease, _Lease())
        found.held.set()
        try:
            try:
                await asyncio.wait_for(found.ended.wait(), UNCLAIMED_S)
            except TimeoutError:
                if found.claimed.is_set():
                    await found.ended.wait()
        finally:
            self._leases.pop(lease, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app, for requests with the token; any other gets 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(TOKEN_HEADER.encode(), b""), self._token):
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"ask the router, not the engine"})
            return
        lease = headers.get(LEASE_HEADER.encode(), b"").decode("latin-1")
        if not lease:
            await self._app(scope, receive, send)
            return
        found = self._leases.setdefault(lease, _Lease())
        found.claimed.set()
        try:
            await self._app(scope, receive, _Marked(send, self._dead, found.held))
        finally:
            found.ended.set()
            # For a call that never comes, because its router died.
            asyncio.get_running_loop().call_later(UNCLAIMED_S, self._leases.pop, lease, None)


class _Marked:
    """An ASGI send that marks the answers of a dead engine.

    A streamed answer's head is kept back until its first bytes: only then is it known whether the engine gave them. It
    waits for its lease, too, without which Ray may end the replica in the middle of the answer: a router that learns
    that a call was refused asks another replica, as long as nothing has come.
    """

    __slots__ = ("_dead", "_head", "_held", "_send")

    def __init__(self, send: Send, dead: Callable[[], bool], held: asyncio.Event) -> None:
        self._send, self._dead, self._held = send, dead, held
        self._head: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            return
        if self._head is not None:
            if not self._held.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._held.wait(), UNHELD_S)
            head, self._head = self._head, None
            if self._dead() and _may_be_broken(head):
                head = {**head, "headers": [*head["headers"], (DEAD_HEADER.encode(), b"1")]}
            await self._send(head)
        await self._send(message)


def _may_be_broken(head: Message) -> bool:
    """A whole answer with a good status was finished before the engine died; a stream's status says nothing."""
    kinds = [value for name, value in head["headers"] if name.lower() == b"content-type"]
    return head["status"] >= 500 or any(kind.startswith(b"text/event-stream") for kind in kinds)
