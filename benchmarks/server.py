"""Benchmark `server`: clients on loopback that talk with a real server in real time, and clients that come and go.

    load    N clients, each in a conversation of its own: it asks recorded questions, hears each answer out and asks
            the next. First audio is timed at the client, from the end of the turn as the server reports it (and from
            the last sample of speech, which has the server's waiting for silence in it); a gap is a moment in which a
            loudspeaker would have been dry in the middle of an answer
    cycles  connections one after the other: some say a little, some leave in the middle of an answer, some without a
            goodbye. Memory, tasks and file descriptors of the server afterwards, against those before

The server is another process: its own, or one that runs already.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import AIMS, Spread
from benchmarks.speech import questions
from duologue.audio import resample
from duologue.client.connection import WIRE_RATE, Connection, open_connection
from duologue.client.conversation import TalkClient, TalkSettings
from duologue.client.playback import Playback, Ticker, in_real_time, silence
from duologue.evaluation.report import Row
from duologue.pcm import to_int16
from duologue.progress import bar
from duologue.rates import LISTEN_SAMPLE_RATE

MAX_FIRST_AUDIO_S = 1.5
SILENT = "no answer had any sound"
MAX_GROWTH_MB = 10.0
SPREAD_S = 4.0  # as long as those of the benchmark `sessions` take to begin
PAUSE_S = 2.0  # of silence behind a question, so that the server hears its end
WARM_UP_CYCLES = 50
SETTLE_S = 10.0
PARALLEL_CYCLES = 4
ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Turn:
    """One question of one client.

    Attributes:
        first_audio_s: from the end of the turn, as the client was told it, to the first sound at the client.
        from_speech_s: from the last sample of speech that the client sent.
    """

    client: int
    first_audio_s: float
    from_speech_s: float
    status: str


@dataclass(frozen=True)
class Load:
    """What the clients of a load had.

    Attributes:
        num_gaps, gap_ms: moments without sound in the middle of an answer, all clients together.
        unanswered: questions without any sound.
        errors: what servers or lines said.
    """

    num_clients: int
    turns: tuple[Turn, ...]
    first_audio_s: Spread | None
    from_speech_s: Spread | None
    num_gaps: int
    gap_ms: float
    unanswered: int
    errors: tuple[str, ...]
    duration_s: float


@dataclass(frozen=True)
class Footprint:
    """Of the server's process.

    Attributes:
        memory_mb: resident, in 10^6 bytes.
        tasks: of its event loop; None where the server does not tell.
    """

    memory_mb: float
    descriptors: int
    threads: int
    tasks: int | None
    sessions: int | None


@dataclass(frozen=True)
class Cycles:
    """Attributes:
    before: after `warm_up` connections; `after`: after `num` more.
    failed: what went wrong in a cycle, by its sentence.
    """

    num: int
    warm_up: int
    duration_s: float
    before: Footprint
    after: Footprint
    failed: tuple[str, ...]


@dataclass(frozen=True)
class ServerBench:
    """What was measured; `cycles` is None where they were not asked for."""

    load: Load | None
    cycles: Cycles | None

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        rows = []
        if (load := self.load) is not None:
            group = f"{load.num_clients} clients"
            rows.append(Row(group, "answers", float(len(load.turns)), note=f"{load.duration_s:.0f} s"))
            for name, spread in (("end of turn", load.first_audio_s), ("last sample", load.from_speech_s)):
                name = f"time to first audio from the {name}"
                silent = Row(group, name, None, "s", skipped=SILENT)
                rows.append(silent if spread is None else spread.row(group, name, "s"))
            rows.append(Row(group, "gaps", float(load.num_gaps), note=f"{load.gap_ms:.0f} ms"))
            rows.append(Row(group, "unanswered", float(load.unanswered)))
            rows += [Row(group, "error", 1.0, note=error) for error in load.errors]
        if (cycles := self.cycles) is not None:
            group = f"{cycles.num} connections"
            rows.append(Row(group, "duration", cycles.duration_s, "s", note=f"after {cycles.warm_up} of warm-up"))
            for name, footprint in (("before", cycles.before), ("after", cycles.after)):
                counts = f"{footprint.descriptors} descriptors, {footprint.threads} threads, {footprint.tasks} tasks"
                rows.append(Row(group, f"memory {name}", footprint.memory_mb, "MB", note=counts))
            rows += [Row(group, "failed", 1.0, note=sentence) for sentence in cycles.failed]
        return rows + _aims_of_load(self.load) + _aims_of_cycles(self.cycles)

    def draw(self, figure: Any) -> None:
        """Time to first audio of each answer, by client."""
        axes = figure.subplots()
        axes.set_title("time to first audio at the client", fontsize=10)
        if self.load is not None:
            turns = self.load.turns
            axes.plot([turn.client for turn in turns], [turn.first_audio_s for turn in turns], "o", label="end of turn")
            axes.plot([turn.client for turn in turns], [turn.from_speech_s for turn in turns], "x", label="last sample")
            axes.legend()
        axes.axhline(MAX_FIRST_AUDIO_S, color="black", linewidth=1)
        axes.set_xlabel("client")
        axes.set_ylabel("s")


def measure_server(
    url: str,
    pid: int | None,
    key: str = "",
    num_clients: int = 8,
    num_turns: int = 3,
    num_cycles: int = 0,
    max_tokens: int | None = None,
    spread_s: float = SPREAD_S,
    said: Sequence[NDArray[np.int16]] | None = None,
) -> ServerBench:
    """Measures a running server.

    Args:
        url: as `open_connection` takes it.
        pid: of the server's process, whose footprint is read; None where it is on another machine.
        num_clients: 0 leaves the load out.
        num_cycles: connections that come and go; 0 leaves them out.
        max_tokens: bounds each answer.
        spread_s: time over which the clients begin; with 0 all of them ask at once.
        said: questions as pcm at `WIRE_RATE`; None takes those of the package.
    Raises:
        ValueError: the server is not there or refuses; cycles without the server's process.
    """
    if num_cycles and pid is None:
        raise ValueError("cycles need the server's process on this machine: give its --pid, or let one be started")
    if said is None:
        said = [to_int16(resample(wav, LISTEN_SAMPLE_RATE, WIRE_RATE)) for wav in questions()]
    settings = TalkSettings(transcribe=False, max_tokens=max_tokens)
    load = asyncio.run(_load(url, key, num_clients, num_turns, spread_s, settings, said)) if num_clients else None
    cycles = None
    if num_cycles and pid is not None:
        cycles = asyncio.run(_cycles(url, key, pid, num_cycles, said[0]))
    return ServerBench(load, cycles)


def _aims_of_load(load: Load | None) -> list[Row]:
    if load is None:
        return []
    first = load.first_audio_s
    p95, silent = (None, SILENT) if first is None else (first.p95, "")
    return [
        Row(AIMS, "server.p95_ttfa_s", p95, aim=MAX_FIRST_AUDIO_S, skipped=silent),
        Row(AIMS, "server.gaps", float(load.num_gaps), aim=0.0),
        Row(AIMS, "server.errors", float(len(load.errors) + load.unanswered), aim=0.0),
    ]


def _aims_of_cycles(cycles: Cycles | None) -> list[Row]:
    if cycles is None:
        return []
    before, after = cycles.before, cycles.after
    grown = {"descriptor_growth": after.descriptors - before.descriptors, "failed": len(cycles.failed)}
    if before.tasks is not None and after.tasks is not None:
        grown["task_growth"] = after.tasks - before.tasks
    growth_mb = after.memory_mb - before.memory_mb
    return [
        Row(AIMS, "server.cycles.memory_growth_mb", growth_mb, aim=MAX_GROWTH_MB),
        *(Row(AIMS, f"server.cycles.{name}", float(value), aim=0.0) for name, value in grown.items()),
    ]


async def _load(
    url: str,
    key: str,
    num_clients: int,
    num_turns: int,
    spread_s: float,
    settings: TalkSettings,
    said: Sequence[NDArray[np.int16]],
) -> Load:
    begun = time.monotonic()
    with bar(num_clients * num_turns, "server", "questions") as line:
        delays = [index * spread_s / num_clients for index in range(num_clients)]
        clients = [Client(index, delay, num_turns, said, line.update) for index, delay in enumerate(delays)]
        await asyncio.gather(*(client.run(url, key, settings) for client in clients))
    turns = tuple(turn for client in clients for turn in client.turns)
    return Load(
        num_clients=num_clients,
        turns=turns,
        first_audio_s=Spread.of([turn.first_audio_s for turn in turns]) if turns else None,
        from_speech_s=Spread.of([turn.from_speech_s for turn in turns]) if turns else None,
        num_gaps=sum(client.num_gaps for client in clients),
        gap_ms=sum(client.gap_ms for client in clients),
        unanswered=num_clients * num_turns - len(turns),
        errors=tuple(error for client in clients for error in client.errors),
        duration_s=time.monotonic() - begun,
    )


class Client:
    """Asks `num_turns` questions, beginning with another one than its neighbour, and listens to the answers."""

    def __init__(
        self,
        index: int,
        delay_s: float,
        num_turns: int,
        said: Sequence[NDArray[np.int16]],
        answered: Callable[[], object],
    ) -> None:
        self._answered = answered
        self._index, self._delay_s, self._num_turns, self._said = index, delay_s, num_turns, said
        self._asked: list[float] = []  # when the last sample of each question was sent
        self.turns: list[Turn] = []
        self.errors: list[str] = []
        self.num_gaps, self.gap_ms = 0, 0.0

    async def run(self, url: str, key: str, settings: TalkSettings) -> None:
        playback = Playback(WIRE_RATE)
        try:
            async with open_connection(url, key=key) as connection:
                talk = TalkClient(connection, playback, settings, lambda event: None)
                summary = await talk.run(self._speak(talk, playback))
        except ValueError as refused:
            self.errors.append(str(refused))
            return
        self.errors += [*summary.errors, *([summary.ended_by] if summary.ended_by else [])]
        self.num_gaps, self.gap_ms = summary.num_gaps, summary.gap_ms
        answers = [each for each in summary.exchanges if each.first_audio_at is not None]
        for asked, after in itertools.pairwise([*self._asked, float("inf")]):
            for each in answers:
                at = each.first_audio_at
                if at is not None and asked < at < after:
                    self.turns.append(Turn(self._index, at - each.turn_end, at - asked, each.status))
                    break

    async def _speak(self, talk: TalkClient, playback: Playback) -> AsyncIterator[NDArray[np.int16]]:
        """Sound in real time: a question, silence until the answer has been played, the next one."""
        ticker = Ticker()
        async for pcm in _for(silence(ticker), self._delay_s):
            yield pcm
        for number in range(self._num_turns):
            question = self._said[(self._index + number) % len(self._said)]
            async for pcm in in_real_time(question, ticker):
                playback.take(len(pcm))
                yield pcm
            self._asked.append(time.monotonic())
            async for pcm in _until(silence(ticker), talk):
                playback.take(len(pcm))
                yield pcm
            self._answered()


async def _for(source: AsyncIterator[NDArray[np.int16]], seconds: float) -> AsyncIterator[NDArray[np.int16]]:
    rest = round(seconds * WIRE_RATE)
    while rest > 0:
        pcm = await anext(source)
        rest -= len(pcm)
        yield pcm


async def _until(source: AsyncIterator[NDArray[np.int16]], talk: TalkClient) -> AsyncIterator[NDArray[np.int16]]:
    """Until the answer is over, but at least for `PAUSE_S` and at most for `ANSWER_TIMEOUT_S`."""
    spent = 0.0
    async for pcm in source:
        spent += len(pcm) / WIRE_RATE
        if (spent >= PAUSE_S and not talk.busy) or spent > ANSWER_TIMEOUT_S:
            return
        yield pcm


async def _cycles(url: str, key: str, pid: int, num: int, question: NDArray[np.int16]) -> Cycles:
    failed: list[str] = []
    warm_up = min(num, WARM_UP_CYCLES)
    await _come_and_go(url, key, warm_up, question, failed)
    before = await settled(url, key, pid, None)
    begun = time.monotonic()
    await _come_and_go(url, key, num, question, failed)
    duration_s = time.monotonic() - begun
    after = await settled(url, key, pid, before)
    return Cycles(num, warm_up, duration_s, before, after, tuple(failed))


async def _come_and_go(url: str, key: str, num: int, question: NDArray[np.int16], failed: list[str]) -> None:
    numbers = iter(range(num))

    async def work() -> None:
        for number in numbers:
            try:
                async with open_connection(url, key=key) as connection, asyncio.timeout(ANSWER_TIMEOUT_S):
                    await _visit(connection, number, question)
            except (ValueError, RuntimeError, TimeoutError) as error:
                failed.append(f"cycle {number}: {error or type(error).__name__}")

    await asyncio.gather(*(work() for _ in range(PARALLEL_CYCLES)))


async def _visit(connection: Connection, number: int, question: NDArray[np.int16]) -> None:
    """What one client does, by its number: nothing, some sound, a written question answered, or left in the middle."""
    await connection.receive_until("session.created")
    if number % 2:
        await connection.append(question[: WIRE_RATE // 2])
    if number % 5 == 0:
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
        await connection.send({"type": "conversation.item.create", "item": item})
        await connection.send({"type": "response.create", "response": {"max_output_tokens": 40}})
        await connection.receive_until("response.done" if number % 10 else "response.created")
    if number % 3 == 0:
        connection.socket.transport.abort()


async def settled(url: str, key: str, pid: int, wanted: Footprint | None) -> Footprint:
    """The footprint, once it is as small as before in what can be counted, or after `SETTLE_S`."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        found = await asyncio.to_thread(footprint, url, pid, key)
        small = found.sessions in (0, None)
        if wanted is not None:
            small = small and found.descriptors <= wanted.descriptors and (found.tasks or 0) <= (wanted.tasks or 0)
        if small or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.1)


def footprint(url: str, pid: int, key: str = "") -> Footprint:
    """What the server's process holds now. Raises ValueError where that cannot be read."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError as error:
        raise ValueError(f"the server's process {pid} cannot be looked at: {error.strerror}") from None
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    metrics = metrics_of(url, key)

    def count(name: str) -> int | None:
        return int(metrics[name]) if name in metrics else None

    return Footprint(
        memory_mb=int(values["VmRSS"].split()[0]) * 1024 / 1e6,
        descriptors=descriptors,
        threads=int(values["Threads"]),
        tasks=count("duologue_tasks"),
        sessions=count("duologue_sessions"),
    )


def metrics_of(url: str, key: str = "") -> dict[str, float]:
    """The values on the server's page for Prometheus, by name with labels; none where it has no such page."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/metrics", headers=headers)
    found = {}
    with contextlib.suppress(OSError), opener.open(request, timeout=10) as page:
        for line in page.read().decode("utf-8").splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
    return found
