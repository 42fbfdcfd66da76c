"""Ray Serve's request router for the engines: the least busy replica that is warm for a request.

https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html. Ray pickles this module by value: its
classes in a router's process are not those that one imports from here, so what both must know lies elsewhere.
"""

from __future__ import annotations

import random
import time

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from act_serve.server.ray_engine import RESIDENT
from act_serve.server.warmth import Ask

# How long a second attempt looks for a replica other than the one that failed.
_OTHER_S = 2.0


class AffinityRouter(RequestRouter):
    """Tries the groups of :meth:`Warmth.rank` in turn; Ray takes the least busy one that is not full of each."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """As Ray's; a request that was not sent with an :class:`Ask` may get any replica."""
        if pending_request is None or not pending_request.args or not isinstance(pending_request.args[0], Ask):
            return [candidate_replicas]
        ask: Ask = pending_request.args[0]
        ask.replicas = len(candidate_replicas)
        pending_request.routing_context.should_backoff = True  # between two rounds
        others = [r for r in candidate_replicas if r.replica_id.unique_id not in ask.avoid]
        if not others and time.time() - pending_request.created_at < _OTHER_S:
            return []
        among = random.sample(others or candidate_replicas, k=len(others or candidate_replicas))  # so that ties spread
        replicas = {r.replica_id.unique_id: r for r in among}
        loads = {name: self.replica_queue_len_cache.get(r.replica_id) or 0 for name, r in replicas.items()}
        resident = {name: r.routing_stats.get(RESIDENT, ()) for name, r in replicas.items()}
        return [[replicas[name] for name in group] for group in ask.warmth.rank(ask.route, loads, resident)]
