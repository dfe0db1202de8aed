"""The recorded questions that come with the package, asked aloud: is the answer right, and can it be read back?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from duologue.config import parse_config, read_json
from duologue.conversation.chatbot import Chatbot, model_folder
from duologue.evaluation.conversations import EARS, ScoredExchange, ears_of, listen
from duologue.evaluation.intelligibility import Recogniser
from duologue.evaluation.prosody import PLAIN
from duologue.evaluation.report import Row

GROUP = "bundled questions"
QUESTIONS_FILE = "questions.json"


@dataclass(frozen=True)
class BundledQuestion:
    """A recording beside `questions.json`, what it asks, and texts of which one must be in the reply."""

    file: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class BundledQuestions:
    """What `questions.json` holds."""

    questions: tuple[BundledQuestion, ...]


def ask_bundled(bot: Chatbot, recognisers: Mapping[str, Recogniser]) -> list[ScoredExchange]:
    """One exchange for each recording, without any history; its intent is the name of the recording."""
    folder = model_folder()
    listed = parse_config(BundledQuestions, read_json(folder / QUESTIONS_FILE), str(folder / QUESTIONS_FILE))
    exchanges = []
    for question in listed.questions:
        reply = bot.chat(folder / question.file)
        exchanges.append(
            ScoredExchange(
                dialogue=question.file,
                intent=Path(question.file).stem,
                split="bundled",
                last=True,
                style=PLAIN,
                asked=question.text,
                expected="",
                answers=question.answers,
                said=reply.text,
                heard=listen(recognisers, reply.audio, reply.sample_rate),
                heard_reference={},
                change=None,
                first_audio_s=reply.timings.first_audio_s,
                audio_s=reply.timings.audio_s,
                total_s=reply.timings.total_s,
            )
        )
    return exchanges


def bundled_rows(exchanges: Sequence[ScoredExchange], why_not: str) -> list[Row]:
    """Shares of right answers in the text of the reply and in what is heard of it, and which they are."""
    rows = [_row(exchanges, "right in the text", lambda one: one.correct)]
    if why_not:
        return [*rows, Row(GROUP, "answer heard", None, "%", skipped=why_not)]
    return rows + [
        _row(exchanges, f"answer heard{EARS[ears]}", partial(ScoredExchange.heard_correct, ears=ears))
        for ears in ears_of(exchanges)
    ]


def _row(exchanges: Sequence[ScoredExchange], name: str, right: Callable[[ScoredExchange], bool]) -> Row:
    parts = {one.intent: float(right(one)) for one in exchanges}
    return Row(GROUP, name, sum(parts.values()) / len(parts), "%", 1.0, "at least", len(parts), parts=parts)
