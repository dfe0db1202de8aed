"""Conversations with the whole chain: every test question is asked once, the measures are functions of the replies."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duologue.conversation.chatbot import Chatbot, Reply
from duologue.evaluation.intelligibility import Naturalness
from duologue.evaluation.prosody import PLAIN, Prosody, measure_prosody, style_change
from duologue.evaluation.recognition import SoundRecognizer
from duologue.evaluation.testset import TestClip, TestDialogue, TestSet, TestTurn, spread
from duologue.progress import steps
from duologue.scoring import is_correct, normalize

TYPED = "typed"
MAX_TYPED = 400  # dialogues
MAX_JUDGED = 200  # dialogues whose last reply is judged by DNSMOS
# A reply with one of these refuses to answer or says that it did not understand.
REFUSALS = (
    *("sorry i do not know", "can not help", "did not understand", "could not understand", "do not understand"),
    *("did not hear", "did not catch", "could not hear", "say that again", "do not know that"),
)


@dataclass(frozen=True, eq=False)
class Waveform:
    """wav (S,) float32 in [-1, 1]."""

    wav: NDArray[np.float32]
    sample_rate: int


@dataclass(frozen=True)
class ScoredExchange:
    """One question of a test dialogue, and what the chatbot made of it.

    Attributes:
        split: the voice group, or "typed" for a question in writing, or "bundled".
        last: whether it ends its dialogue; only such replies are scored, the ones before them are the model's own
            history.
        heard: what the recognizer reads in the reply's sound; None where no recognizer listened.
        heard_reference: the same of the reference reply.
        change: effect of the style on its measure; None where no style was requested. It is NaN where the reply could
            not be compared with a plain rendition of the same words.
        transcript: what the tokenizer's recognition head reads in the question; None where there is no head.
        quality: DNSMOS of the reply, where it was judged.
        question_sound, reply_sound: kept for the page of players.
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
    heard: str | None
    heard_reference: str | None
    change: float | None
    first_audio_s: float | None
    audio_s: float
    total_s: float
    transcript: str | None = None
    quality: float | None = None
    question_sound: Waveform | None = field(default=None, repr=False, compare=False)
    reply_sound: Waveform | None = field(default=None, repr=False, compare=False)

    @property
    def correct(self) -> bool:
        """An accepted answer stands in the text of the reply."""
        return is_correct(self.said, self.answers)

    @property
    def heard_correct(self) -> bool:
        """The recognizer finds an accepted answer in the sound of the reply."""
        return is_correct(self.heard or "", self.answers)

    @property
    def reference_correct(self) -> bool:
        """The recognizer finds an accepted answer in the sound of the reference reply."""
        return is_correct(self.heard_reference or "", self.answers)

    @property
    def is_outside(self) -> bool:
        """The curriculum has no answer: its reply is a refusal."""
        return refuses(self.expected)

    @property
    def refused(self) -> bool:
        """The reply's text is a refusal."""
        return refuses(self.said)


def refuses(text: str) -> bool:
    """Whether a text says that there is no answer: "Sorry, I do not know that.", "Can you say that again?" """
    return is_correct(text, REFUSALS)


def converse(
    bot: Chatbot,
    test_set: TestSet,
    recognizer: SoundRecognizer | None,
    naturalness: Naturalness | None = None,
    transcripts: Mapping[str, str] | None = None,
    keep_sound: Collection[str] = (),
) -> list[ScoredExchange]:
    """Asks every question of the test set aloud, dialogue by dialogue, and listens to every reply.

    Args:
        transcripts: what the recognition head reads in each question, by clip id.
        keep_sound: ids of the dialogues whose sound the exchanges keep.
    """
    references: dict[str, str] = {}
    by_group = sorted(test_set.dialogues, key=lambda one: one.split)  # an even spread of alternating groups skips some
    judged = {dialogue.id for dialogue in spread(by_group, MAX_JUDGED)} if naturalness else set()

    def read_reference(clip: TestClip) -> str | None:
        if recognizer is not None and clip.id not in references:
            references[clip.id] = recognizer.transcribe(clip.wav, clip.sample_rate)
        return references.get(clip.id)

    exchanges = []
    for dialogue in steps(test_set.dialogues, "part 4 of 6, conversations", "dialogues"):
        replies = list(_ask(bot, dialogue, test_set.clips))
        for index, (turn, reply) in enumerate(zip(dialogue.turns, replies, strict=True)):
            question, last = test_set.clips[turn.question], index == len(replies) - 1
            is_kept, is_judged = dialogue.id in keep_sound, last and dialogue.id in judged and reply.audio.size
            exchanges.append(
                ScoredExchange(
                    **_head(dialogue, turn, last, reply),
                    split=dialogue.split,
                    heard=None if recognizer is None else recognizer.transcribe(reply.audio, reply.sample_rate),
                    heard_reference=read_reference(test_set.clips[turn.reply]) if last else None,
                    change=None if turn.style == PLAIN else _change(bot, dialogue, replies, index),
                    transcript=(transcripts or {}).get(turn.question),
                    quality=naturalness(reply.audio, reply.sample_rate) if naturalness and is_judged else None,
                    question_sound=Waveform(question.wav, question.sample_rate) if is_kept else None,
                    reply_sound=Waveform(reply.audio, reply.sample_rate) if is_kept else None,
                )
            )
    return exchanges


def type_questions(bot: Chatbot, test_set: TestSet, keep_sound: Collection[str] = ()) -> list[ScoredExchange]:
    """Asks the questions in writing: at most `MAX_TYPED` dialogues, each wording once, none with a wordless sound."""
    unlike = {tuple(turn.question_text for turn in one.turns): one for one in reversed(test_set.dialogues)}
    dialogues = [one for questions, one in unlike.items() if all(questions)][::-1]
    exchanges = []
    for dialogue in steps(list(spread(dialogues, MAX_TYPED)), "part 5 of 6, typed questions", "dialogues"):
        session = bot.session()
        for turn in dialogue.turns:
            session.write(turn.question_text)
            reply = session.reply_now()
            exchanges.append(
                ScoredExchange(
                    **_head(dialogue, turn, turn is dialogue.turns[-1], reply),
                    split=TYPED,
                    heard=None,
                    heard_reference=None,
                    change=None,
                    reply_sound=Waveform(reply.audio, reply.sample_rate) if dialogue.id in keep_sound else None,
                )
            )
    return exchanges


def ask_singly(bot: Chatbot, test_set: TestSet) -> list[ScoredExchange]:
    """Asks the first question of each dialogue aloud, in a conversation of its own, and has it answered in writing."""
    exchanges = []
    for dialogue in steps(test_set.dialogues, "part 6 of 6, single questions", "questions"):
        turn = dialogue.turns[0]
        question = test_set.clips[turn.question]
        reply = bot.chat(question.wav, question.sample_rate, text_only=True)
        head = _head(dialogue, turn, True, reply)
        exchanges.append(ScoredExchange(**head, split=dialogue.split, heard=None, heard_reference=None, change=None))
    return exchanges


def _head(dialogue: TestDialogue, turn: TestTurn, last: bool, reply: Reply) -> dict[str, Any]:
    """What an exchange has whichever way it was asked."""
    return {
        "dialogue": dialogue.id,
        "intent": dialogue.intent,
        "last": last,
        "style": turn.style,
        "asked": turn.question_text,
        "expected": turn.reply_text,
        "answers": turn.answers,
        "said": reply.text,
        "first_audio_s": reply.timings.first_audio_s,
        "audio_s": reply.timings.audio_s,
        "total_s": reply.timings.total_s,
    }


def _ask(bot: Chatbot, dialogue: TestDialogue, clips: dict[str, TestClip]) -> Iterator[Reply]:
    session = bot.session()
    for turn in dialogue.turns:
        clip = clips[turn.question]
        session.feed(clip.wav, clip.sample_rate)
        yield session.reply_now()


def _change(bot: Chatbot, dialogue: TestDialogue, replies: Sequence[Reply], index: int) -> float:
    """Effect of the style on a reply, against a plain reply with the same words.

    The plain reply is the previous one where its words are the same; otherwise it is requested in writing."""
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
