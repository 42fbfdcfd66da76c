"""The seam between the router and the engines: how a request gets a replica, and what a replica is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from act_serve.server.route import Route


@dataclass(frozen=True, slots=True)
class Replica:
    """Where one engine replica answers.

    Attributes:
        name: stable while the replica lives; labels its metrics.
        url: scheme, host and port of its HTTP server.
        headers: what it demands of whoever calls it.
        lost: done, with the reason, once the replica can no longer finish the request of this lease; None where
            nobody watches it.
    """

    name: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    lost: asyncio.Future[str] | None = None


class Upstream(Protocol):
    """Picks engine replicas and keeps count of what each is working on."""

    def lease(self, route: Route, avoid: Collection[str] = ()) -> AbstractAsyncContextManager[Replica]:
        """A replica for one request; it counts as busy with it until the context ends.

        Args:
            route: whose turn the request takes, and which replicas it would rather have.
            avoid: names of replicas that have just failed; taken only where there is no other.

        Raises:
            NotReadyError: no replica is alive.
            OverloadedError: every queue is full.
        """

    @property
    def waiting(self) -> int:
        """Requests that wait for a replica."""

    async def replicas(self) -> Sequence[Replica]:
        """All replicas, those too that have stopped answering a moment ago."""


class FixedUpstream:
    """Always the same replica: for one engine without Ray, and for tests."""

    waiting = 0

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    @asynccontextmanager
    async def lease(self, route: Route, avoid: Collection[str] = ()) -> AsyncIterator[Replica]:
        """The replica."""
        yield self._replica

    async def replicas(self) -> Sequence[Replica]:
        """The replica."""
        return [self._replica]
