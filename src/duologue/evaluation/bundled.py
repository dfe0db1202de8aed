"""The recorded questions that come with the package, asked as they are and as other rooms and lines change them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import resample
from duologue.augmentation import AugmentConfig, augment
from duologue.config import parse_config, read_json
from duologue.conversation.chatbot import Chatbot, model_folder
from duologue.evaluation.conversations import ScoredExchange, Waveform
from duologue.evaluation.intervals import wilson
from duologue.evaluation.prosody import PLAIN
from duologue.evaluation.recognition import SoundRecognizer
from duologue.evaluation.report import Row
from duologue.evaluation.testset import TestClip
from duologue.pcm import to_int16
from duologue.progress import steps
from duologue.sound_files import load_audio

GROUP = "bundled questions"
BUNDLED, VARIED = "bundled", "varied"
QUESTIONS_FILE = "questions.json"
NUM_VARIANTS = 100
VARIATION = AugmentConfig(
    gain_db=(-14.0, 8.0),
    noise_probability=0.6,
    snr_db=(12.0, 35.0),
    room_probability=0.5,
    speed_probability=0.0,
    telephone_probability=0.15,
)


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


@dataclass(frozen=True, eq=False)
class Recording:
    """A bundled question and its sound: (S,) float32 at `sample_rate`."""

    question: BundledQuestion
    wav: NDArray[np.float32]
    sample_rate: int

    @property
    def clip(self) -> TestClip:
        """As the test set has its questions; the id is the file."""
        samples = to_int16(self.wav)
        one = self.question
        return TestClip(one.file, one.text, "user", "", PLAIN, BUNDLED, self.sample_rate, samples)


def load_bundled() -> list[Recording]:
    """The questions of the package and their sound."""
    folder = model_folder()
    listed = parse_config(BundledQuestions, read_json(folder / QUESTIONS_FILE), str(folder / QUESTIONS_FILE))
    return [Recording(one, *load_audio(folder / one.file)) for one in listed.questions]


def ask_bundled(
    bot: Chatbot,
    recordings: Sequence[Recording],
    recognizer: SoundRecognizer | None,
    transcripts: Mapping[str, str] | None = None,
) -> list[ScoredExchange]:
    """One exchange for each recording, without any history; its intent is the name of the recording.

    Args:
        transcripts: what the recognition head reads in each, by file.
    """
    return [
        _ask(
            bot,
            one,
            BUNDLED,
            Waveform(one.wav, one.sample_rate),
            recognizer,
            (transcripts or {}).get(one.question.file),
        )
        for one in recordings
    ]


def ask_variants(
    bot: Chatbot, recordings: Sequence[Recording], num: int = NUM_VARIANTS, seed: int = 0
) -> list[ScoredExchange]:
    """The recordings in turn, `num` times in all, each time at another level, in other noise and another room."""
    exchanges = []
    for index in steps(range(num), "part 3 of 6, questions in noise", "questions"):
        recording = recordings[index % len(recordings)]
        sound = vary(recording, recordings[(index + 1) % len(recordings)], np.random.default_rng((seed, index)))
        exchanges.append(_ask(bot, recording, VARIED, sound, None, None))
    return exchanges


def vary(recording: Recording, other: Recording, rng: np.random.Generator) -> Waveform:
    """One variant at 16 kHz; `other` is who talks in the background, if anybody does."""
    rate = rates.LISTEN_SAMPLE_RATE
    wav, babble = (resample(one.wav, one.sample_rate, rate) for one in (recording, other))
    return Waveform(augment(wav, rate, VARIATION, rng, lambda: babble), rate)


def bundled_rows(exchanges: Sequence[ScoredExchange], varied: Sequence[ScoredExchange], why_not: str) -> list[Row]:
    """Shares of right answers in the text of the reply and in what is heard of it, and which they are."""
    heard = (
        Row(GROUP, "answer heard", None, "%", skipped=why_not)
        if why_not
        else _row(exchanges, "answer heard", lambda one: one.heard_correct, 1.0)
    )
    return [
        _row(exchanges, "right in the text", lambda one: one.correct, 1.0),
        heard,
        _row(varied, "right under gain, noise, room", lambda one: one.correct, 0.95),
    ]


def _row(exchanges: Sequence[ScoredExchange], name: str, right: Callable[[ScoredExchange], bool], aim: float) -> Row:
    found: dict[str, list[bool]] = {}
    for one in exchanges:
        found.setdefault(one.intent, []).append(right(one))
    num_right, num = sum(map(sum, found.values())), len(exchanges)
    parts = {name: sum(all_right) / len(all_right) for name, all_right in found.items()}
    return Row(GROUP, name, num_right / num, "%", aim, "at least", num, parts=parts, interval=wilson(num_right, num))


def _ask(
    bot: Chatbot,
    recording: Recording,
    split: str,
    sound: Waveform,
    recognizer: SoundRecognizer | None,
    transcript: str | None,
) -> ScoredExchange:
    question, reply = recording.question, bot.chat(sound.wav, sound.sample_rate)
    return ScoredExchange(
        dialogue=question.file,
        intent=Path(question.file).stem,
        split=split,
        last=True,
        style=PLAIN,
        asked=question.text,
        expected="",
        answers=question.answers,
        said=reply.text,
        heard=None if recognizer is None else recognizer.transcribe(reply.audio, reply.sample_rate),
        heard_reference=None,
        change=None,
        first_audio_s=reply.timings.first_audio_s,
        audio_s=reply.timings.audio_s,
        total_s=reply.timings.total_s,
        transcript=transcript,
        question_sound=sound,
        reply_sound=Waveform(reply.audio, reply.sample_rate),
    )
