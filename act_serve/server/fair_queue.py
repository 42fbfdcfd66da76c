"""Places at the engines: groups of requests that wait for one are served in turn, whatever their numbers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

from act_serve.errors import OverloadedError


class FairQueue:
    """So many requests at a time as the engines have places, and groups take turns.

    While there are places, nobody waits. Where there are none, the first of each group waits for the first of the other
    groups at most, so that ten thousand requests for one composition do not hold up one for another. A full queue
    refuses the newest request of the group that has the most.

    Args:
        max_waiting: requests that may wait.
        places: requests that may be with the engines.
    """

    def __init__(self, max_waiting: int, places: int) -> None:
        self._max_waiting, self._places, self._taken = max_waiting, places, 0
        self._groups: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # whose turn it is first

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._groups.values()))

    def resize(self, places: int) -> None:
        """Changes the number of places; with fewer, those who have one keep it."""
        self._places = places
        self._give_places()

    async def enter(self, group: str) -> None:
        """Waits for a place, which must be given back with :meth:`leave`.

        Raises:
            OverloadedError: too many wait, and this group has the most.
        """
        if self._taken < self._places:
            self._taken += 1
            return
        self._make_room(group)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._groups.setdefault(group, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._give_up(group, turn)
            elif turn.exception() is None:  # it had been given its place, too
                self.leave()
            raise

    def leave(self) -> None:
        """Gives a place back."""
        self._taken -= 1
        self._give_places()

    def _give_places(self) -> None:
        while self._groups and self._taken < self._places:
            group, line = next(iter(self._groups.items()))
            turn = line.popleft()
            self._groups.move_to_end(group)
            if not line:
                del self._groups[group]
            if not turn.done():  # one that has just given up is still in its line
                turn.set_result(None)
                self._taken += 1

    def _make_room(self, group: str) -> None:
        if self.waiting < self._max_waiting:
            return
        longest = max(self._groups, key=lambda name: len(self._groups[name]), default=group)
        refusal = OverloadedError("every engine's queue is full; try again in a moment")
        if longest == group or len(self._groups[longest]) <= len(self._groups.get(group, ())) + 1:
            raise refusal
        newest = self._groups[longest][-1]
        self._give_up(longest, newest)
        if not newest.done():
            newest.set_exception(refusal)

    def _give_up(self, group: str, turn: asyncio.Future[None]) -> None:
        line = self._groups.get(group)
        if line is not None and turn in line:
            line.remove(turn)
            if not line:
                del self._groups[group]
