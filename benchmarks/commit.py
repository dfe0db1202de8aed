"""From the end of speech to the first token of the reply, by the length of what was said and of the conversation.

Everything goes through `Session.hear`, so what is settled is tokenized and prefilled while the user talks. The last
moment of the speech comes in real time, what is before it 8 times as fast, which a machine that can hold eight
conversations keeps up with as well.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import AIMS, Spread
from benchmarks.speech import chunks, speech_of
from duologue import rates
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.events import SpeechDelta, TextDelta
from duologue.conversation.session import Session
from duologue.evaluation.report import Row
from duologue.progress import steps

SPEECH_S = (2.5, 3.9, 10.0, 29.0)
NUM_TURNS = 10
TURN_S = 2.5  # of speech in each turn of the long conversation
CHUNK_MS = 40
REAL_TIME_S = 0.4
EARLY_SPEED = 8
REPLY_TOKENS = 39  # of the replies between the turns: a text run and a speech run
MAX_GROWTH = 1.5


@dataclass(frozen=True)
class CommitTimes:
    """Milliseconds from the end of speech to the first token.

    Attributes:
        by_speech: (seconds of speech, ms), first turns.
        by_turn: (number of the turn, ms), all with equally long questions.
        open_block_s: (seconds of speech, seconds of it in the open block): what remains to be tokenized.
    """

    by_speech: tuple[tuple[float, Spread], ...]
    by_turn: tuple[tuple[int, Spread], ...]
    open_block_s: tuple[tuple[float, float], ...]

    def aims(self) -> list[Row]:
        """What is said and what was said before must not make the user wait: only the open block may."""
        short = max(spread.median for seconds, spread in self.by_speech if seconds < 5)
        long = max(spread.median for seconds, spread in self.by_speech if seconds >= 5)
        first, last = self.by_turn[0][1].median, self.by_turn[-1][1].median
        return [
            Row(AIMS, "latency.commit.long_over_short_speech", long / short, aim=MAX_GROWTH),
            Row(AIMS, "latency.commit.last_over_first_turn", last / first, aim=MAX_GROWTH),
        ]


def measure_commits(
    bot: Chatbot,
    repetitions: int = 5,
    warm_up: int = 1,
    speech_s: Sequence[float] = SPEECH_S,
    num_turns: int = NUM_TURNS,
) -> CommitTimes:
    """Speaks to the chatbot: each length in a new session, and conversations of `num_turns` turns.

    Args:
        speech_s: seconds, some below 5 and some not.
    """
    return asyncio.run(_measure(bot, repetitions, warm_up, speech_s, num_turns))


async def _measure(
    bot: Chatbot, repetitions: int, warm_up: int, speech_s: Sequence[float], num_turns: int
) -> CommitTimes:
    by_speech: dict[float, list[float]] = {seconds: [] for seconds in speech_s}
    by_turn: dict[int, list[float]] = {1: [], num_turns: []}
    for index in steps(range(warm_up + repetitions), "part 5 of 6, questions of many lengths"):
        for seconds, taken in by_speech.items():
            waited = await _first_token(bot, _new_session(bot, index), _question(seconds, index), 1)
            taken += [waited] if index >= warm_up else []
    # A long conversation takes its time: half as many of them.
    for index in steps(range((repetitions + 1) // 2), "part 6 of 6, long conversations"):
        session = _new_session(bot, index)
        for turn in range(1, num_turns + 1):
            waited = await _first_token(bot, session, _question(TURN_S, turn + num_turns * index), REPLY_TOKENS)
            if turn in by_turn:
                by_turn[turn].append(waited)
    block_s = bot.models.tokenizer.block_tokens / rates.TOKEN_RATE
    return CommitTimes(
        by_speech=tuple((seconds, Spread.of(taken).scaled(1000)) for seconds, taken in by_speech.items()),
        by_turn=tuple((turn, Spread.of(taken).scaled(1000)) for turn, taken in by_turn.items()),
        open_block_s=tuple((seconds, seconds % block_s) for seconds in speech_s),
    )


def _new_session(bot: Chatbot, seed: int) -> Session:
    return bot.session(sampling=dataclasses.replace(bot.models.card.sampling, seed=seed))


def _question(seconds: float, index: int) -> NDArray[np.float32]:
    """Recorded speech that begins with a faint noise of its own, so that the engine has not seen this prompt before."""
    wav = speech_of(seconds).copy()
    noise = np.random.default_rng(index).standard_normal(rates.SAMPLES_PER_TOKEN).astype(np.float32)
    wav[: rates.SAMPLES_PER_TOKEN] += 1e-2 * noise
    return np.clip(wav, -1.0, 1.0)


async def say(session: Session, wav: NDArray[np.float32]) -> None:
    """Speaks to a session, the last moment in real time; returns when the last sample is due."""
    pieces = chunks(wav, CHUNK_MS)
    num_early = max(len(pieces) - round(1000 * REAL_TIME_S / CHUNK_MS), 0)
    due = time.perf_counter()
    for index, piece in enumerate(pieces):
        due += len(piece) / rates.LISTEN_SAMPLE_RATE / (EARLY_SPEED if index < num_early else 1)
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        await session.hear(piece)


async def _first_token(bot: Chatbot, session: Session, question: NDArray[np.float32], num_tokens: int) -> float:
    """Seconds until the reply's first token; the reply goes on to so many tokens."""
    await say(session, question)
    start, waited = time.perf_counter(), None
    async for event in session.reply(max_tokens=num_tokens):
        if waited is None and isinstance(event, TextDelta | SpeechDelta):
            waited = time.perf_counter() - start
    if waited is None:
        raise ValueError(f"{bot.models.card.name} ended a reply at once, so no first token could be measured")
    return waited
