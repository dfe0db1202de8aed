"""The interleave: how text and speech tokens take turns inside one reply. The only place where 13 and 26 stand.

    text run | speech run | text run | speech run | ... | last text run | all the remaining speech | end

There is no end-of-text token. A text run holds up to 13 text tokens, a speech run exactly 26 speech tokens, unless it
is the last. A speech id inside a text run, or where the next text run would begin, means that the text is finished;
from then on only speech ids or the end can come. From this follows where each kind may stand (`InterleaveState`):

    position                           text   speech                   end
    before anything                    yes    yes, text is finished    no: an empty reply says nothing
    inside a text run                  yes    yes, text is finished    no: what was written would not be spoken
    after a full text run              no     yes                      no: likewise
    inside a speech run                no     yes                      yes: the run was the last one
    after a full speech run            yes    yes, text is finished    yes: text and speech ended together
    text finished                      no     yes                      yes

A schedule without speech (`TEXT_ONLY`) lets text and the end stand everywhere; one without text (`SPEECH_ONLY`) has its
text finished from the start. The same machine builds training data, constrains sampling, splits what was sampled and
goes on where a stream was cut. (GLM-4-Voice, section "streaming thoughts"; `web_demo.py` of its release.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum


class Kind(IntEnum):
    """What a token id of the joint vocabulary is. Values are stable: arrays of them are stored."""

    TEXT = 0
    SPEECH = 1
    END = 2  # ends a reply
    CONTROL = 3  # role markers and the like: never sampled
    PADDING = 4  # rows without a meaning: never sampled


@dataclass(frozen=True)
class Schedule:
    """Lengths of the runs in tokens. 0 leaves a modality out."""

    text_run: int = 13
    speech_run: int = 26

    def __post_init__(self) -> None:
        if self.text_run < 0 or self.speech_run < 0 or self.text_run + self.speech_run == 0:
            raise ValueError(
                f"a schedule needs runs of 0 or more tokens, not both 0, got text_run={self.text_run}, "
                f"speech_run={self.speech_run}"
            )

    def min_speech(self, num_text: int) -> int:
        """Speech tokens that a reply with `num_text` text tokens needs at least, so that every text run is followed
        by speech: full runs between the text runs and one token after the last."""
        if self.speech_run == 0:
            return 0
        if self.text_run == 0 or num_text == 0:
            return 1
        return (num_text - 1) // self.text_run * self.speech_run + 1


INTERLEAVED = Schedule()
TEXT_ONLY = Schedule(speech_run=0)
SPEECH_ONLY = Schedule(text_run=0)


@dataclass(frozen=True)
class Allowed:
    """Which kinds may come next."""

    text: bool
    speech: bool
    end: bool

    def __contains__(self, kind: Kind) -> bool:
        return (
            (kind is Kind.TEXT and self.text)
            or (kind is Kind.SPEECH and self.speech)
            or (kind is Kind.END and self.end)
        )

    @property
    def kinds(self) -> tuple[Allowed, ...]:
        """Each of the allowed kinds as the only one."""
        text, speech, end = Allowed(True, False, False), Allowed(False, True, False), Allowed(False, False, True)
        return tuple(one for one, may in ((text, self.text), (speech, self.speech), (end, self.end)) if may)

    def __str__(self) -> str:
        names = [name for name in ("text", "speech", "end") if getattr(self, name)]
        return " or ".join(names) if names else "nothing"


@dataclass
class InterleaveState:
    """Position inside one reply. Belongs to a session; `copy.copy` forks it.

    `run` is the modality of the run that the next token may continue and `run_length` its length so far; right after a
    full speech run it is the next text run, of length 0.
    """

    schedule: Schedule = INTERLEAVED
    run: Kind = Kind.TEXT
    run_length: int = 0
    text_finished: bool = False
    ended: bool = False
    num_text: int = 0
    num_speech: int = 0

    def __post_init__(self) -> None:
        if self.schedule.text_run == 0:
            self.text_finished = True

    @property
    def allowed(self) -> Allowed:
        """The kinds that may come next."""
        if self.ended:
            return Allowed(text=False, speech=False, end=False)
        if self.schedule.speech_run == 0:
            return Allowed(text=True, speech=False, end=True)
        text = self.run is Kind.TEXT and not self.text_finished and self.run_length < self.schedule.text_run
        after_speech = self.num_speech > 0 and (self.run is Kind.SPEECH or self.run_length == 0)
        return Allowed(text=text, speech=True, end=after_speech)

    def advance(self, kind: Kind) -> None:
        """Take one token of this kind.

        Raises:
            ValueError: the kind may not stand here; the state is unchanged then.
        """
        if kind not in self.allowed:
            raise ValueError(
                f"a {kind.name.lower()} token cannot stand after {self.num_text} text and {self.num_speech} speech "
                f"tokens of a reply in runs of {self.schedule.text_run} and {self.schedule.speech_run}: "
                f"only {self.allowed} can come"
            )
        if kind is Kind.END:
            self.ended = True
        elif kind is Kind.TEXT:
            self.num_text += 1
            self.run_length += 1
            if self.schedule.speech_run == 0 and self.run_length == self.schedule.text_run:
                self.run_length = 0  # a speech run of nothing follows, then the next text run
        else:
            if self.run is Kind.TEXT:
                if self.run_length < self.schedule.text_run:
                    self.text_finished = True
                self.run, self.run_length = Kind.SPEECH, 0
            self.num_speech += 1
            self.run_length += 1
            if not self.text_finished and self.run_length == self.schedule.speech_run:
                self.run, self.run_length = Kind.TEXT, 0

    def advance_all(self, kinds: Iterable[Kind]) -> InterleaveState:
        """Take several tokens and return this state: `InterleaveState(schedule).advance_all(kinds)` is the state from
        which a stream that was cut after `kinds` goes on."""
        for kind in kinds:
            self.advance(kind)
        return self


def weave(text: Sequence[int], speech: Sequence[int], schedule: Schedule = INTERLEAVED) -> list[int]:
    """Text and speech ids of one reply in the order in which the model produces them, without the end id.

    Raises:
        ValueError: the schedule leaves out a modality that is there, or the speech is over while text remains (speech
            so fast that text would not stay ahead), which includes a reply without any speech.
    """
    if text and schedule.text_run == 0:
        raise ValueError(f"a schedule without text cannot hold {len(text)} text tokens")
    if speech and schedule.speech_run == 0:
        raise ValueError(f"a schedule without speech cannot hold {len(speech)} speech tokens")
    needed = schedule.min_speech(len(text))
    if len(speech) < needed:
        raise ValueError(
            f"{len(text)} text tokens in runs of {schedule.text_run} need at least {needed} speech tokens in runs of "
            f"{schedule.speech_run} to stay ahead of the speech, got {len(speech)}"
        )
    if schedule.speech_run == 0:
        return list(text)
    woven: list[int] = []
    spoken = 0
    for start in range(0, len(text), schedule.text_run or 1):
        woven += text[start : start + schedule.text_run]
        woven += speech[spoken : spoken + schedule.speech_run]
        spoken += schedule.speech_run
    return woven + list(speech[spoken:])


@dataclass(frozen=True)
class Run:
    """A stretch of one kind: `ids[start:stop]` of the sequence that was split."""

    kind: Kind
    start: int
    stop: int


@dataclass
class Split:
    """A reply taken apart. `state` is the position behind its last token: `state.ended` tells whether the end id was
    there, and a cut stream is continued from it."""

    text: list[int] = field(default_factory=list)
    speech: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    state: InterleaveState = field(default_factory=InterleaveState)


def split(ids: Sequence[int], kind: Callable[[int], Kind], schedule: Schedule = INTERLEAVED) -> Split:
    """Separate the ids of a reply, whole or cut anywhere, into text and speech ids.

    Args:
        ids: a reply, with or without its end id.
        kind: what an id is, `Vocabulary.kind`.

    Raises:
        ValueError: an id stands where its kind cannot; the message names its position.
    """
    parts = Split(state=InterleaveState(schedule))
    for position, token in enumerate(ids):
        token_kind = kind(token)
        try:
            parts.state.advance(token_kind)
        except ValueError as error:
            raise ValueError(f"id {token} at position {position}: {error}") from None
        if token_kind is Kind.END:
            continue
        (parts.text if token_kind is Kind.TEXT else parts.speech).append(token)
        if parts.runs and parts.runs[-1].kind is token_kind:
            parts.runs[-1] = Run(token_kind, parts.runs[-1].start, position + 1)
        else:
            parts.runs.append(Run(token_kind, position, position + 1))
    return parts


def legal_prefix(kinds: Iterable[Kind], num_speech_heard: int) -> int:
    """How many ids of a reply to keep when it was interrupted after `num_speech_heard` of its speech tokens sounded.

    Up to the last one heard, and nothing when none was. What is kept is a legal reply in itself, since the end may
    follow every speech token; text of a run that was not yet spoken at all is dropped. A number beyond the reply's own
    (a playback clock may round up) keeps its tokens as far as they were spoken.

    Raises:
        ValueError: the number is negative.
    """
    if num_speech_heard < 0:
        raise ValueError(f"num_speech_heard must not be negative, got {num_speech_heard}")
    kept = heard = 0
    for position, kind in enumerate(kinds):
        if kind is Kind.SPEECH and heard < num_speech_heard:
            heard += 1
            kept = position + 1
    return kept
