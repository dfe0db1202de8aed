"""The Ray Serve application of cells. A cell is a replica: one process with one model on one GPU or one processor.

For Ray a WebSocket is one request, which stays on its replica. The ongoing requests of a replica are its live
conversations: they decide where a new conversation goes, and how many replicas run.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from duologue.scale.expositions import join_expositions

APPLICATION = "duologue"
DEPLOYMENT = "Cell"
ASK_S = 5.0  # for an answer of all cells
# An operator's requests are never refused because a cell is full of conversations.
SPARE_REQUESTS = 8


class CellApp(Protocol):
    """What a cell serves.

    Attributes:
        asgi: the ASGI app.
        gather_metrics: set by the cell; returns the joined page of all cells.
    """

    asgi: Any
    gather_metrics: Callable[[], Awaitable[bytes]] | None

    def exposition(self) -> bytes:
        """Returns the cell's own metrics in Prometheus's text format."""

    def drain(self) -> None:
        """Refuses new conversations and ends the others after their current answers."""

    def num_active(self) -> int:
        """Returns the number of open conversations and running requests."""


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
            "request_router_config": RequestRouterConfig(
                request_router_class="duologue.scale.routing:FewestConversations"
            ),
        }
        if self.max_replicas is None:
            return {**options, "num_replicas": self.replicas}
        scaling = AutoscalingConfig(
            min_replicas=self.replicas,
            max_replicas=self.max_replicas,
            target_ongoing_requests=self.target * self.capacity,
            upscale_delay_s=5.0,
            downscale_delay_s=600.0,
        )
        return {**options, "autoscaling_config": scaling}


@serve.ingress()
class Cell:
    """One replica.

    Args:
        build: makes the app; called in the replica, where it loads the model.
    """

    def __init__(self, build: Callable[[], CellApp]) -> None:
        self._cell = build()
        self._cell.gather_metrics = self._gather
        self._name = serve.get_replica_context().replica_tag.rpartition("#")[2]

    def __serve_build_asgi_app__(self) -> Any:
        return self._cell.asgi

    async def exposition(self) -> tuple[str, str]:
        """Returns the cell's name and its metrics."""
        return self._name, self._cell.exposition().decode()

    async def drain(self) -> int:
        """Refuses new conversations; returns the number of those still open, and of running requests."""
        self._cell.drain()
        return self._cell.num_active()

    async def status(self) -> tuple[str, int, int]:
        """Returns the cell's name, process id, and number of conversations and requests."""
        return self._name, os.getpid(), self._cell.num_active()

    async def _gather(self) -> bytes:
        handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        pages = await handle.broadcast("exposition").results_async(timeout_s=ASK_S, return_exceptions=True)
        return join_expositions(dict(_answers(pages))).encode()


def ask_cells(method: str) -> list[Any]:
    """Calls a method of all cells; returns the answers of those that live. For code without an event loop."""
    handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    return _answers(handle.broadcast(method).results(timeout_s=ASK_S, return_exceptions=True))


def _answers(results: list[Any]) -> list[Any]:
    return [result for result in results if not isinstance(result, BaseException)]


def application(build: Callable[[], CellApp], settings: CellSettings) -> serve.Application:
    """Returns the Ray Serve application of cells that `build` makes."""
    return serve.deployment(**settings.options())(Cell).bind(build)
