"""The choice of a cell for a new conversation.

Ray's own router compares two random replicas, by queue lengths that it asks for and keeps for some seconds. When many
clients connect at once, one replica's length is known and the other's is not, and the first one gets most of them.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

OFFER_S = 10.0  # after which a choice that led to no request is forgotten


class FewestConversations(RequestRouter):  # type: ignore[misc,unused-ignore]
    """Chooses the replica with the fewest conversations and requests of this proxy.

    Each machine has one proxy, and each proxy spreads its own clients evenly. A choice counts at once, because many
    choices are made before the first request has arrived. Ray passes over a replica at its maximum of ongoing requests.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By request id: the replica, and when the choice expires; None once the replica has accepted the request.
        self._chosen: dict[str, tuple[Any, float | None]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns the replicas in ascending order of their load, each as a rank of its own."""
        now = time.monotonic()
        self._chosen = {key: one for key, one in self._chosen.items() if one[1] is None or one[1] > now}
        request_id = None if pending_request is None else pending_request.metadata.internal_request_id
        loads = Counter(replica_id for key, (replica_id, _) in self._chosen.items() if key != request_id)
        # Replicas of one load in random order.
        replicas = random.sample(list(candidate_replicas), len(candidate_replicas))
        ranks = sorted(replicas, key=lambda one: loads[one.replica_id])
        if request_id is not None and ranks:
            self._chosen[request_id] = (ranks[0].replica_id, now + OFFER_S)
        return [[one] for one in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        self._chosen[pending_request.metadata.internal_request_id] = (replica_id, None)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        self._chosen.pop(internal_request_id, None)
