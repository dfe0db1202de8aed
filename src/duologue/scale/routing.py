"""The choice of a cell for a new conversation. Ray's default compares two random cells; this one compares all."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class FewestConversations(RequestRouter):  # type: ignore[misc,unused-ignore]
    """Chooses the replica with the fewest ongoing requests among those below their maximum."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns one rank of all replicas; Ray takes the least loaded one of a rank."""
        return [candidate_replicas]
