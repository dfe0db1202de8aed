"""The life of an application of cells: start, ready, drain and stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from duologue.scale.cells import CellApp, application, ask_cells
from duologue.scale.settings import APPLICATION, CellSettings

log = logging.getLogger(__name__)

POLL_S = 0.2


def run(
    build: Callable[[], CellApp],
    settings: CellSettings,
    host: str,
    port: int,
    address: str | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Runs cells until SIGTERM or SIGINT. The current answers are then finished, for at most `drain_s`.

    Args:
        build: makes a cell's app; called in each replica, so it must be importable there.
        host, port: where Ray's proxy listens, on each machine of the cluster.
        address: of a running Ray cluster, such as "auto"; None starts Ray on this machine.
        on_ready: called when all cells accept clients.

    Raises:
        RuntimeError: the cells did not start; their logs are in Ray's folder of logs.
    """
    stop = threading.Event()

    def handle(sig: int, frame: FrameType | None) -> None:
        stop.set()

    # Ray runs its workers at niceness 15: other programs would take the processor from live conversations.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The default of 0.1 s passes over replicas of a busy machine.
    os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "1.0")
    if address is None:
        most = settings.max_replicas or settings.replicas
        cpus = max(os.cpu_count() or 1, int(most * settings.cpus) + 1)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address)
    # Not before: `ray.init` sets handlers of its own.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, handle)
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(application(build, settings), name=APPLICATION, route_prefix="/")
        if on_ready is not None:
            on_ready()
        stop.wait()
        _drain(settings.drain_s)
    finally:
        if address is None:
            serve.shutdown()
        else:
            serve.delete(APPLICATION)
        ray.shutdown()


def _drain(drain_s: float) -> None:
    """Waits until every cell has finished its answers."""
    deadline = time.monotonic() + drain_s
    while (num_active := sum(ask_cells("drain"))) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if num_active:
        log.warning("stopping with %d sessions and requests still active", num_active)
