"""Events of a reply: text, speech tokens and audio in order of production."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from duologue.text import shortened


class EndReason(StrEnum):
    """The reason why a reply ended."""

    END = "end"  # the model produced the end id
    LENGTH = "length"  # the limit of tokens or of the context was reached
    INTERRUPTED = "interrupted"  # `session.interrupt` was called


@dataclass(frozen=True)
class TextDelta:
    """An increment of the transcript.

    Attributes:
        text: final characters, possibly none; incomplete characters are held back.
        ids: text ids since the last event, joint vocabulary.
    """

    text: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class SpeechDelta:
    """An increment of the speech tokens.

    Attributes:
        tokens: codes in [0, codebook_size), not joint ids.
    """

    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AudioDelta:
    """An increment of the audio, contiguous with the last one.

    Attributes:
        wav: float32 (S,) in [-1, 1].
        sample_rate: in Hz.
        first_sample: position of `wav[0]` in the reply.
    """

    wav: npt.NDArray[np.float32]
    sample_rate: int
    first_sample: int

    def __repr__(self) -> str:
        start, seconds = self.first_sample / self.sample_rate, len(self.wav) / self.sample_rate
        return f"AudioDelta({seconds:.2f} s from {start:.2f} s)"


@dataclass(frozen=True)
class Timings:
    """Times of a reply in seconds after the end of the question; None for what did not happen.

    Attributes:
        tokenize_s: duration of the remaining tokenization.
        prefill_s: duration of the language model's first step.
        first_text_s: time to the first text token.
        first_audio_s: time to first audio.
        total_s: time to the complete reply.
        audio_s: duration of the audio.
        stages: seconds of work by stage ("tokenizer", "language", "decoder").
    """

    tokenize_s: float = 0.0
    prefill_s: float = 0.0
    first_text_s: float | None = None
    first_audio_s: float | None = None
    total_s: float = 0.0
    audio_s: float = 0.0
    num_text_tokens: int = 0
    num_speech_tokens: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def real_time_factor(self) -> float | None:
        """Total time over audio duration; None without audio."""
        return self.total_s / self.audio_s if self.audio_s > 0 else None


@dataclass(frozen=True)
class ReplyDone:
    """The last event of every reply.

    Attributes:
        text: the transcript; after an interrupt the estimated heard part.
        tokens: speech codes in [0, codebook_size); after an interrupt those heard.
        text_is_estimate: the reply was interrupted and `text` is cut by estimate.
    """

    text: str
    tokens: tuple[int, ...]
    reason: EndReason
    timings: Timings
    text_is_estimate: bool = False

    def __repr__(self) -> str:
        return f"ReplyDone({shortened(self.text)!r}, {len(self.tokens)} speech tokens, {self.reason})"


@dataclass(frozen=True)
class Interrupted:
    """The reply was interrupted; `ReplyDone` follows.

    Attributes:
        num_samples_played: samples of the reply that were played.
        num_tokens_heard: speech tokens kept in the history.
        text: heard part of the transcript; an estimate if `text_is_estimate`, since words are assumed to be spread
            evenly over the speech.
    """

    num_samples_played: int
    num_tokens_heard: int
    text: str = ""
    text_is_estimate: bool = True


Event: TypeAlias = TextDelta | SpeechDelta | AudioDelta | Interrupted | ReplyDone
