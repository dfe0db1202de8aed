"""The interleave: the order of text and speech tokens within a reply. Only this module states the runs 13 and 26.

    text run | speech run | text run | speech run | ... | last text run | all the remaining speech | end

There is no end-of-text token. A text run holds up to 13 text tokens. A speech run holds exactly 26 speech tokens,
unless it is the last. A speech id within a text run, or in place of the next text run, finishes the text: only
speech ids or the end may follow. `InterleaveState` implements this table:

    position                           text   speech                   end
    at the start                       yes    yes, text is finished    no: the reply would be empty
    inside a text run                  yes    yes, text is finished    no: the text would not be spoken
    after a full text run              no     yes                      no: likewise
    inside a speech run                no     yes                      yes: the run was the last one
    after a full speech run            yes    yes, text is finished    yes: text and speech ended together
    text finished                      no     yes                      yes

Without speech (`TEXT_ONLY`), text and the end may stand everywhere. Without text (`SPEECH_ONLY`), the text is
finished at the start. Training data, sampling and parsing use the same state machine (arXiv:2412.02612).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum


class Kind(IntEnum):
    """The kind of a token id. The values are stable, because arrays of them are stored."""

    TEXT = 0
    SPEECH = 1
    END = 2  # ends a reply
    CONTROL = 3  # role markers and the like: never sampled
    PADDING = 4  # rows without a meaning: never sampled


@dataclass(frozen=True)
class Schedule:
    """Run lengths in tokens; 0 leaves a modality out."""

    text_run: int = 13
    speech_run: int = 26

    def __post_init__(self) -> None:
        if self.text_run < 0 or self.speech_run < 0 or self.text_run + self.speech_run == 0:
            raise ValueError(
                f"a schedule needs runs of 0 or more tokens, not both 0, got text_run={self.text_run}, "
                f"speech_run={self.speech_run}"
            )

    def min_speech(self, num_text: int) -> int:
        """Returns the minimum number of speech tokens of a reply with `num_text` text tokens.

        Full speech runs separate the text runs, and at least one token follows the last.
        """
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
    """The kinds that may come next."""

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
        """Each allowed kind as the only one."""
        text, speech, end = Allowed(True, False, False), Allowed(False, True, False), Allowed(False, False, True)
        return tuple(one for one, may in ((text, self.text), (speech, self.speech), (end, self.end)) if may)

    def __str__(self) -> str:
        names = [name for name in ("text", "speech", "end") if getattr(self, name)]
        return " or ".join(names) if names else "nothing"


@dataclass
class InterleaveState:
    """The position within one reply; `copy.copy` forks it.

    Attributes:
        run: modality of the run that the next token may continue; after a full speech run, the next text run.
        run_length: current length of that run.
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
        if self.ended:
            return Allowed(text=False, speech=False, end=False)
        if self.schedule.speech_run == 0:
            return Allowed(text=True, speech=False, end=True)
        text = self.run is Kind.TEXT and not self.text_finished and self.run_length < self.schedule.text_run
        after_speech = self.num_speech > 0 and (self.run is Kind.SPEECH or self.run_length == 0)
        return Allowed(text=text, speech=True, end=after_speech)

    def advance(self, kind: Kind) -> None:
        """Consumes one token of this kind.

        Raises:
            ValueError: the kind is not allowed here; the state is unchanged.
        """
        if kind not in self.allowed:
            raise ValueError(
                f"a {kind.name.lower()} token cannot follow {self.num_text} text and {self.num_speech} speech "
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
        """Consumes several tokens and returns this state, from which a cut stream continues."""
        for kind in kinds:
            self.advance(kind)
        return self


def weave(text: Sequence[int], speech: Sequence[int], schedule: Schedule = INTERLEAVED) -> list[int]:
    """Interleaves text and speech ids of one reply in the model's order, without the end id.

    Raises:
        ValueError: the schedule lacks a modality, or there is too little speech for the text.
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
    """A run of one kind: `ids[start:stop]` of the split sequence."""

    kind: Kind
    start: int
    stop: int


@dataclass
class Split:
    """The parts of a reply.

    Attributes:
        state: the position after the last token; a cut stream continues from it.
    """

    text: list[int] = field(default_factory=list)
    speech: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    state: InterleaveState = field(default_factory=InterleaveState)


def split(ids: Sequence[int], kind: Callable[[int], Kind], schedule: Schedule = INTERLEAVED) -> Split:
    """Splits the ids of a reply, complete or not, into text and speech ids.

    Args:
        ids: a reply, with or without its end id.
        kind: `Vocabulary.kind`.

    Raises:
        ValueError: an id stands where its kind is not allowed; the message names its position.
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
    """Returns the number of ids to keep of a reply of which `num_speech_heard` speech tokens were played.

    The kept ids end with the last speech token heard and form a legal reply. Numbers beyond the reply's length are
    accepted, since a playback clock may round up.

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
