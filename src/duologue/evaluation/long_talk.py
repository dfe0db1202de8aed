"""One long conversation: are replies as right and as quick at its end as at its beginning, and when asked again?"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from duologue.client.connection import WIRE_RATE
from duologue.evaluation.caller import Caller, Connect, calling
from duologue.evaluation.scores import Score
from duologue.evaluation.turn_taking import ANSWER_S, Question
from duologue.machine import resident_mb

SUBSET, REPEATED = "long talk", "repeated question"
DISTANCES = (1, 10, 100)  # turns until a question is asked again
NUM_COMPARED = 50  # turns at either end, or half of all
GAP_S = (0.3, 1.5)  # from the end of a reply to the next question


@dataclass(frozen=True)
class TalkedTurn:
    """One question and its answer.

    Attributes:
        minute: of the conversation, at its end.
        computed_s: from the detected end of the question to the first audio, by the real clock; None without audio.
        memory_mb: resident memory of this process after it.
    """

    question: str
    answer: str
    is_right: bool
    minute: float
    computed_s: float | None
    memory_mb: float


async def talk(
    connect: Connect, questions: Sequence[Question], minutes: float, seed: int = 0
) -> AsyncIterator[TalkedTurn]:
    """Asks the questions in random order for this long. Raises ValueError if the server ends the conversation."""
    rng = np.random.default_rng(seed)
    async with calling(connect) as caller:
        while caller.at < 60 * minutes * WIRE_RATE:
            yield await _ask(caller, questions[int(rng.integers(len(questions)))])
            await caller.wait(float(rng.uniform(*GAP_S)))


async def _ask(caller: Caller, question: Question) -> TalkedTurn:
    caller.forget()
    before = len(caller.exchanges)
    await caller.say(question.pcm)
    await caller.listen(lambda: bool(caller.of("response.done")), ANSWER_S)
    await caller.listen(lambda: not caller.waits, ANSWER_S)
    answer = " ".join(one.answer.strip() for one in caller.exchanges[before:])
    stops, deltas = caller.of("input_audio_buffer.speech_stopped"), caller.of("response.output_audio.delta")
    computed_s = deltas[0].seen_s - stops[0].seen_s if stops and deltas else None
    minute = caller.at / WIRE_RATE / 60
    return TalkedTurn(question.name, answer, question.answered_by(answer), minute, computed_s, resident_mb())


def talk_scores(turns: Sequence[TalkedTurn]) -> Iterator[Score]:
    """Rightness and computation at either end, and of questions asked again after 1, 10 and 100 turns."""
    num = min(NUM_COMPARED, len(turns) // 2)
    ends = {"first": turns[:num], "last": turns[len(turns) - num :]}
    for end, own in ends.items():
        name = f"{end} {len(own)} turns"
        for number, turn in enumerate(own):
            yield Score(f"{end}-{number}", SUBSET, f"right, text, {name}", float(turn.is_right))
            if turn.computed_s is not None:
                measure = f"computation to the first audio, {name}"
                yield Score(f"{end}-{number}", SUBSET, measure, turn.computed_s, unit="s", better="lower")
    for distance in DISTANCES:
        for number, (turn, again) in enumerate(zip(turns, turns[distance:], strict=False)):
            if turn.question == again.question and turn.is_right:
                name = f"right again after {distance} turn{'s' * (distance > 1)}"
                yield Score(f"turn-{number}", REPEATED, name, float(again.is_right))
