"""`duologue bench server` against a real server with the tiny model."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve

from benchmarks import soak
from benchmarks.plots import save
from benchmarks.server import Footprint, footprint, measure_server
from duologue.cli import main
from duologue.client.connection import WIRE_RATE
from duologue.client.process import ServerProcess, start_server
from tests.live import question


def test_clients_talk_and_come_and_go(live_server: ServerProcess) -> None:
    bench = measure_server(
        live_server.url, live_server.pid, num_clients=2, num_turns=1, num_cycles=12, max_tokens=60, said=[question()]
    )
    assert bench.load is not None
    assert [turn.client for turn in bench.load.turns] == [0, 1]
    for turn in bench.load.turns:
        # The server waits for half a second of silence, and its word for the end may come late on a busy machine.
        assert 0 < turn.first_audio_s < turn.from_speech_s - 0.3
    assert (bench.load.unanswered, bench.load.errors) == (0, ())
    assert bench.cycles is not None
    assert bench.cycles.failed == ()
    checks = {row.name: row for row in bench.rows() if row.aim is not None}
    assert set(checks) == {
        *("server.p95_ttfa_s", "server.gaps", "server.errors", "server.cycles.memory_growth_mb"),
        *("server.cycles.descriptor_growth", "server.cycles.failed", "server.cycles.task_growth"),
    }
    for name in ("server.errors", "server.cycles.descriptor_growth", "server.cycles.task_growth"):
        assert checks[name].met, checks[name]
    assert "time to first audio from the end of turn" in {row.name for row in bench.rows()}
    assert isinstance(footprint(live_server.url, live_server.pid), Footprint)


def test_a_soak_visits_in_every_way_and_compares_the_idle_server(live_server: ServerProcess, tmp_path: Path) -> None:
    visitor = soak.Visitor(live_server.url, "", random.Random(0), 0.01, [question()])
    for kind in visitor.kinds:
        asyncio.run(visitor.visit(kind))
    assert visitor.failed == ["resumed: the conversation was not resumed"]  # this server keeps none
    assert all(visitor.visits[kind] == 1 for kind in visitor.kinds)
    held = Footprint(memory_mb=600.0, descriptors=14, threads=11, tasks=3, sessions=0)
    grown = replace(held, memory_mb=612.0, tasks=4)
    samples = tuple(soak.Sample(float(minute), held) for minute in range(4))
    result = soak.Soak(60.0, 10.0, 2, 10.0, dict(visitor.visits), held, grown, ("a fault",), samples)
    checks = {row.name: (row.value, row.met) for row in result.rows() if row.aim is not None}
    assert checks == {
        "soak.memory_growth_mb": (12.0, True),
        "soak.task_growth": (1.0, False),
        "soak.descriptor_growth": (0.0, True),
        "soak.failed": (1.0, False),
    }
    save(result, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_measures_a_running_server(live_server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "server", "--server", live_server.url, "--clients", "0", "--json"]
    assert main([*command, "--cycles", "4", "--pid", str(live_server.pid)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["bench"] == "server"
    assert record["results"]["load"] is None
    assert record["results"]["cycles"]["num"] == 4
    assert {check["name"] for check in record["checks"]} >= {"server.cycles.descriptor_growth"}
    assert main([*command, "--cycles", "4"]) == 2
    assert "cycles need the server's process" in capsys.readouterr().err


def test_a_server_without_answers_is_told() -> None:
    """A silent server: questions stay unanswered, and what it says at its end is an error."""

    async def handle(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.close(1011, "no model")

    async def run() -> None:
        async with serve(handle, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            said = [np.ones(WIRE_RATE // 10, np.int16)]
            bench = await asyncio.to_thread(
                measure_server, f"http://127.0.0.1:{port}", None, num_clients=1, num_turns=2, said=said
            )
            assert bench.load is not None
            assert bench.load.unanswered == 2
            assert "no model" in bench.load.errors[0]
            assert not any(row.met for row in bench.rows() if row.name != "server.gaps")

    asyncio.run(run())


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(ValueError, match="the server did not start: argument --port: 'x' is not a port"):
        start_server("pocket", ("--port", "x")).__enter__()
