"""Benchmark `sessions`: N live conversations at once on one chatbot, in this process, against one alone.

Each conversation goes on in real time: a recorded question comes in chunks of 40 ms as a microphone gives them, the
reply begins at its last sample, its sound is played by the clock, and when it has been played the next question begins.
Time to first audio counts from the moment at which the last sample was due, so that a late event loop counts too;
waiting for silence, which a server does to find the end of a turn, is not in it.

An underrun is a moment in which playback has used up all sound and the reply goes on later.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.harness import AIMS, Spread, peak_memory_mb
from benchmarks.plots import draw_lines
from benchmarks.speech import chunks, questions
from duologue import rates
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.events import AudioDelta
from duologue.conversation.session import Session
from duologue.conversation.worker import WorkerFull, WorkerStats
from duologue.evaluation.report import Row
from duologue.language.requests import EngineFull
from duologue.machine import num_cores
from duologue.progress import bar

CHUNK_MS = 40
SILENT = "no reply had any sound"
MAX_FIRST_AUDIO_S = 1.5
BASELINE_SHARE = 1 / 3  # of the seconds of the run that is judged
PAUSE_S = (0.2, 1.2)  # from the end of a reply to the next question, at random


@dataclass(frozen=True)
class Exchange:
    """One question and its reply; moments in seconds since the start of the run.

    Attributes:
        asked_at, said_at: begin and end of the question.
        first_audio_s: from its end to the first sound; None when the reply had none.
        heard_at: when all of it had been played.
        audio_s: length of the reply.
        underruns_s: each moment without sound in the middle of the reply, its length.
    """

    session: int
    asked_at: float
    said_at: float
    first_audio_s: float | None
    heard_at: float
    audio_s: float
    underruns_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Crowd:
    """What so many conversations at once had.

    Attributes:
        first_audio_s: of all replies with sound; None without any.
        num_underruns, underrun_s: of all replies together.
        unanswered: questions without any sound.
        refused: sentences of the engine or the worker where they had no room.
        cpu_per_audio: seconds of processor for each second of sound that was spoken, listening included.
        load: seconds of processor over those that the cores had.
        batch_sizes: rows of a batch of steps of tokenizer and decoder, and how many batches had so many.
        longest_queue: jobs that ever waited for the worker.
        memory_mb: the most that the process had resident until the end of this run.
    """

    num_sessions: int
    duration_s: float
    exchanges: tuple[Exchange, ...]
    first_audio_s: Spread | None
    num_underruns: int
    underrun_s: float
    unanswered: int
    refused: tuple[str, ...]
    audio_s: float
    cpu_per_audio: float | None
    load: float
    batch_sizes: dict[int, int]
    longest_queue: int
    memory_mb: float


@dataclass(frozen=True)
class SessionsBench:
    """Crowds by their size; the first is the baseline, the last is judged."""

    crowds: tuple[Crowd, ...]

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        rows = []
        for crowd in self.crowds:
            group = f"{crowd.num_sessions} sessions"
            first = crowd.first_audio_s
            silent = Row(group, "time to first audio", None, "s", skipped=SILENT)
            dry = f"{crowd.underrun_s:.2f} s without sound"
            rows += [
                Row(group, "replies", float(len(crowd.exchanges))),
                silent if first is None else first.row(group, "time to first audio", "s"),
                Row(group, "underruns", float(crowd.num_underruns), note=dry),
                Row(group, "questions without sound", float(crowd.unanswered)),
                Row(group, "cpu/audio", crowd.cpu_per_audio, skipped=SILENT if crowd.cpu_per_audio is None else ""),
                Row(group, "load of all cores", crowd.load, "%"),
                Row(group, "rows per batch", _mean_rows(crowd.batch_sizes)),
                Row(group, "memory", crowd.memory_mb, "MB"),
            ]
            rows += [Row(group, "refused", 1.0, note=sentence) for sentence in crowd.refused]
        return rows + judge(self.crowds[-1])

    def draw(self, figure: Any) -> None:
        """Who spoke when in the largest crowd, and time to first audio by the number of sessions."""
        scene, curve = figure.subplots(1, 2, width_ratios=[3, 1])
        crowd = self.crowds[-1]
        for one in crowd.exchanges:
            first = one.heard_at if one.first_audio_s is None else one.said_at + one.first_audio_s
            for start, end, color in (
                (one.asked_at, one.said_at, "#bbbbbb"),
                (one.said_at, first, "#cc6677"),
                (first, one.heard_at, "#6699bb"),
            ):
                scene.barh([one.session], [end - start], left=start, color=color, height=0.6)
        scene.set_title(
            f"{crowd.num_sessions} conversations: question (grey), waiting (red), reply (blue)", fontsize=10
        )
        scene.set_xlabel("s")
        scene.set_ylabel("session")
        scene.set_yticks(range(crowd.num_sessions))
        known = [(crowd.num_sessions, crowd.first_audio_s) for crowd in self.crowds if crowd.first_audio_s]
        at = [float(num) for num, _ in known]
        series = {
            "p50": (at, [first.median for _, first in known]),
            "p95": (at, [first.p95 for _, first in known]),
        }
        draw_lines(curve, series, "time to first audio", "sessions", "s")
        curve.axhline(MAX_FIRST_AUDIO_S, color="black", linewidth=1)


class Loudspeaker:
    """Plays sound by a clock from the moment the first of it comes, and counts the moments in which there is none."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.started_at: float | None = None
        self.dry_at = 0.0
        self.underruns_s: list[float] = []

    def add(self, num_samples: int, sample_rate: int) -> None:
        """More sound, which is played behind what there was."""
        now = self._clock()
        if self.started_at is None:
            self.started_at = self.dry_at = now
        if now > self.dry_at:
            self.underruns_s.append(now - self.dry_at)
            self.dry_at = now
        self.dry_at += num_samples / sample_rate


def measure_sessions(
    bot: Chatbot,
    counts: Sequence[int] = (1, 8),
    seconds: float = 45.0,
    seed: int = 0,
    asked: Sequence[NDArray[np.float32]] | None = None,
) -> SessionsBench:
    """Runs crowds of so many sessions one after the other.

    Args:
        counts: sessions of each run; the last is judged by the aims.
        seconds: of the last run; no question begins later, those that have begun are answered. The runs before it take
            a third of that.
        seed: of the pauses, the order of the questions and the sampling.
        asked: questions, each wav (S,) at 16 kHz; those of the package where None.
    Raises:
        ValueError: no count, or one below 1; no time.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"counts must be numbers of sessions from 1 on, got {list(counts)}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    asked = questions() if asked is None else asked
    asyncio.run(_warm_up(bot, asked[0]))
    crowds = []
    for index, count in enumerate(counts):
        span = seconds if index == len(counts) - 1 else seconds * BASELINE_SHARE
        crowds.append(asyncio.run(_crowd(bot, count, span, asked, seed)))
    return SessionsBench(tuple(crowds))


def judge(crowd: Crowd) -> list[Row]:
    """The aims for a crowd; one without any sound has no time to first audio."""
    first = crowd.first_audio_s
    p95, silent = (None, SILENT) if first is None else (first.p95, "")
    unanswered = float(crowd.unanswered + len(crowd.refused))
    return [
        Row(AIMS, "sessions.p95_ttfa_s", p95, aim=MAX_FIRST_AUDIO_S, aim_is="below", skipped=silent),
        Row(AIMS, "sessions.underruns", float(crowd.num_underruns), aim=0.0),
        Row(AIMS, "sessions.unanswered", unanswered, aim=0.0),
    ]


async def _warm_up(bot: Chatbot, question: NDArray[np.float32]) -> None:
    """One reply, so that nothing is built or loaded for the first time in what is measured."""
    session = bot.session()
    await session.hear(question)
    async for _ in session.reply():
        pass


async def _crowd(bot: Chatbot, count: int, seconds: float, asked: Sequence[NDArray[np.float32]], seed: int) -> Crowd:
    before, cpu = bot.worker.stats(), time.process_time()
    start = time.perf_counter()
    users = [_User(bot, index, start, asked, seed) for index in range(count)]
    with bar(round(seconds), f"sessions: {count}", "seconds") as line:
        async with asyncio.TaskGroup() as group:
            clock = asyncio.create_task(_tick(line))
            for user in users:
                group.create_task(user.talk(seconds))
        clock.cancel()
    duration = time.perf_counter() - start
    after, cpu = bot.worker.stats(), time.process_time() - cpu
    exchanges = tuple(sorted((one for user in users for one in user.exchanges), key=lambda one: one.said_at))
    times = [one.first_audio_s for one in exchanges if one.first_audio_s is not None]
    underruns = [length for one in exchanges for length in one.underruns_s]
    audio_s = sum(one.audio_s for one in exchanges)
    return Crowd(
        num_sessions=count,
        duration_s=duration,
        exchanges=exchanges,
        first_audio_s=Spread.of(times) if times else None,
        num_underruns=len(underruns),
        underrun_s=sum(underruns),
        unanswered=sum(one.first_audio_s is None for one in exchanges),
        refused=tuple(sentence for user in users for sentence in user.refused),
        audio_s=audio_s,
        cpu_per_audio=cpu / audio_s if audio_s else None,
        load=cpu / (duration * num_cores()),
        batch_sizes=_new_batches(before, after),
        longest_queue=after.most_waiting,
        memory_mb=peak_memory_mb(),
    )


async def _tick(line: tqdm[Any]) -> None:
    """Shows the seconds as they go by, up to the last."""
    while line.total and line.n < line.total:
        await asyncio.sleep(1)
        line.update(1)


@dataclass
class _User:
    """Who asks recorded questions in one conversation, one after the other, in real time."""

    bot: Chatbot
    index: int
    start: float
    asked: Sequence[NDArray[np.float32]]
    seed: int
    exchanges: list[Exchange] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    async def talk(self, seconds: float) -> None:
        rng = np.random.default_rng((self.seed, self.index))
        sampling = dataclasses.replace(self.bot.models.card.sampling, seed=self.seed + self.index)
        session = self.bot.session(sampling=sampling)
        # They have not all begun at the same moment.
        await asyncio.sleep(rng.uniform(0, min(4.0, seconds / 2)))
        while not (self.exchanges or self.refused) or time.perf_counter() - self.start < seconds:
            question = self.asked[int(rng.integers(len(self.asked)))]
            try:
                self.exchanges.append(await self._ask(session, question))
            except (EngineFull, WorkerFull) as error:
                self.refused.append(str(error))
            await asyncio.sleep(rng.uniform(*PAUSE_S))

    async def _ask(self, session: Session, question: NDArray[np.float32]) -> Exchange:
        begun = due = time.perf_counter()
        for chunk in chunks(question, CHUNK_MS):
            due += len(chunk) / rates.LISTEN_SAMPLE_RATE
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            await session.hear(chunk)
        loudspeaker, num_samples = Loudspeaker(), 0
        async for event in session.reply():
            if isinstance(event, AudioDelta) and len(event.wav):
                loudspeaker.add(len(event.wav), event.sample_rate)
                num_samples += len(event.wav)
        await asyncio.sleep(max(loudspeaker.dry_at - time.perf_counter(), 0))
        first = loudspeaker.started_at
        return Exchange(
            session=self.index,
            asked_at=begun - self.start,
            said_at=due - self.start,
            first_audio_s=None if first is None else first - due,
            heard_at=time.perf_counter() - self.start,
            audio_s=num_samples / rates.SPEAK_SAMPLE_RATE,
            underruns_s=tuple(loudspeaker.underruns_s),
        )


def _new_batches(before: WorkerStats, after: WorkerStats) -> dict[int, int]:
    counts = {size: num - before.batch_sizes.get(size, 0) for size, num in after.batch_sizes.items()}
    return {size: num for size, num in counts.items() if num}


def _mean_rows(batch_sizes: dict[int, int]) -> float:
    batches = sum(batch_sizes.values())
    return sum(size * num for size, num in batch_sizes.items()) / batches if batches else 0.0
