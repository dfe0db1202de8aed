"""Benchmark `talk`: one conversation of an hour, far beyond the positions of the model, and interrupted replies.

The hour is simulated: questions and replies follow each other without pauses, as fast as they are computed, and their
audio counts as time. Memory and latency must not grow with it.

Interrupted replies are played in real time. An id that was generated and never heard was wasted. The limit on how far a
reply is ahead of its playback (`--ahead-s` of `duologue serve`) is compared with no limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import AIMS, Spread
from benchmarks.plots import draw_lines
from benchmarks.speech import chunks, questions
from duologue import rates
from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.events import AudioDelta
from duologue.conversation.session import Session
from duologue.evaluation.report import Row
from duologue.language.engine import PlainEngine
from duologue.language.stepping import Stepped, StepRow
from duologue.machine import resident_mb
from duologue.progress import bar, steps

CHUNK_MS = 40
NUM_COMPARED = 15  # turns at either end of the hour
MAX_SLOWER = 1.5
MAX_GROWTH_MB = 50.0
LONG_QUESTION = "Tell me a story."
INTERRUPTED_SHARE = 1 / 3
STOP_AFTER_S = 0.5, 10.0  # of playback, at random


@dataclass(frozen=True)
class TalkTurn:
    """One turn of the hour.

    Attributes:
        minute: of the conversation, at its end.
        first_audio_s: computing time from the end of the question to the first audio; None without audio.
        memory_mb: resident memory after it.
        cached_tokens: ids in the KV caches after it.
    """

    minute: float
    first_audio_s: float | None
    memory_mb: float
    cached_tokens: int


@dataclass(frozen=True)
class Interruptions:
    """Replies in real time, a third of them interrupted at a random moment.

    Attributes:
        ahead_s: the limit; None for no limit.
        generated, heard: ids of the interrupted replies.
    """

    ahead_s: float | None
    num_replies: int
    num_interrupted: int
    generated: int
    heard: int

    @property
    def wasted(self) -> float:
        """The share of ids of interrupted replies that were never heard."""
        return 1 - self.heard / self.generated if self.generated else 0.0


@dataclass(frozen=True)
class TalkBench:
    """The turns of the hour, and the replies with and without the limit."""

    turns: tuple[TalkTurn, ...]
    num_history_ids: int
    max_positions: int
    interruptions: tuple[Interruptions, ...]

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        rows = [
            Row("talk", "length", self.turns[-1].minute, "min"),
            Row("talk", "turns", float(len(self.turns))),
            Row("talk", "ids of the history", float(self.num_history_ids), note=f"{self.max_positions} positions"),
        ]
        first, last = self.turns[:NUM_COMPARED], self.turns[-NUM_COMPARED:]
        medians = []
        for name, part in (("begin", first), ("end", last)):
            times = [one.first_audio_s for one in part if one.first_audio_s is not None]
            spread = Spread.of(times)
            medians.append(spread.median)
            rows += [
                spread.row(name, "time to first audio", "s"),
                Row(name, "memory", part[-1].memory_mb, "MB"),
                Row(name, "ids in the cache", float(part[-1].cached_tokens)),
            ]
        for one in self.interruptions:
            limit = "no limit" if one.ahead_s is None else f"at most {one.ahead_s:g} s ahead"
            note = f"{one.generated} ids of {one.num_interrupted} of {one.num_replies} replies"
            rows.append(Row("interrupted", f"ids never heard, {limit}", one.wasted, "%", note=note))
        middle = self.turns[len(self.turns) // 2].memory_mb  # the engine's caches are full by then
        growth = last[-1].memory_mb - middle
        return [
            *rows,
            Row("middle", "memory", middle, "MB"),
            Row(AIMS, "talk.slower_at_the_end", medians[1] / medians[0], aim=MAX_SLOWER, aim_is="below"),
            Row(AIMS, "talk.memory_growth_mb", growth, "MB", aim=MAX_GROWTH_MB, aim_is="below"),
        ]

    def draw(self, figure: Any) -> None:
        """Time to first audio and memory over the conversation."""
        latency, memory = figure.subplots(1, 2)
        spoken = [one for one in self.turns if one.first_audio_s is not None]
        minutes = [one.minute for one in spoken]
        times = [one.first_audio_s for one in spoken if one.first_audio_s is not None]
        draw_lines(latency, {"turn": (minutes, times)}, "time to first audio", "minute", "s")
        resident = [one.memory_mb for one in self.turns]
        draw_lines(memory, {"resident": ([one.minute for one in self.turns], resident)}, "memory", "minute", "MB")


def measure_talk(
    bot: Chatbot, minutes: float = 60.0, replies: int = 30, limits: Sequence[float] = (8.0, 2.0), seed: int = 0
) -> TalkBench:
    """Holds the long conversation, then the interrupted ones.

    Args:
        minutes: of the long conversation.
        replies: of each run with interruptions, in real time.
        limits: seconds that a reply may be ahead of its playback, one run each, after one without a limit.

    Raises:
        ValueError: the engine is not the plain one.
    """
    if not isinstance(bot.models.engine, PlainEngine):
        raise ValueError("this bench counts the ids of the plain engine")
    turns, session = asyncio.run(_talk(bot, minutes, questions(), seed))
    engine = bot.models.engine
    interrupted = [
        asyncio.run(_interrupted(bot, engine, limit, replies, seed))
        for limit in steps((None, *limits), "part 2 of 2, interrupted replies", "limits")
    ]
    history = sum(len(turn.ids) for turn in session.conversation)
    return TalkBench(tuple(turns), history, engine.max_positions, tuple(interrupted))


async def _talk(
    bot: Chatbot, minutes: float, asked: Sequence[NDArray[np.float32]], seed: int
) -> tuple[list[TalkTurn], Session]:
    rng = np.random.default_rng(seed)
    session, turns, seconds = bot.session(), list[TalkTurn](), 0.0
    progress = bar(minutes, "part 1 of 2, long talk", "minutes")
    while seconds < 60 * minutes:
        question = asked[int(rng.integers(len(asked)))]
        for chunk in chunks(question, CHUNK_MS):
            await session.hear(chunk)
        asked_at, first, num_samples = time.perf_counter(), None, 0
        async for event in session.reply():
            if isinstance(event, AudioDelta) and len(event.wav):
                first = time.perf_counter() - asked_at if first is None else first
                num_samples += len(event.wav)
        seconds += len(question) / rates.LISTEN_SAMPLE_RATE + num_samples / rates.SPEAK_SAMPLE_RATE
        turns.append(TalkTurn(seconds / 60, first, resident_mb(), bot.models.engine.cached_tokens))
        progress.update(round(seconds / 60 - progress.n, 1))
    progress.close()
    return turns, session


async def _interrupted(
    bot: Chatbot, engine: PlainEngine, limit: float | None, replies: int, seed: int
) -> Interruptions:
    """Long replies, played by the clock; a third is interrupted at a random moment."""
    rng = np.random.default_rng(seed)
    num_interrupted = generated = heard = 0
    for index in range(replies):
        sampling = dataclasses.replace(bot.models.card.sampling, seed=seed + index)
        session = Session(bot.models, bot.worker, sampling=sampling, policy=lambda: BlockPolicy(max_ahead_s=limit))
        session.write(LONG_QUESTION)
        stop_after = rng.uniform(*STOP_AFTER_S) if rng.random() < INTERRUPTED_SHARE else None
        started, num_samples, stopped = None, 0, False
        with _drawn_ids(engine) as drawn:
            async for event in session.reply():
                if not isinstance(event, AudioDelta) or not len(event.wav):
                    continue
                started = time.perf_counter() if started is None else started
                num_samples += len(event.wav)
                if stop_after is not None and time.perf_counter() - started >= stop_after:
                    session.interrupt(1000 * (time.perf_counter() - started))
                    stopped = True
        audio_s = num_samples / rates.SPEAK_SAMPLE_RATE
        if started is not None and stop_after is not None and not stopped and stop_after < audio_s:
            await asyncio.sleep(max(started + stop_after - time.perf_counter(), 0))
            session.interrupt(1000 * stop_after)
            stopped = True
        if stopped:
            num_interrupted += 1
            generated += len(drawn)
            heard += len(session.conversation.turns[-1].ids)
    return Interruptions(limit, replies, num_interrupted, generated, heard)


@contextlib.contextmanager
def _drawn_ids(engine: PlainEngine) -> Iterator[list[int]]:
    """Collects the ids that the engine draws within a `with` block."""
    drawn: list[int] = []
    step = engine.stepper.step

    def watched(rows: Sequence[StepRow]) -> list[Stepped]:
        stepped = step(rows)
        drawn.extend(one.token for one in stepped if one.token is not None)
        return stepped

    engine.stepper.step = watched  # type: ignore[method-assign]
    try:
        yield drawn
    finally:
        engine.stepper.step = step  # type: ignore[method-assign]
