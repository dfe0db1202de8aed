"""The measures of conversations: each is a function of the exchanges and gives rows of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from duologue.evaluation.conversations import TYPED, ScoredExchange
from duologue.evaluation.intelligibility import error_row, quality_row
from duologue.evaluation.intervals import wilson
from duologue.evaluation.prosody import style_moved, style_name
from duologue.evaluation.report import Row, difference_row
from duologue.evaluation.testset import SEEN, SPLIT_NAMES, SPLITS, UNSEEN, WARPED

OPEN_INTENTS = ("repeat", "say")
MIN_QUESTIONS = 300  # of a voice group: with fewer the interval is wide, and the row says so
UNDERSTANDING_AIMS = {SEEN: 0.95, UNSEEN: 0.88, WARPED: 0.88, TYPED: 0.98}
GROUP_NAMES = {**SPLIT_NAMES, TYPED: "typed"}
PITCH_STYLES = ("higher", "lower")


def open_vocabulary_rows(exchanges: Sequence[ScoredExchange], why_not: str) -> list[Row]:
    """ "Repeat after me" with random words: are they in the text of the reply, and in its sound?"""
    group = "open vocabulary"
    chosen = [one for one in exchanges if one.last and one.intent in OPEN_INTENTS]
    rows = [error_row(group, "WER of the reply's text", [(one.expected, one.said) for one in chosen], 0.05)]
    if why_not:
        return [*rows, Row(group, "WER of what is heard", None, "%", 0.1, skipped=why_not)]
    heard = error_row(group, "WER of what is heard", [(one.expected, one.heard or "") for one in chosen], 0.1)
    pairs = [(one.expected, one.heard_reference or "") for one in chosen]
    reference = error_row(group, "WER of the reference audio", pairs)
    return [*rows, heard, reference, difference_row(group, "WER lost against the reference", heard, reference, None)]


def understanding_rows(exchanges: Sequence[ScoredExchange]) -> list[Row]:
    """S->T: the share of questions whose answer stands in the text of the reply, by intent; the same of typed ones."""
    return [
        _share_row(exchanges, "understanding", "S->T", split, lambda one: one.correct, aim)
        for split, aim in UNDERSTANDING_AIMS.items()
    ]


def single_question_rows(exchanges: Sequence[ScoredExchange]) -> list[Row]:
    """The same of single questions, see `conversations.ask_singly`. They have no aim of their own."""
    name = "single questions, in writing"
    rows = [_share_row(exchanges, "understanding", name, split, lambda one: one.correct) for split in SPLITS]
    return [replace(row, parts={}) for row in rows]


def speaking_rows(exchanges: Sequence[ScoredExchange], why_not: str) -> list[Row]:
    """S->S: the answer is found in what is read of the reply's sound; after it, in that of the reference replies."""
    group = "speaking"
    if why_not:
        return [Row(group, f"S->S, {SPLIT_NAMES[split]}", None, "%", skipped=why_not) for split in SPLITS]
    rows = []
    for split in SPLITS:
        heard = _share_row(exchanges, group, "S->S", split, lambda one: one.heard_correct)
        written = _share_row(exchanges, group, "S->T", split, lambda one: one.correct)
        ceiling = _share_row(
            exchanges, group, "answers heard in the reference audio", split, lambda one: one.reference_correct
        )
        lost = f"S->S behind S->T, {SPLIT_NAMES[split]}"
        rows += [heard, difference_row(group, lost, written, heard, 0.03), replace(ceiling, parts={})]
    return rows


def agreement_row(exchanges: Sequence[ScoredExchange], why_not: str) -> Row:
    """Does the sound of a reply say what its text says?"""
    name = "WER between the reply's text and what is heard"
    if why_not:
        return Row("agreement", name, None, "%", 0.05, skipped=why_not)
    pairs = [(one.said, one.heard or "") for one in exchanges]
    return error_row("agreement", name, pairs, 0.05, [one.dialogue for one in exchanges])


def reply_quality_row(exchanges: Sequence[ScoredExchange], why_not: str) -> Row:
    """DNSMOS of the replies that were judged."""
    if why_not:
        return Row("naturalness", "DNSMOS of replies", None, "MOS", 3.0, "at least", skipped=why_not)
    values = [one.quality for one in exchanges if one.quality is not None]
    return quality_row("naturalness", "DNSMOS of replies", values, 3.0)


def refusal_rows(exchanges: Sequence[ScoredExchange]) -> list[Row]:
    """Outside of the curriculum the honest reply is a refusal; inside of it a refusal is a fault."""
    group = "refusals"
    last = [one for one in exchanges if one.last]
    outside = [(one.intent, one.refused) for one in last if one.is_outside]
    known = [(one.intent, one.refused) for one in last if not one.is_outside]
    return [
        _row_of_shares(group, "refused outside of the curriculum", outside, 0.9),
        replace(_row_of_shares(group, "refused of what it knows", known, 0.03, "at most"), parts={}),
    ]


def style_rows(exchanges: Sequence[ScoredExchange]) -> list[Row]:
    """The share of replies in a style that moved the asked way against a plain rendition: pace and level, pitch."""
    asked = [(style_name(one.style), one.change) for one in exchanges if one.change is not None]
    rows = []
    for name, is_pitch, aim in (("speed and level", False, 0.95), ("pitch", True, 0.8)):
        own = [(style, change) for style, change in asked if (style in PITCH_STYLES) == is_pitch]
        moved = [(style, style_moved(style, change)) for style, change in own if not math.isnan(change)]
        row = _row_of_shares("style", f"{name} move the asked way", moved, aim)
        if not moved:
            why = f"none of {len(own)} replies in a style could be compared with a plain rendition of the same words"
            row = replace(row, skipped=why)
        rows.append(replace(row, note=f"compared {len(moved)} of {len(own)}"))
    return rows


def time_rows(exchanges: Sequence[ScoredExchange]) -> list[Row]:
    """Time to first audio after the end of the question, and real-time factor of the replies."""
    spoken = [one for one in exchanges if one.first_audio_s is not None and one.audio_s > 0]
    if not spoken:
        why = "no reply had any sound"
        return [Row("time", name, None, skipped=why) for name in ("to first audio, p50", "real-time factor, p50")]
    first = [one.first_audio_s or 0.0 for one in spoken]
    factors = [one.total_s / one.audio_s for one in spoken]
    return [
        Row("time", "to first audio, p50", float(np.percentile(first, 50)), "s", 0.3, num=len(spoken)),
        Row("time", "to first audio, p95", float(np.percentile(first, 95)), "s", num=len(spoken)),
        Row("time", "real-time factor, p50", float(np.percentile(factors, 50)), "x", 0.4, num=len(spoken)),
        Row("time", "real-time factor, p95", float(np.percentile(factors, 95)), "x", num=len(spoken)),
    ]


def _share_row(
    exchanges: Sequence[ScoredExchange],
    group: str,
    name: str,
    split: str,
    right: Callable[[ScoredExchange], bool],
    aim: float | None = None,
) -> Row:
    """Share of the scored exchanges of a voice group that are right, and by intent."""
    chosen = [(one.intent, right(one)) for one in exchanges if one.last and one.split == split]
    row = _row_of_shares(group, f"{name}, {GROUP_NAMES[split]}", chosen, aim)
    return replace(row, note=f"fewer than {MIN_QUESTIONS} questions") if 0 < row.num < MIN_QUESTIONS else row


def _row_of_shares(
    group: str, name: str, chosen: Sequence[tuple[str, bool]], aim: float | None, aim_is: str = "at least"
) -> Row:
    """Share of the (part, right) pairs that are right, by part, with its interval."""
    if not chosen:
        return Row(group, name, None, "%", aim, aim_is, skipped="the test set has no such dialogues")
    parts = {part: _share([ok for own, ok in chosen if own == part]) for part in sorted({own for own, _ in chosen})}
    all_right = [ok for _, ok in chosen]
    interval = wilson(sum(all_right), len(all_right))
    return Row(group, name, _share(all_right), "%", aim, aim_is, len(all_right), parts=parts, interval=interval)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
