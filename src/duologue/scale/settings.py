"""The settings of an application of cells, as options of a Ray Serve deployment. This file imports no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

APPLICATION = "duologue"
DEPLOYMENT = "Cell"
# The requests of an operator find room in a cell that is full of conversations.
SPARE_REQUESTS = 8
UPSCALE_S = 5.0
DOWNSCALE_S = 600.0  # a new cell loads its model for a minute, so that a short lull stops none


@dataclass(frozen=True)
class CellSettings:
    """The cells of one application.

    Attributes:
        replicas: cells at the start, and at least.
        max_replicas: more cells are started while conversations are many; None keeps `replicas`.
        capacity: conversations that one cell holds.
        requests: other requests that one cell works on at a time.
        target: conversations per cell at which another cell is started, as a share of the capacity.
        gpus, cpus: of one cell. Fractions let several cells share a GPU.
        drain_s: a cell that is to stop keeps its conversations for this time at most.
    """

    replicas: int = 1
    max_replicas: int | None = None
    capacity: int = 32
    requests: int = 16
    target: float = 0.7
    gpus: float = 0.0
    cpus: float = 1.0
    drain_s: float = 20.0

    def __post_init__(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"the maximum of {self.max_replicas} replicas is below the {self.replicas} that run at the start"
            )

    def options(self) -> dict[str, Any]:
        """Returns the options of the Ray Serve deployment."""
        options: dict[str, Any] = {
            "name": DEPLOYMENT,
            "max_ongoing_requests": self.capacity + self.requests + SPARE_REQUESTS,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
            "graceful_shutdown_timeout_s": self.drain_s,
            "graceful_shutdown_wait_loop_s": 0.5,
            "request_router_config": {"request_router_class": "duologue.scale.routing:FewestConversations"},
        }
        if self.max_replicas is None:
            return {**options, "num_replicas": self.replicas}
        scaling = {
            "min_replicas": self.replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target * self.capacity,
            "upscale_delay_s": UPSCALE_S,
            "downscale_delay_s": DOWNSCALE_S,
        }
        return {**options, "autoscaling_config": scaling}
