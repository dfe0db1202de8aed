"""The suite `pocket`: every row of the table of the recipe, on the held-out test set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from duologue import machine
from duologue.conversation.chatbot import Chatbot
from duologue.evaluation.bundled import NUM_VARIANTS, ask_bundled, ask_variants, bundled_rows, load_bundled
from duologue.evaluation.conversations import ScoredExchange, ask_singly, converse, type_questions
from duologue.evaluation.intelligibility import Naturalness, if_available
from duologue.evaluation.measures import (
    agreement_row,
    open_vocabulary_rows,
    refusal_rows,
    reply_quality_row,
    single_question_rows,
    speaking_rows,
    style_rows,
    time_rows,
    understanding_rows,
)
from duologue.evaluation.parts import decoder_rows, short_speech, tokenize, tokenizer_rows
from duologue.evaluation.recognition import SoundRecognizer
from duologue.evaluation.report import Report
from duologue.evaluation.testset import SPLITS, TestSet, spread


@dataclass(frozen=True)
class Evaluated:
    """A report, and the exchanges whose sound was kept for the page of players."""

    report: Report
    shown: tuple[ScoredExchange, ...]


def evaluate_pocket(
    bot: Chatbot,
    test_set: TestSet,
    singles: TestSet,
    recognizer: SoundRecognizer | None,
    why_not: str,
    *,
    model: dict[str, Any],
    settings: dict[str, Any] | None = None,
    num_players: int = 0,
    num_variants: int = NUM_VARIANTS,
) -> Evaluated:
    """All rows.

    Args:
        singles: dialogues whose first question is also asked by itself and answered in writing. That takes a moment
            each, so there may be many.
        recognizer: reads the sound of the replies; None for the reason `why_not`, then rows that need it are skipped.
        model: name and hashes, for the report.
        num_players: exchanges at most whose sound is kept.
        num_variants: of the bundled questions in noise and rooms.
    """
    naturalness, why_no_mos = if_available(Naturalness)
    recordings = load_bundled()
    speech = short_speech(test_set)
    codes, transcripts = tokenize(bot.models.tokenizer, speech, bot.models.recognizer, "part 1 of 6, speech tokens")
    _, own_transcripts = tokenize(bot.models.tokenizer, [one.clip for one in recordings], bot.models.recognizer)
    rows = [
        *tokenizer_rows(bot.models, test_set, codes, transcripts),
        *decoder_rows(bot.models, test_set, recognizer, why_not, naturalness, why_no_mos),
    ]
    bundled = ask_bundled(bot, recordings, recognizer, own_transcripts)
    varied = ask_variants(bot, recordings, num_variants)
    kept = set(_dialogues_to_show(test_set, num_players - len(bundled)))
    exchanges = converse(bot, test_set, recognizer, naturalness, transcripts, kept)
    typed = type_questions(bot, test_set)
    rows += [
        *bundled_rows(bundled, varied, why_not),
        *open_vocabulary_rows(exchanges, why_not),
        *understanding_rows([*exchanges, *typed]),
        *single_question_rows(ask_singly(bot, singles)),
        *speaking_rows(exchanges, why_not),
        agreement_row(exchanges, why_not),
        reply_quality_row(exchanges, why_no_mos),
        *refusal_rows(exchanges),
        *style_rows(exchanges),
        *time_rows(exchanges),
    ]
    asked = (*bundled, *varied, *exchanges, *typed)
    report = Report("pocket", model, machine.describe(), tuple(rows), settings or {}, tuple(map(_sample, asked)))
    shown = [*bundled, *(one for one in exchanges if one.reply_sound is not None)][:num_players]
    return Evaluated(report, tuple(shown))


def _dialogues_to_show(test_set: TestSet, num_turns: int) -> Iterator[str]:
    """Ids of dialogues with at most `num_turns` turns in all, evenly spread over each voice group."""
    groups = [[one for one in test_set.dialogues if one.split == split] for split in SPLITS]
    groups = [group for group in groups if group]
    for group in groups:
        left = num_turns // len(groups)
        for dialogue in spread(group, max(0, left)):
            if len(dialogue.turns) <= left:
                left -= len(dialogue.turns)
                yield dialogue.id


def _sample(one: ScoredExchange) -> dict[str, Any]:
    """What the results file keeps of an exchange."""
    kept = ("dialogue", "intent", "split", "style", "asked", "transcript", "said", "heard", "correct")
    return {name: getattr(one, name) for name in kept}
