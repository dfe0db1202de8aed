"""`duologue scale` with Ray: `make test-scale`. Skips where Ray is not installed."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from benchmarks.scale import PATIENCE_S, measure_scale, sessions_per_cell
from duologue.client.connection import Connection, open_connection
from duologue.client.process import ServerProcess, start_server
from tests.tiny import write_tiny_chatbot

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: run make test-scale"),
    pytest.mark.skipif(sys.platform != "linux", reason="the processes of Ray are found in /proc"),
]


def test_a_killed_cell(tmp_path: Path) -> None:
    model = write_tiny_chatbot(tmp_path / "model", max_tokens=60)
    result = measure_scale(str(model), "cpu", conversations=16, audio_s=0.0, max_tokens=40)
    assert result.errors == ()
    assert sum(result.sessions_per_cell) == 16
    assert max(result.sessions_per_cell) - min(result.sessions_per_cell) <= 2
    # The clients of the killed cell come back to their conversations; the others notice nothing.
    assert 7 <= len(result.returns) <= 9
    assert result.untouched == 16 - len(result.returns)
    assert all(one.resumed for one in result.returns)
    for one in result.returns:
        assert one.num_known >= 4  # two questions and their answers
        # An item is stored while the client hears of it; the kill can come between.
        assert one.num_known - one.num_restored <= 1
    assert result.replaced_s < 120.0
    assert result.exit_code == 0


def test_a_cell_is_added_while_conversations_are_many(tmp_path: Path) -> None:
    """Four conversations fill a cell for four; a second cell starts and gets the next ones. The four go on."""
    model = write_tiny_chatbot(tmp_path / "model", max_tokens=20)
    sizes = (
        "--replicas",
        "1",
        "--max-replicas",
        "2",
        "--sessions",
        "4",
        "--cpus",
        "0.5",
        "--store",
        str(tmp_path / "s"),
    )
    with start_server(str(model), sizes, "scale") as server:
        first, second, waited_s = asyncio.run(_fill(server))
    assert first == [4]
    assert second == [2, 4]
    assert waited_s < PATIENCE_S


async def _fill(server: ServerProcess) -> tuple[list[int], list[int], float]:
    """Conversations per cell with four and with six of them, and the seconds until there was a second cell."""
    async with AsyncExitStack() as stack:

        async def join() -> None:
            line = await stack.enter_async_context(open_connection(server.url))
            await line.receive_until("session.created")
            lines.append(line)

        lines: list[Connection] = []
        for _ in range(4):
            await join()
        first, start = await sessions_per_cell(server), time.monotonic()
        while len(await sessions_per_cell(server)) < 2 and time.monotonic() - start < PATIENCE_S:
            await asyncio.sleep(1.0)
        waited_s = time.monotonic() - start
        for _ in range(2):
            await join()
        for line in lines:  # all of them still answer
            await line.send({"type": "conversation.item.retrieve", "item_id": "none"})
            await line.receive_until("error")
        return first, sorted(await sessions_per_cell(server)), waited_s
