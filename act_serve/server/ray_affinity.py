"""Ray Serve's request router for the engines: the least busy replica that is warm for a request.

https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html. Ray pickles this module by value: its
classes in a router's process are not those that one imports from here, so what both must know lies elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from act_serve.server.ray_engine import RESIDENT
from act_serve.server.warmth import Ask


class AffinityRouter(RequestRouter):
    """Tries the groups of :meth:`Warmth.rank` in turn; Ray takes the least busy one that is not full of each."""

    _counted = 0
    _count: Callable[[int], None] | None = None

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """As Ray's; a request that was not sent with an :class:`Ask` may get any replica."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # between two rounds
        if not pending_request.args or not isinstance(pending_request.args[0], Ask):
            return [candidate_replicas]
        ask: Ask = pending_request.args[0]
        self._count = ask.count
        self._tell(len(candidate_replicas))
        others = [r for r in candidate_replicas if r.replica_id.unique_id not in ask.avoid] or candidate_replicas
        replicas = {r.replica_id.unique_id: r for r in random.sample(others, k=len(others))}  # so that ties spread
        # One whose load is not known counts as idle; Ray asks for its load before it takes it, and knows it then.
        loads = {name: self.replica_queue_len_cache.get(r.replica_id) or 0 for name, r in replicas.items()}
        resident = {name: r.routing_stats.get(RESIDENT, ()) for name, r in replicas.items()}
        return [[replicas[name] for name in group] for group in ask.warmth.rank(ask.route, loads, resident)]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """As Ray's; a new engine has places before anybody asks for one."""
        super().update_replicas(replicas)
        self._tell(len(replicas))

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """As Ray's, which learns a replica's load when that has reserved a place: many may be chosen until then."""
        replica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        self.on_send_request(replica.replica_id)
        return replica

    def _tell(self, replicas: int) -> None:
        if self._count is not None and replicas != self._counted:
            self._counted = replicas
            self._count(replicas)
