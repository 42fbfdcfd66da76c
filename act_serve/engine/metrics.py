"""What an engine says about its abilities on vLLM's own metrics page; routers add the label ``replica``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from act_serve.engine.seats import Seats

_LOAD_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class AbilityMetrics:
    """One engine's, in a registry of their own.

    Args:
        seats: of the engine; read whenever the page is asked for.
    """

    def __init__(self, seats: Seats[Any]) -> None:
        self.registry = CollectorRegistry()
        self._gauge("act_resident_abilities", "Abilities in memory.").set_function(lambda: len(seats))
        self._gauge("act_resident_bytes", "Bytes of the abilities in memory.").set_function(lambda: seats.bytes)
        self._gauge("act_resident_bytes_limit", "The setting max_resident_bytes.").set(seats.max_bytes)
        self._gauge(
            "act_compositions_waiting", "Requests that wait for room or for a load of their abilities."
        ).set_function(lambda: seats.waiting)
        self.loads = Counter(
            "act_ability_loads_total", "Abilities made resident, ahead of requests too.", registry=self.registry
        )
        self.evictions = Counter(
            "act_ability_evictions_total", "Abilities that left to make room.", registry=self.registry
        )
        self.load_seconds = Histogram(
            "act_ability_load_seconds",
            "One load of all that a request lacked, from the disk to the last worker.",
            buckets=_LOAD_BUCKETS_S,
            registry=self.registry,
        )

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(name, what, registry=self.registry)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Puts them on the page that vLLM's app shows, which is that of this process, until the context ends."""
        REGISTRY.register(self.registry)
        try:
            yield
        finally:
            REGISTRY.unregister(self.registry)
