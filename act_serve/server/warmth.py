"""Which replicas a request would rather have: those that hold its abilities and its prompt's beginning, unless busy."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from act_serve.server.route import Route

# By how many requests a warm replica may be busier than the least busy one and still be preferred. A request costs a
# batch little; so few that what many ask for is soon on several replicas.
_SLACK = 4
# Longer than a replica takes to report what it holds (ray_app.py).
_UNTIL_REPORTED_S = 3.0
_MAX_KEYS = 65_536


@dataclass(slots=True)
class Warmth:
    """What a router knows of the replicas' memory.

    Which abilities are resident the replicas report; until then, and for the beginnings of prompts, which nobody
    reports, what was sent to them counts.

    Args:
        clock: in seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _recent: OrderedDict[tuple[str, str], float] = field(default_factory=OrderedDict)  # oldest first
    _prefixes: OrderedDict[int, set[str]] = field(default_factory=OrderedDict)  # least recently used first

    def sent(self, route: Route, replica: str) -> None:
        """Notes that a replica gets a request."""
        now_s = self.clock()
        for ability in route.abilities:
            self._recent[ability, replica] = now_s
            self._recent.move_to_end((ability, replica))
        while self._recent and next(iter(self._recent.values())) < now_s - _UNTIL_REPORTED_S:
            self._recent.popitem(last=False)
        for key in route.prefix:
            self._prefixes.setdefault(key, set()).add(replica)
            self._prefixes.move_to_end(key)
        while len(self._prefixes) > _MAX_KEYS:
            self._prefixes.popitem(last=False)

    def rank(self, route: Route, loads: Mapping[str, int], resident: Mapping[str, Collection[str]]) -> list[list[str]]:
        """Groups of replicas, the best first; within a group the least busy is best.

        Args:
            route: of the request.
            loads: requests that each candidate works on.
            resident: the abilities that each candidate last reported.
        """
        if not loads:
            return []
        least = min(loads.values())
        near = [name for name, load in loads.items() if load <= least + _SLACK]
        able = [name for name in near if all(self._has(name, a, resident.get(name, ())) for a in route.abilities)]
        warm = self._warm(route, able)
        return [group for group in (warm, able if route.abilities else [], [*loads]) if group]

    def _has(self, replica: str, ability: str, reported: Collection[str]) -> bool:
        since_s = self.clock() - _UNTIL_REPORTED_S
        return ability in reported or self._recent.get((ability, replica), float("-inf")) >= since_s

    def _warm(self, route: Route, able: Collection[str]) -> list[str]:
        for key in reversed(route.prefix):
            if found := self._prefixes.get(key, set()).intersection(able):
                return sorted(found)
        return []


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request gives to its choice of a replica; it stays in the process.

    Attributes:
        route: of the request.
        avoid: replicas that have just failed; taken only where there is no other.
        warmth: what the asking router knows of the replicas.
        count: takes the number of replicas, from any thread.
    """

    route: Route
    avoid: Collection[str]
    warmth: Warmth
    count: Callable[[int], None]
