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


@dataclass(slots=True, eq=False)
class _Place(Generic[Key]):
    """A request in the queue.

    Attributes:
        lacked: what was not resident when it came.
        error: of a load of the same abilities that has failed since.
    """

    lacked: list[Key]
    error: Exception | None = None


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

    A request whose abilities are resident starts at once, and one that idle abilities make room for as soon as they are
    loaded. Others queue in order of arrival; the first in the queue marks the least recently used abilities that it
    needs the room of as closing, so that a steady stream of requests for them cannot keep it waiting. Meanwhile nobody
    takes what it waits for, but whatever else there is. Running requests never wait, so the queue always moves. A load
    that fails fails all that wait for the same abilities, so that these do not try it again one after the other.

    Args:
        max_bytes: budget of all resident abilities.
        evict: called for each ability that must leave, when no request uses it.
        pinned: says which abilities never leave.
    """

    max_bytes: int
    evict: Callable[[Key], Awaitable[None]]
    pinned: Callable[[Iterable[Key]], Collection[Key]] = lambda _: ()
    _seats: dict[Key, _Seat] = field(default_factory=dict)  # least recently used first
    _waiting: dict[_Place[Key], Mapping[Key, int]] = field(default_factory=dict)  # in order of arrival, with its sizes
    _first: Mapping[Key, int] = field(default_factory=dict)  # what the first of them makes room for
    _room: asyncio.Lock = field(default_factory=asyncio.Lock)  # of who makes room at once, or loads into it
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

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
        nobody, waiting = _Seat(0), Counter(chain.from_iterable(place.lacked for place in self._waiting))
        seats = {key: self._seats.get(key, nobody) for key in {*self._seats, *waiting}}
        return {key: Occupancy(s.size, s.users, waiting[key], s.closing) for key, s in seats.items()}

    async def take(self, sizes: Mapping[Key, int], load: Callable[[], Awaitable[None]]) -> None:
        """Waits until the abilities are resident, and keeps them so until :meth:`leave`.

        Args:
            sizes: bytes of each ability that the request uses, by key.
            load: makes the ones that are not resident so; called at most once, when there is room.

        Raises:
            RequestError: they need more than there is beside the pinned ones; and whatever ``load`` raises.
        """
        if self.ready(sizes):
            self._use(sizes)
            return
        self.check(sizes)
        place = _Place([key for key in sizes if not self.ready([key])])
        self._waiting[place] = sizes
        try:
            while not await self._without_waiting(place, load):
                if self._is_first(place):
                    await self._as_first(place, load)
                    break
                await self._change()
            self._use(sizes)
        finally:
            if self._is_first(place):
                self._changed.set()
            del self._waiting[place]

    def leave(self, sizes: Mapping[Key, int]) -> None:
        """Ends what :meth:`take` began."""
        for key in sizes:
            self._seats[key].users -= 1
            if not self._seats[key].users:
                self._changed.set()

    def ready(self, keys: Iterable[Key]) -> bool:
        """Whether all are resident, and none is about to leave."""
        return all(key in self._seats and not self._seats[key].closing for key in keys)

    def _use(self, sizes: Mapping[Key, int]) -> None:
        for key in sizes:
            seat = self._seats[key] = self._seats.pop(key)
            seat.users += 1

    def check(self, sizes: Mapping[Key, int]) -> None:
        """Raises RequestError where they need more than there is beside the pinned ones."""
        staying = [key for key in self.pinned(self._seats) if key not in sizes]
        taken = sum(self._seats[key].size for key in staying)
        if sum(sizes.values()) > self.max_bytes - taken:
            # Their names are nobody's business who may not use them.
            beside = f", {taken / 2**20:.1f} MiB of that for {len(staying)} pinned ones" if staying else ""
            raise RequestError(
                f"the request's abilities need {sum(sizes.values()) / 2**20:.1f} MiB together, and this engine keeps "
                f"at most {self.max_bytes / 2**20:.1f} MiB resident{beside}; use fewer at once, "
                f"{'unpin some, ' if staying else ''}or raise max_resident_bytes",
                param="abilities",
            )

    async def _without_waiting(self, place: _Place[Key], load: Callable[[], Awaitable[None]]) -> bool:
        """Loads what is missing where idle abilities make the room for it; says whether all is resident now."""
        sizes = self._waiting[place]
        if not self._settled(place) and self._idle_victims(sizes) is None:
            return False  # without the lock, as all that wait ask this after every change
        async with self._room:
            if self._settled(place):
                return True
            leaving = self._idle_victims(sizes)
            if leaving is None:
                return False
            self._mark(leaving, closing=True)
            try:
                while leaving:
                    await self._remove(leaving.pop(0))
                await self._load(sizes, load)
            finally:
                self._mark(leaving, closing=False)
                self._changed.set()
            return True

    def _idle_victims(self, sizes: Mapping[Key, int]) -> list[Key] | None:
        """Which abilities make the room without anybody waiting; None where they are too few."""
        if any(key in self._seats and self._seats[key].closing for key in sizes):
            return None  # the one that closed it is ahead
        idle = (key for key, seat in self._seats.items() if not (seat.users or seat.closing or key in self._first))
        return self._victims(sizes, idle)

    async def _as_first(self, place: _Place[Key], load: Callable[[], Awaitable[None]]) -> None:
        """Waits until those leave whose room is needed, and loads what is missing."""
        sizes = self._waiting[place]
        leaving: list[Key] = []
        try:
            while True:
                async with self._room:
                    if self._settled(place):
                        return
                    self.check(sizes)  # something may have been pinned meanwhile
                    leaving = self._choose(sizes, leaving)
                    # Looked for again after each: one that is left meanwhile would change nothing any more.
                    while idle := [key for key in leaving if not self._seats[key].users]:
                        leaving.remove(idle[0])
                        await self._remove(idle[0])
                    if not leaving:
                        await self._load(sizes, load)
                        return
                await self._change()
        finally:
            self._first = {}
            self._mark(leaving, closing=False)

    def _choose(self, sizes: Mapping[Key, int], before: list[Key]) -> list[Key]:
        """Marks what leaves for the first in the queue, and lets in again what was marked before and stays after all.

        Idle ones alone where they are enough by now. Else what was marked stays so: whatever becomes idle and is not
        enough is left to others.
        """
        self._first = {}
        self._mark(before, closing=False)
        leaving = self._victims(sizes, (key for key, seat in self._seats.items() if not seat.users))
        if leaving is None and not self.pinned(before):
            leaving = before
        if not leaving:  # idle ones first; each in order of their last use
            leaving = self._victims(sizes, sorted(self._seats, key=lambda key: self._seats[key].users > 0)) or []
        self._mark(leaving, closing=True)
        self._first = sizes
        if not set(before) <= set(leaving):
            self._changed.set()
        return leaving

    def _mark(self, keys: Iterable[Key], *, closing: bool) -> None:
        """Lets nobody in where they leave, and everybody again where what they should have made room for gave up."""
        for key in keys:
            if key in self._seats:
                self._seats[key].closing = closing

    def _is_first(self, place: object) -> bool:
        return next(iter(self._waiting)) is place

    async def _change(self) -> None:
        """Waits until an ability is idle, a load has ended, or the first in the queue is another one."""
        self._changed.clear()
        await self._changed.wait()

    def _victims(self, sizes: Mapping[Key, int], candidates: Iterable[Key]) -> list[Key] | None:
        """Which of the candidates, in their order, make the room that is lacking; None where all are too few."""
        lacking = self._missing(sizes) - self._free()
        pinned, found = self.pinned(self._seats), []
        for key in candidates:
            if lacking <= 0:
                break
            if key not in sizes and key not in pinned:
                found.append(key)
                lacking -= self._seats[key].size
        return found if lacking <= 0 else None

    def _free(self) -> int:
        """Bytes that nobody has, nor the first in the queue waits for."""
        closing = sum(seat.size for seat in self._seats.values() if seat.closing)
        return self.max_bytes - self.bytes - max(self._missing(self._first) - closing, 0)

    def _missing(self, sizes: Mapping[Key, int]) -> int:
        return sum(size for key, size in sizes.items() if key not in self._seats)

    async def _remove(self, key: Key) -> None:
        del self._seats[key]
        await self.evict(key)

    def _settled(self, place: _Place[Key]) -> bool:
        """Whether all is resident; raises where it is not, and the same load has failed since the request came."""
        if self.ready(self._waiting[place]):
            return True
        if place.error is not None:
            raise place.error
        return False

    async def _load(self, sizes: Mapping[Key, int], load: Callable[[], Awaitable[None]]) -> None:
        try:
            await load()
        except Exception as exc:
            for place, wanted in self._waiting.items():
                if wanted.keys() == sizes.keys():
                    place.error = exc
            raise
        finally:
            self._changed.set()
        for key, size in sizes.items():
            self._seats.setdefault(key, _Seat(size)).closing = False
