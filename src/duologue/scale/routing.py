"""The choice of a cell for a new conversation.

Ray's own router compares two random replicas, by queue lengths that it asks for and keeps for some seconds. When many
clients connect at once, one replica's length is known and the other's is not, and the first one gets most of them.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class FewestConversations(RequestRouter):  # type: ignore[misc,unused-ignore]
    """Chooses the replica with the fewest conversations and requests of this proxy.

    Each machine has one proxy, and each proxy spreads its own clients evenly. Ray passes over a replica that is at its
    maximum of ongoing requests.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ongoing: Counter[Any] = Counter()  # by replica id

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns the replicas in ascending order of their load, each as a rank of its own."""
        replicas = random.sample(candidate_replicas, len(candidate_replicas))
        return [[one] for one in sorted(replicas, key=lambda one: self._ongoing[one.replica_id])]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        self._ongoing[replica_id] += 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        self._ongoing[replica_id] -= 1
        if self._ongoing[replica_id] <= 0:
            del self._ongoing[replica_id]
