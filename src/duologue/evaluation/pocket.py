"""The suite `pocket`: every row of the table of the recipe, on the held-out test set."""

from __future__ import annotations

from typing import Any

from duologue import machine
from duologue.conversation.chatbot import Chatbot
from duologue.evaluation.bundled import ask_bundled, bundled_rows
from duologue.evaluation.conversations import (
    CURRICULUM,
    OPEN,
    ScoredExchange,
    agreement_rows,
    converse,
    open_vocabulary_rows,
    speaking_rows,
    style_row,
    time_rows,
    understanding_rows,
)
from duologue.evaluation.intelligibility import Naturalness, Recogniser, if_available
from duologue.evaluation.parts import decoder_rows, tokenizer_rows
from duologue.evaluation.report import Report
from duologue.evaluation.testset import TestSet
from duologue.tokenizer.recognizer import Recognizer
from duologue.tokenizer.speech_recognizer import SpeechRecognizer


def evaluate_pocket(
    bot: Chatbot,
    test_set: TestSet,
    recognizer: Recognizer | SpeechRecognizer | None,
    *,
    model: dict[str, Any],
    settings: dict[str, Any] | None = None,
) -> Report:
    """All rows.

    Args:
        recognizer: the recognition head that was trained with the tokenizer; without it its row is skipped.
        model: name and hashes, for the report.
    """
    recogniser, why_not = if_available(Recogniser)
    naturalness, why_no_mos = if_available(Naturalness)
    rows = [
        *tokenizer_rows(bot.models, test_set, recognizer),
        *decoder_rows(bot.models, test_set, recogniser, why_not, naturalness, why_no_mos),
    ]
    recognisers = {} if recogniser is None else {OPEN: recogniser}
    if recogniser is not None and test_set.curriculum is not None:
        recognisers[CURRICULUM] = Recogniser(test_set.curriculum)
    bundled = ask_bundled(bot, recognisers)
    exchanges = converse(bot, test_set, recognisers)
    rows += [
        *bundled_rows(bundled, why_not),
        *open_vocabulary_rows(exchanges, why_not),
        *understanding_rows(exchanges),
        *speaking_rows(exchanges, why_not),
        *agreement_rows(exchanges, why_not),
        style_row(exchanges),
        *time_rows(exchanges),
    ]
    return Report(
        "pocket", model, machine.describe(), tuple(rows), settings or {}, tuple(map(_sample, (*bundled, *exchanges)))
    )


def _sample(one: ScoredExchange) -> dict[str, Any]:
    """What the results file keeps of an exchange."""
    kept = ("dialogue", "intent", "split", "style", "asked", "said")
    return {**{name: getattr(one, name) for name in kept}, "heard": dict(one.heard), "correct": one.correct}
