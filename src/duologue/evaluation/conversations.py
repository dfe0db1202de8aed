"""Conversations with the whole chain: every test question is asked once, the measures are functions of the replies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from duologue.conversation.chatbot import Chatbot, Reply
from duologue.evaluation.intelligibility import Recogniser, error_row
from duologue.evaluation.prosody import PLAIN, Prosody, measure_prosody, style_change, style_moved, style_name
from duologue.evaluation.report import Row, difference_row
from duologue.evaluation.scoring import is_correct, normalize
from duologue.evaluation.testset import SEEN, SPLIT_NAMES, SPLITS, UNSEEN, TestClip, TestDialogue, TestSet

OPEN_INTENTS = ("repeat", "say")
# Recognisers, and what the rows call what they hear.
OPEN, CURRICULUM = "open", "curriculum"
EARS = {OPEN: "", CURRICULUM: " over the curriculum"}


@dataclass(frozen=True)
class ScoredExchange:
    """One question of a test dialogue, asked aloud, and what the chatbot made of it.

    Attributes:
        last: whether it ends its dialogue; only such replies are scored, the ones before them are the model's own
            history.
        heard: what each recogniser reads in the reply's sound.
        heard_reference: the same of the reference reply.
        change: how far the style moved its measure; None where no style was asked for, NaN where the reply could not be
            compared with a plain rendition of the same words.
    """

    dialogue: str
    intent: str
    split: str
    last: bool
    style: str
    asked: str
    expected: str
    answers: tuple[str, ...]
    said: str
    heard: Mapping[str, str]
    heard_reference: Mapping[str, str]
    change: float | None
    first_audio_s: float | None
    audio_s: float
    total_s: float

    @property
    def correct(self) -> bool:
        """An accepted answer stands in the text of the reply."""
        return is_correct(self.said, self.answers)

    def heard_correct(self, ears: str) -> bool:
        """A recogniser finds an accepted answer in the sound of the reply."""
        return is_correct(self.heard[ears], self.answers)

    def reference_correct(self, ears: str) -> bool:
        """A recogniser finds an accepted answer in the sound of the reference reply."""
        return is_correct(self.heard_reference[ears], self.answers)


def listen(recognisers: Mapping[str, Recogniser], wav: NDArray[np.float32], sample_rate: int) -> dict[str, str]:
    """What each recogniser reads in wav (S,)."""
    return {name: recogniser.transcribe(wav, sample_rate) for name, recogniser in recognisers.items()}


def converse(bot: Chatbot, test_set: TestSet, recognisers: Mapping[str, Recogniser]) -> list[ScoredExchange]:
    """Asks every question of the test set aloud, dialogue by dialogue, and listens to every reply."""
    references: dict[str, Mapping[str, str]] = {}

    def listen_to_reference(clip: TestClip) -> Mapping[str, str]:
        if clip.id not in references:
            references[clip.id] = listen(recognisers, clip.wav, clip.sample_rate)
        return references[clip.id]

    exchanges = []
    for dialogue in tqdm(test_set.dialogues, "conversations", disable=None, leave=False):
        replies = list(_ask(bot, dialogue, test_set.clips))
        for index, (turn, reply) in enumerate(zip(dialogue.turns, replies, strict=True)):
            exchanges.append(
                ScoredExchange(
                    dialogue=dialogue.id,
                    intent=dialogue.intent,
                    split=dialogue.split,
                    last=index == len(replies) - 1,
                    style=turn.style,
                    asked=turn.question_text,
                    expected=turn.reply_text,
                    answers=turn.answers,
                    said=reply.text,
                    heard=listen(recognisers, reply.audio, reply.sample_rate),
                    heard_reference=listen_to_reference(test_set.clips[turn.reply]),
                    change=None if turn.style == PLAIN else _change(bot, dialogue, replies, index),
                    first_audio_s=reply.timings.first_audio_s,
                    audio_s=reply.timings.audio_s,
                    total_s=reply.timings.total_s,
                )
            )
    return exchanges


def ears_of(exchanges: Sequence[ScoredExchange]) -> list[str]:
    """The recognisers that listened."""
    return [name for name in EARS if exchanges and name in exchanges[0].heard]


def open_vocabulary_rows(exchanges: Sequence[ScoredExchange], why_not: str) -> list[Row]:
    """ "Repeat after me" with random words: are they in the text of the reply, and in its sound?"""
    group = "open vocabulary"
    chosen = [one for one in exchanges if one.last and one.intent in OPEN_INTENTS]
    rows = [error_row(group, "WER of the reply's text", [(one.expected, one.said) for one in chosen], aim=0.1)]
    if why_not:
        return [*rows, Row(group, "WER of what is heard", None, skipped=why_not)]
    for ears in ears_of(exchanges):
        heard = error_row(
            group, f"WER of what is heard{EARS[ears]}", [(one.expected, one.heard[ears]) for one in chosen]
        )
        reference = error_row(
            group,
            f"WER of the reference audio{EARS[ears]}",
            [(one.expected, one.heard_reference[ears]) for one in chosen],
        )
        lost = f"WER lost against the reference{EARS[ears]}"
        rows += [heard, reference, difference_row(group, lost, heard, reference, 0.1)]
    return rows


def understanding_rows(exchanges: Sequence[ScoredExchange]) -> list[Row]:
    """S->T: the share of spoken questions whose answer stands in the text of the reply, by intent."""
    return [
        _share_row(exchanges, "understanding", "S->T", split, lambda one: one.correct, aim)
        for split, aim in ((SEEN, 0.9), (UNSEEN, 0.8))
    ]


def speaking_rows(exchanges: Sequence[ScoredExchange], why_not: str) -> list[Row]:
    """S->S: the answer is found in what a recogniser hears of the reply; beside it, in the reference replies."""
    group = "speaking"
    if why_not:
        return [Row(group, f"S->S, {SPLIT_NAMES[split]}", None, skipped=why_not) for split in SPLITS]
    rows = []
    for ears in ears_of(exchanges):
        right = partial(ScoredExchange.heard_correct, ears=ears)
        possible = partial(ScoredExchange.reference_correct, ears=ears)
        for split in SPLITS:
            heard = _share_row(exchanges, group, f"S->S{EARS[ears]}", split, right)
            written = _share_row(exchanges, group, "S->T", split, lambda one: one.correct)
            ceiling = _share_row(exchanges, group, f"answers heard in the reference audio{EARS[ears]}", split, possible)
            lost = f"S->S behind S->T{EARS[ears]}, {SPLIT_NAMES[split]}"
            rows += [heard, difference_row(group, lost, written, heard, 0.1), replace(ceiling, parts={})]
    return rows


def agreement_rows(exchanges: Sequence[ScoredExchange], why_not: str) -> list[Row]:
    """Does the sound of a reply say what its text says?"""
    name = "WER between the reply's text and what is heard"
    if why_not:
        return [Row("agreement", name, None, skipped=why_not)]
    return [
        error_row("agreement", f"{name}{EARS[ears]}", [(one.said, one.heard[ears]) for one in exchanges])
        for ears in ears_of(exchanges)
    ]


def style_row(exchanges: Sequence[ScoredExchange]) -> Row:
    """The share of replies in a style whose pace, pitch or level moved the asked way against a plain rendition."""
    asked = [one for one in exchanges if one.change is not None]
    compared = [(style_name(one.style), one.change) for one in asked if not math.isnan(one.change or 0.0)]
    name = "moves the asked way"
    if not compared:
        why = f"none of {len(asked)} replies in a style could be compared with a plain rendition of the same words"
        return Row("style", name, None, "%", skipped=why)
    moved = [(style, style_moved(style, change or 0.0)) for style, change in compared]
    parts = {style: _share([ok for own, ok in moved if own == style]) for style in sorted({s for s, _ in moved})}
    note = f"compared {len(compared)} of {len(asked)}"
    return Row("style", name, _share([ok for _, ok in moved]), "%", 0.9, "at least", len(moved), note, parts=parts)


def time_rows(exchanges: Sequence[ScoredExchange]) -> list[Row]:
    """Time to first audio after the end of the question, and real-time factor of the replies."""
    spoken = [one for one in exchanges if one.first_audio_s is not None and one.audio_s > 0]
    if not spoken:
        why = "no reply had any sound"
        return [Row("time", name, None, skipped=why) for name in ("to first audio, p50", "real-time factor, p50")]
    first = [one.first_audio_s or 0.0 for one in spoken]
    factors = [one.total_s / one.audio_s for one in spoken]
    return [
        Row("time", "to first audio, p50", float(np.percentile(first, 50)), "s", 1.0, num=len(spoken)),
        Row("time", "to first audio, p95", float(np.percentile(first, 95)), "s", num=len(spoken)),
        Row("time", "real-time factor, p50", float(np.percentile(factors, 50)), "x", 0.6, num=len(spoken)),
        Row("time", "real-time factor, p95", float(np.percentile(factors, 95)), "x", num=len(spoken)),
    ]


def _ask(bot: Chatbot, dialogue: TestDialogue, clips: dict[str, TestClip]) -> Iterator[Reply]:
    session = bot.session()
    for turn in dialogue.turns:
        clip = clips[turn.question]
        session.feed(clip.wav, clip.sample_rate)
        yield session.reply_now()


def _change(bot: Chatbot, dialogue: TestDialogue, replies: Sequence[Reply], index: int) -> float:
    """How far a reply in a style moved against the same words said plainly: by the reply before it where the words are
    the same, else by asking for them in writing."""
    styled = replies[index]
    words = normalize(styled.text)
    if not words:
        return math.nan
    plain: Reply | None = None
    for turn, reply in zip(dialogue.turns[:index], replies[:index], strict=True):
        if turn.style == PLAIN and normalize(reply.text) == words:
            plain = reply
    if plain is None:
        plain = bot.chat(text=f"Say after me: {styled.text}")
        if normalize(plain.text) != words:
            return math.nan
    return style_change(dialogue.turns[index].style, _prosody(styled), _prosody(plain))


def _prosody(reply: Reply) -> Prosody:
    return measure_prosody(reply.audio, reply.sample_rate, reply.text)


def _share_row(
    exchanges: Sequence[ScoredExchange],
    group: str,
    name: str,
    split: str,
    right: Callable[[ScoredExchange], bool],
    aim: float | None = None,
) -> Row:
    """Share of the scored exchanges of a split that are right, and by intent."""
    chosen = [(one.intent, right(one)) for one in exchanges if one.last and one.split == split]
    name = f"{name}, {SPLIT_NAMES[split]}"
    if not chosen:
        return Row(group, name, None, "%", skipped="the test set has no such dialogues")
    parts = {
        intent: _share([ok for own, ok in chosen if own == intent]) for intent in sorted({own for own, _ in chosen})
    }
    return Row(group, name, _share([ok for _, ok in chosen]), "%", aim, "at least", len(chosen), parts=parts)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
