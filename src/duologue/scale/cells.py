"""The Ray Serve application of cells. A cell is a replica: one process with one model on one GPU or one processor.

For Ray a WebSocket is one request, which stays on its replica. The ongoing requests of a replica are its live
conversations: they decide where a new conversation goes, and how many replicas run.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from ray import serve

from duologue.scale.expositions import join_expositions
from duologue.scale.settings import APPLICATION, DEPLOYMENT, CellSettings

ASK_S = 5.0  # for an answer of all cells


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
