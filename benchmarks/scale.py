"""Benchmark `scale`: conversations over the cells of `duologue scale`, one of which is killed in mid-talk.

    audio   every client sends sound in real time and nothing else happens: processor time of the cells and of Ray's
            proxy, against the same clients on `duologue serve`
    talk    every client asks, hears the answer and asks the next question. One cell is killed with SIGKILL. Its clients
            connect again with their session id and go on; what they were told before must be there
    stop    SIGTERM to the whole

The processes of Ray are found in /proc, so that this bench runs on Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import AIMS, Spread
from duologue.client.connection import WIRE_RATE, Connection, ConnectionLost, open_connection
from duologue.client.process import ServerProcess, start_server
from duologue.evaluation.report import Row

CELL, PROXY = "ray::ServeReplica:duologue:Cell", "ray::ProxyActor"
CHUNK_MS = 40
RETRY_S = 0.1
PATIENCE_S = 120.0  # a busy machine is not a failing bench
QUESTION = "What is seven plus five?"
PAUSE_S = 0.5


@dataclass(frozen=True)
class AudioLoad:
    """Processor time of conversations that only send sound, as shares of one processor.

    Attributes:
        cells: of all cells together.
        proxy: of Ray's proxy; 0 without Ray.
        ping_ms: from an event of a client to its answer.
    """

    conversations: int
    duration_s: float
    cells: float
    proxy: float
    ping_ms: Spread


@dataclass(frozen=True)
class Return:
    """The way back of one client.

    Attributes:
        noticed_s: from the kill to the client's notice.
        back_s: from the notice to the complete history.
        num_known, num_restored: items that the client knew as completed, and those of them that came back.
        resumed: whether the conversation has the same id.
    """

    noticed_s: float
    back_s: float
    num_known: int
    num_restored: int
    resumed: bool


@dataclass(frozen=True)
class ScaleResult:
    """What the clients had.

    Attributes:
        start_s: until all cells were ready.
        sessions_per_cell: before the kill, from the joined metrics.
        returns: of the clients of the killed cell.
        untouched: clients that noticed nothing.
        errors: what clients were told of errors.
        first_audio_before_s, first_audio_after_s: of the untouched clients, before and after the kill.
        replaced_s: from the kill until the metrics show all cells again.
        answers: in all.
        stop_s: from SIGTERM to the end.
    """

    replicas: int
    conversations: int
    start_s: float
    baseline: AudioLoad | None
    audio: AudioLoad | None
    sessions_per_cell: tuple[int, ...]
    returns: tuple[Return, ...]
    untouched: int
    errors: tuple[str, ...]
    first_audio_before_s: Spread
    first_audio_after_s: Spread
    replaced_s: float
    answers: int
    stop_s: float
    exit_code: int

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        lost = sum(one.num_known - one.num_restored for one in self.returns)
        group = f"{self.conversations} conversations, {self.replicas} cells"
        rows = [Row(group, "start", self.start_s, "s", note=f"{self.sessions_per_cell} conversations per cell")]
        for name, load in (("duologue serve", self.baseline), ("cells", self.audio)):
            if load is not None:
                note = f"proxy {load.proxy:.2f}, {load.conversations} conversations"
                rows.append(Row(group, f"processors while listening, {name}", load.cells, note=note))
                rows.append(load.ping_ms.row(group, f"event and answer, {name}", "ms"))
        for name, values in (("noticed_s", "kill noticed"), ("back_s", "history back")):
            if self.returns:
                rows.append(Spread.of([getattr(one, name) for one in self.returns]).row(group, values, "s"))
        rows.append(
            Row(group, "killed cell replaced", self.replaced_s, "s", note=f"{self.untouched} clients untouched")
        )
        rows.append(self.first_audio_before_s.row(group, "time to first audio of the untouched, before", "s"))
        rows.append(self.first_audio_after_s.row(group, "time to first audio of the untouched, after", "s"))
        rows.append(Row(group, "stop", self.stop_s, "s", note=f"exit code {self.exit_code}"))
        rows += [Row(group, "error", 1.0, note=error) for error in self.errors]
        not_resumed = sum(not one.resumed for one in self.returns)
        aims = (("not_resumed", not_resumed), ("lost_items", lost), ("errors", len(self.errors)))
        return rows + [Row(AIMS, f"scale.{name}", float(value), aim=0.0) for name, value in aims]

    def draw(self, figure: Any) -> None:
        """The way back of each client."""
        axes = figure.subplots()
        clients = range(len(self.returns))
        axes.bar(clients, [one.noticed_s for one in self.returns], label="kill noticed")
        axes.bar(
            clients,
            [one.back_s for one in self.returns],
            bottom=[one.noticed_s for one in self.returns],
            label="history back",
        )
        axes.set_xlabel("client of the killed cell")
        axes.set_ylabel("s")
        axes.legend()


def measure_scale(
    model: str,
    device: str,
    replicas: int = 2,
    conversations: int = 16,
    audio_s: float = 10.0,
    max_tokens: int = 60,
    rounds: int = 2,
    arguments: Sequence[str] = (),
) -> ScaleResult:
    """Starts the cells, measures and stops them.

    Args:
        conversations: at once.
        audio_s: of the parts that only send sound; 0 leaves them out.
        max_tokens: of an answer.
        rounds: answers of each client before the kill, and after it.
        arguments: more of `duologue scale`.
    """
    if not Path("/proc/self/stat").exists():
        raise ValueError("this bench finds the processes of Ray in /proc, which only Linux has")
    room = ("--device", device, "--sessions", str(conversations), "--sessions-per-key", str(conversations))
    baseline = None
    if audio_s:
        with start_server(model, room) as server:
            baseline = asyncio.run(_listen_only(server, (server.pid,), (), conversations, audio_s))
    with tempfile.TemporaryDirectory(prefix="duologue-") as folder:
        cells = ("--replicas", str(replicas), "--store", folder, "--cpus", "0.5")
        start = time.monotonic()
        with start_server(model, (*room, *cells, *arguments), "scale") as server:
            start_s = time.monotonic() - start
            audio = None
            if audio_s:
                pids = processes(server.pid, CELL), processes(server.pid, PROXY)
                audio = asyncio.run(_listen_only(server, *pids, conversations, audio_s))
            talk = Talk(server, replicas, conversations, max_tokens, rounds)
            asyncio.run(talk.run())
            start = time.monotonic()
            code = server.stop()
            stop_s = time.monotonic() - start
    untouched = [client for client in talk.clients if not client.returns and client.answers]
    return ScaleResult(
        replicas,
        conversations,
        start_s,
        baseline,
        audio,
        tuple(talk.sessions_per_cell),
        tuple(one for client in talk.clients for one in client.returns),
        len(untouched),
        tuple(error for client in talk.clients for error in client.errors),
        Spread.of([first for client in untouched for at, first in client.answers if at < talk.killed_at]),
        Spread.of([first for client in untouched for at, first in client.answers if at >= talk.killed_at]),
        talk.replaced_s,
        sum(len(client.answers) for client in talk.clients),
        stop_s,
        code,
    )


# Sound only.


async def _listen_only(
    server: ServerProcess, cells: Sequence[int], proxies: Sequence[int], conversations: int, audio_s: float
) -> AudioLoad:
    pings: list[float] = []

    async def one() -> None:
        async with open_connection(server.url) as connection:
            await connection.receive_until("session.created")
            await connection.send(
                {
                    "type": "session.update",
                    "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}},
                }
            )
            await connection.receive_until("session.updated")
            ready.append(connection)
            await all_ready.wait()
            start, chunk = time.monotonic(), np.zeros(WIRE_RATE * CHUNK_MS // 1000, np.int16)
            for index in range(int(1000 * audio_s / CHUNK_MS)):
                await asyncio.sleep(max(0.0, start + index * CHUNK_MS / 1000 - time.monotonic()))
                await connection.append(chunk)
                if index % 25 == 12:
                    sent = time.monotonic()
                    await connection.send({"type": "conversation.item.retrieve", "item_id": "none"})
                    await connection.receive_until("error")
                    pings.append(1000 * (time.monotonic() - sent))

    ready: list[Connection] = []
    all_ready = asyncio.Event()
    tasks = [asyncio.create_task(one()) for _ in range(conversations)]
    async with asyncio.timeout(PATIENCE_S):
        while len(ready) < conversations:
            await asyncio.sleep(0.05)
    before, start = (cpu_s(cells), cpu_s(proxies)), time.monotonic()
    all_ready.set()
    await asyncio.gather(*tasks)
    duration_s = time.monotonic() - start
    used = (cpu_s(cells) - before[0]) / duration_s, (cpu_s(proxies) - before[1]) / duration_s
    return AudioLoad(conversations, duration_s, *used, Spread.of(pings))


# Talk.


@dataclass(eq=False)
class Client:
    """One client that comes back.

    Attributes:
        known: ids of the items that the server called done.
        answers: moment and time to first audio of each answer.
    """

    talk: Talk
    session_id: str = ""
    known: list[str] = field(default_factory=list)
    answers: list[tuple[float, float]] = field(default_factory=list)
    returns: list[Return] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    async def run(self) -> None:
        lost_at: float | None = None
        while not self.talk.over.is_set():
            try:
                async with open_connection(f"{self.talk.server.url}/v1/realtime?session_id={self.session_id}") as line:
                    await self._begin(line, lost_at)
                    lost_at = None
                    while not self.talk.over.is_set():
                        await self._ask(line)
                        await asyncio.sleep(PAUSE_S)
            except (ConnectionLost, ValueError):
                lost_at = lost_at or time.monotonic()
                await asyncio.sleep(RETRY_S)

    async def _begin(self, line: Connection, lost_at: float | None) -> None:
        (*_, created) = await line.receive_until("session.created")
        # The answer to this comes behind the items of the history.
        await line.send(
            {
                "type": "session.update",
                "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}},
            }
        )
        events = await line.receive_until("session.updated")
        session_id = created["session"]["id"]
        if lost_at is not None and self.session_id:
            restored = {event["item"]["id"] for event in events if event["type"] == "conversation.item.done"}
            self.returns.append(
                Return(
                    lost_at - self.talk.killed_at,
                    time.monotonic() - lost_at,
                    len(self.known),
                    len(restored & set(self.known)),
                    session_id == self.session_id,
                )
            )
        self.session_id = session_id

    async def _ask(self, line: Connection) -> None:
        message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
        await line.send({"type": "conversation.item.create", "item": message})
        asked, first = time.monotonic(), None
        await line.send({"type": "response.create", "response": {"max_output_tokens": self.talk.max_tokens}})
        while True:
            event = await line.receive()
            if event["type"] == "response.output_audio.delta" and first is None:
                first = time.monotonic() - asked
            elif event["type"] == "conversation.item.done":
                self.known.append(event["item"]["id"])
            elif event["type"] == "error":
                self.errors.append(event["error"]["message"])
            elif event["type"] == "response.done":
                self.answers.append((asked, time.monotonic() - asked if first is None else first))
                return


class Talk:
    """Clients that talk until one cell has been killed and everybody has had an answer since."""

    def __init__(self, server: ServerProcess, replicas: int, conversations: int, max_tokens: int, rounds: int) -> None:
        self.server, self.replicas, self.max_tokens, self.rounds = server, replicas, max_tokens, rounds
        self.over = asyncio.Event()
        self.clients = [Client(self) for _ in range(conversations)]
        self.killed_at = self.replaced_s = 0.0
        self.sessions_per_cell: list[int] = []

    async def run(self) -> None:
        tasks = [asyncio.create_task(client.run()) for client in self.clients]
        try:
            await self._until(lambda: all(len(client.answers) >= self.rounds for client in self.clients))
            self.sessions_per_cell = await sessions_per_cell(self.server)
            (victim, *_) = processes(self.server.pid, CELL)
            self.killed_at = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            await self._until(self._all_answered)
            while len(await sessions_per_cell(self.server)) < self.replicas:
                await asyncio.sleep(RETRY_S)
            self.replaced_s = time.monotonic() - self.killed_at
            self.over.set()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _all_answered(self) -> bool:
        """Whether every client has had its answers since the kill."""
        return all(sum(at > self.killed_at for at, _ in client.answers) >= self.rounds for client in self.clients)

    async def _until(self, true: Any) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not true():
                await asyncio.sleep(0.02)


async def sessions_per_cell(server: ServerProcess) -> list[int]:
    """Conversations of each cell, from the joined metrics; empty while these cannot be had."""

    def read() -> str:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=PATIENCE_S) as page:
            text: str = page.read().decode()
            return text

    with contextlib.suppress(OSError):
        page = await asyncio.to_thread(read)
        return [int(float(value)) for value in re.findall(r'^duologue_sessions\{cell="\S+"\} (\S+)$', page, re.M)]
    return []


# Processes.


def processes(root: int, name: str) -> list[int]:
    """Returns the processes below `root` whose command line begins with `name`, the oldest first."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int(_stat(int(entry.name))[1])
            names[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")

    def below(pid: int) -> Iterable[int]:
        while pid := parents.get(pid, 0):
            yield pid

    return sorted(pid for pid, title in names.items() if title.startswith(name) and root in below(pid))


def cpu_s(pids: Iterable[int]) -> float:
    """Returns the processor time that these processes have used, in seconds."""
    ticks = sum(int(value) for pid in pids for value in _stat(pid)[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat behind the name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
