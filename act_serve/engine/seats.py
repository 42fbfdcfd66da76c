"""Who may be resident: a byte budget shared fairly by the requests in flight."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, TypeVar

from act_serve.errors import RequestError

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class _Seat:
    size: int
    users: int = 0
    closing: bool = False


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How one ability is used at this moment.

    Attributes:
        size: bytes that it takes; 0 is not resident.
        users: requests that run with it.
        waiting: requests that wait for it.
        closing: whether it must leave once its users have.
    """

    size: int
    users: int
    waiting: int
    closing: bool


@dataclass(slots=True)
class Seats(Generic[Key]):
    """Keeps the abilities of running requests resident, and within ``max_bytes``.

    A request whose abilities are resident starts at once. Others queue, one at a time in order of arrival; the first
    in the queue marks the least recently used abilities that it needs the room of as closing, so that a steady stream
    of requests for them cannot keep it waiting. Running requests never wait, so the queue always moves.

    Args:
        max_bytes: budget of all resident abilities.
        evict: called for each ability that must leave, when no request uses it.
        pinned: says which abilities leave only when the others do not make enough room.
    """

    max_bytes: int
    evict: Callable[[Key], Awaitable[None]]
    pinned: Callable[[Iterable[Key]], Collection[Key]] = lambda _: ()
    _seats: dict[Key, _Seat] = field(default_factory=dict)  # least recently used first
    _waiting: list[list[Key]] = field(default_factory=list)  # of each request, what it lacked when it came
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def bytes(self) -> int:
        """Bytes of the resident abilities."""
        return sum(seat.size for seat in self._seats.values())

    @property
    def waiting(self) -> int:
        """Requests whose abilities are not resident yet."""
        return len(self._waiting)

    def __len__(self) -> int:
        return len(self._seats)

    def __contains__(self, key: Key) -> bool:
        return key in self._seats

    def occupancy(self) -> dict[Key, Occupancy]:
        """Every ability that is resident or waited for."""
        nobody, waiting = _Seat(0), Counter(chain.from_iterable(self._waiting))
        seats = {key: self._seats.get(key, nobody) for key in {*self._seats, *waiting}}
        return {key: Occupancy(s.size, s.users, waiting[key], s.closing) for key, s in seats.items()}

    async def take(self, sizes: Mapping[Key, int], load: Callable[[], Awaitable[None]]) -> None:
        """Waits until the abilities are resident, and keeps them so until :meth:`leave`.

        Args:
            sizes: bytes of each ability that the request uses, by key.
            load: makes the ones that are not resident so; called at most once, when there is room.

        Raises:
            RequestError: they need more than the whole budget; and whatever ``load`` raises.
        """
        if self._ready(sizes):
            self._use(sizes)
            return
        if sum(sizes.values()) > self.max_bytes:
            raise RequestError(
                f"the request's abilities need {sum(sizes.values()) / 2**20:.1f} MiB together, and this engine keeps "
                f"at most {self.max_bytes / 2**20:.1f} MiB resident; use fewer at once, or raise max_resident_bytes",
                param="abilities",
            )
        missing = [key for key in sizes if not self._ready([key])]
        self._waiting.append(missing)
        try:
            async with self._turn:
                if not self._ready(sizes):
                    await self._make_room(sizes)
                    await load()
                    for key, size in sizes.items():
                        self._seats.setdefault(key, _Seat(size)).closing = False
                self._use(sizes)
        finally:
            self._waiting.remove(missing)

    def leave(self, sizes: Mapping[Key, int]) -> None:
        """Ends what :meth:`take` began."""
        for key in sizes:
            self._seats[key].users -= 1
        self._left.set()

    def _ready(self, keys: Iterable[Key]) -> bool:
        return all(key in self._seats and not self._seats[key].closing for key in keys)

    def _use(self, sizes: Mapping[Key, int]) -> None:
        for key in sizes:
            seat = self._seats[key] = self._seats.pop(key)
            seat.users += 1

    async def _make_room(self, sizes: Mapping[Key, int]) -> None:
        missing = sum(size for key, size in sizes.items() if key not in self._seats)
        victims, room = [], self.max_bytes - self.bytes
        pinned = self.pinned(self._seats)
        # Idle ones first, then those in use, pinned ones last; each in order of their last use.
        for key, seat in sorted(self._seats.items(), key=lambda item: (item[0] in pinned, item[1].users > 0)):
            if room >= missing:
                break
            if key not in sizes:
                victims.append(key)
                room += seat.size
                seat.closing = True
        try:
            for key in victims:
                while self._seats[key].users:
                    self._left.clear()
                    await self._left.wait()
                del self._seats[key]
                await self.evict(key)
        finally:
            for key in victims:  # a request that gave up waiting must not leave them closed
                if key in self._seats:
                    self._seats[key].closing = False
