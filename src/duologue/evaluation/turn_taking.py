"""Who speaks when: interruptions, sounds that must not interrupt, and pauses within a question.

Each trial is a conversation of its own with a `Caller`. All positions are samples of its tracks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from duologue.audio import resample
from duologue.client.connection import WIRE_RATE
from duologue.evaluation.bundled import Recording
from duologue.evaluation.caller import AUDIBLE, Caller, Connect, SeenEvent, calling
from duologue.evaluation.disturbances import DISTURBANCES
from duologue.evaluation.duplex import speech_spans
from duologue.evaluation.recognition import SoundRecognizer
from duologue.evaluation.scores import Score
from duologue.pcm import from_int16, to_int16
from duologue.scoring import is_correct, normalize

INTERRUPTED_AFTER_S = (0.4, 0.8)  # of the reply
PAUSES_S = (0.0, 0.2, 0.4, 0.6, 0.8, 1.2)
ECHOES_DB = (-30, -20, -10)
DISTURBED_AFTER_S, DISTURBED_S = 0.4, 1.2
ANSWER_S = 30.0  # to the first sound, and to the end of an answer
INTERRUPTION, DISTURBANCE, PAUSE = "interruption", "false interruption", "pause in the question"
_MIDDLE = (0.3, 0.7)  # where a question is split


@dataclass(frozen=True)
class Question:
    """A bundled question at `WIRE_RATE`.

    Attributes:
        pcm: (S,).
        start, end: samples of its first and last sound.
    """

    recording: Recording
    pcm: NDArray[np.int16]
    start: int
    end: int

    @classmethod
    def of(cls, recording: Recording) -> Question:
        pcm = to_int16(resample(recording.wav, recording.sample_rate, WIRE_RATE))
        spans = speech_spans(from_int16(pcm), WIRE_RATE)
        return cls(recording, pcm, round(spans[0].start * WIRE_RATE), round(spans[-1].end * WIRE_RATE))

    @property
    def name(self) -> str:
        return self.recording.question.file.rpartition("/")[2].partition(".")[0]

    @property
    def text(self) -> str:
        return self.recording.question.text

    def answered_by(self, text: str) -> bool:
        return is_correct(text, self.recording.question.answers)

    def with_pause(self, seconds: float) -> tuple[NDArray[np.int16], int]:
        """The question with silence at its quietest place near the middle, and the sample of its last sound."""
        if not seconds:
            return self.pcm, self.end
        hop = WIRE_RATE // 100
        first, last = (int(self.start + share * (self.end - self.start)) // hop for share in _MIDDLE)
        levels = [
            float((self.pcm[hop * at : hop * (at + 3)].astype(np.float64) ** 2).mean()) for at in range(first, last)
        ]
        place = hop * (first + int(np.argmin(levels)) + 1)
        silence = np.zeros(int(seconds * WIRE_RATE), np.int16)
        return np.concatenate([self.pcm[:place], silence, self.pcm[place:]]), self.end + len(silence)


@dataclass(frozen=True, eq=False)
class Trial:
    """One conversation and its scores.

    Attributes:
        subset: what is measured.
        said, heard: the tracks of microphone and loudspeaker, (S,) at `WIRE_RATE`.
        is_wrong: shown by the filter of the page.
        void: why it gives no score of its measure; empty if it does.
    """

    id: str
    subset: str
    asked: str
    answered: str
    said: NDArray[np.int16]
    heard: NDArray[np.int16]
    scores: tuple[Score, ...]
    heard_text: str | None = None
    is_wrong: bool = False
    void: str = ""


@dataclass
class TurnTaking:
    """The trials of one server.

    Args:
        is_simulated: computation takes no time of the tracks, so latencies add what was measured of it.
        reader: reads what was heard of interrupted replies; None leaves those scores out.
    """

    connect: Connect
    questions: Sequence[Question]
    is_simulated: bool
    reader: SoundRecognizer | None = None
    trials: list[Trial] = field(default_factory=list)

    def plan(self) -> list[tuple[str, Question, object]]:
        """What is tried: measure, question and its argument."""
        planned: list[tuple[str, Question, object]] = []
        for question in self.questions:
            planned += [(INTERRUPTION, question, after) for after in INTERRUPTED_AFTER_S]
            planned += [(DISTURBANCE, question, name) for name in (*DISTURBANCES, *ECHOES_DB)]
            planned += [(PAUSE, question, seconds) for seconds in PAUSES_S]
        return planned

    async def run(self) -> AsyncIterator[Trial]:
        """Yields each trial of `plan`. Raises ValueError if the server ends a conversation."""
        for measure, question, given in self.plan():
            match measure, given:
                case "interruption", float(after_s):
                    trial = await self.interrupt(question, after_s)
                case "false interruption", str(name):
                    trial = await self.disturb(question, name)
                case "false interruption", int(level_db):
                    trial = await self.echo(question, level_db)
                case _, seconds:
                    assert isinstance(seconds, float)
                    trial = await self.pause(question, seconds)
            self.trials.append(trial)
            yield trial

    async def interrupt(self, question: Question, after_s: float) -> Trial:
        """Asks the next question into the reply to this one."""
        other = self.questions[(self.questions.index(question) + 1) % len(self.questions)]
        name, subset = f"interrupt-{question.name}-{after_s:g}", INTERRUPTION
        async with calling(self.connect) as caller:
            began = await self._reply_begins(caller, question)
            await caller.wait(after_s)
            if began is None or not caller.waits:
                return _trial(caller, name, subset, question, (), void=f"no reply was playing after {after_s:g} s")
            onset = caller.at + other.start
            await caller.say(other.pcm)
            await self._answered(caller)
            cuts = caller.of("talk.interrupted", onset)
            if not cuts and caller.of("input_audio_buffer.speech_started", onset):
                return _trial(caller, name, subset, question, (), void="the reply ended before the user was heard")
            scores = [_score(name, subset, "stopped", bool(cuts))]
            heard_text = None
            if cuts:
                scores.append(_seconds(name, subset, "from the onset of speech to silence", cuts[0].at - onset))
                kept = await caller.transcript(str(cuts[0].event["item_id"]))
                if self.reader is not None:
                    played = from_int16(caller.heard[began : cuts[0].at])
                    heard_text = self.reader.transcribe(played, WIRE_RATE)
                    scores += _kept_scores(name, subset, kept, heard_text)
            answer = caller.exchanges[-1].answer if len(caller.exchanges) > 1 else ""
            scores.append(_score(name, subset, "the interrupting question is answered", other.answered_by(answer)))
            asked = f"{question.text} {other.text}"
            return _trial(caller, name, subset, asked, scores, heard_text, is_wrong=not cuts)

    async def disturb(self, question: Question, kind: str) -> Trial:
        """Plays a sound that is no speech into the reply."""
        rng = np.random.default_rng(sum(map(ord, question.name)))
        name, subset = f"disturb-{question.name}-{kind}", f"{DISTURBANCE}: {kind}"
        async with calling(self.connect) as caller:
            began = await self._reply_begins(caller, question)
            await caller.wait(DISTURBED_AFTER_S)
            if began is None or not caller.waits:
                return _trial(
                    caller, name, subset, question, (), void=f"no reply was playing after {DISTURBED_AFTER_S} s"
                )
            since = caller.at
            await caller.say(DISTURBANCES[kind](rng))
            await caller.listen(lambda: bool(caller.of("talk.interrupted", since)), DISTURBED_S)
            await caller.listen(lambda: bool(caller.of("talk.interrupted", since)) or not caller.waits, ANSWER_S)
            return _disturbed(caller, name, subset, question, since)

    async def echo(self, question: Question, level_db: int) -> Trial:
        """Returns the loudspeaker to the microphone at this level."""
        name, subset = f"echo-{question.name}{level_db}", f"{DISTURBANCE}: echo at {level_db} dB"
        async with calling(self.connect, 10 ** (level_db / 20)) as caller:
            since = await self._reply_begins(caller, question)
            if since is None:
                return _trial(caller, name, subset, question, (), void="there was no reply")
            await caller.listen(lambda: bool(caller.of("talk.interrupted", since)), DISTURBED_S)
            await caller.listen(lambda: bool(caller.of("talk.interrupted", since)) or not caller.waits, ANSWER_S)
            return _disturbed(caller, name, subset, question, since)

    async def pause(self, question: Question, seconds: float) -> Trial:
        """Asks with a pause in the middle of the question."""
        name, subset = f"pause-{question.name}-{seconds:g}", f"{PAUSE}: {seconds:g} s"
        pcm, end = question.with_pause(seconds)
        async with calling(self.connect) as caller:
            await caller.say(pcm)
            await self._answered(caller)
            stops = caller.of("input_audio_buffer.speech_stopped")
            whole = len(stops) == 1 and stops[0].at >= end
            scores = [_score(name, subset, "turn is kept whole", whole)]
            answer = caller.exchanges[-1].answer if caller.exchanges else ""
            scores.append(_score(name, subset, "right, text", question.answered_by(answer)))
            if whole:
                scores.append(
                    _seconds(name, subset, "from the end of speech to the end of the turn", stops[0].at - end)
                )
                scores += self._first_audio(name, subset, caller, stops[0], end)
            return _trial(caller, name, subset, question, scores, is_wrong=not whole)

    def _first_audio(self, name: str, subset: str, caller: Caller, stopped: SeenEvent, end: int) -> Iterable[Score]:
        """The time from the user's last sound to the first of the reply, and the computation in it."""
        deltas = caller.of("response.output_audio.delta", stopped.at)
        audible = np.flatnonzero(np.abs(caller.heard[end:].astype(np.int32)) > AUDIBLE)
        if not deltas or not len(audible):
            return
        computed_s = deltas[0].seen_s - stopped.seen_s if self.is_simulated else 0.0
        total = int(audible[0]) + computed_s * WIRE_RATE
        yield _seconds(name, subset, "from the end of speech to the first audio", total)
        if self.is_simulated:
            yield _seconds(name, subset, "computation in it", computed_s * WIRE_RATE)

    async def _reply_begins(self, caller: Caller, question: Question) -> int | None:
        """Asks a question and waits for the first sound of the reply; returns its position."""
        await caller.say(question.pcm)
        began = await caller.listen(lambda: caller.hears, ANSWER_S)
        return caller.at if began else None

    async def _answered(self, caller: Caller) -> None:
        """Waits until everything is answered and played, at least 1.2 s."""
        await caller.wait(1.2)
        await caller.listen(lambda: not caller.waits, ANSWER_S)


def _disturbed(caller: Caller, name: str, subset: str, question: Question, since: int) -> Trial:
    interrupted = bool(caller.of("talk.interrupted", since))
    started = bool(caller.of("input_audio_buffer.speech_started", since))
    scores = [
        _score(name, subset, "reply is cut", interrupted, better="lower"),
        _score(name, subset, "taken for speech", started, better="lower"),
    ]
    return _trial(caller, name, subset, question, scores, is_wrong=interrupted or started)


def _kept_scores(name: str, subset: str, kept: str, heard: str) -> list[Score]:
    num_kept, num_heard = len(normalize(kept).split()), len(normalize(heard).split())
    return [
        Score(name, subset, "words kept in the history", num_kept, unit="words"),
        Score(name, subset, "words heard", num_heard, unit="words"),
        Score(name, subset, "words kept too many or too few", abs(num_kept - num_heard), unit="words", better="lower"),
    ]


def _trial(
    caller: Caller,
    name: str,
    subset: str,
    asked: Question | str,
    scores: Iterable[Score],
    heard_text: str | None = None,
    is_wrong: bool = False,
    void: str = "",
) -> Trial:
    text = asked if isinstance(asked, str) else asked.text
    answered = " / ".join(one.answer.strip() for one in caller.exchanges)
    return Trial(name, subset, text, answered, caller.said, caller.heard, tuple(scores), heard_text, is_wrong, void)


def _score(name: str, subset: str, measure: str, value: bool, better: str = "higher") -> Score:
    return Score(name, subset, measure, float(value), better="lower" if better == "lower" else "higher")


def _seconds(name: str, subset: str, measure: str, num_samples: float) -> Score:
    return Score(name, subset, measure, num_samples / WIRE_RATE, unit="s", better="lower")
