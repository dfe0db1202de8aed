"""The suite `pocket`: every row of the table of the recipe, on the held-out test set."""

from __future__ import annotations

from typing import Any

from duologue import machine
from duologue.chatbot import Chatbot
from duologue.evaluation.conversations import (
    Exchange,
    agreement_row,
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


def evaluate_pocket(
    bot: Chatbot,
    test_set: TestSet,
    recognizer: Recognizer | None,
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
    exchanges = converse(bot, test_set, recogniser)
    rows += [
        *open_vocabulary_rows(exchanges, why_not),
        *understanding_rows(exchanges),
        *speaking_rows(exchanges, why_not),
        agreement_row(exchanges, why_not),
        style_row(exchanges),
        *time_rows(exchanges),
    ]
    return Report(
        "pocket", model, machine.describe(), tuple(rows), settings or {}, tuple(_sample(one) for one in exchanges)
    )


def _sample(one: Exchange) -> dict[str, Any]:
    """What the results file keeps of an exchange."""
    kept = ("dialogue", "intent", "split", "style", "asked", "said", "heard")
    return {**{name: getattr(one, name) for name in kept}, "correct": one.correct}
