"""What a session yields while it replies, in order: text and speech tokens as they are produced, sound as it is ready.

Time inside a session counts in samples; the seconds in `Timings` are measured by whoever produced the reply.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


class EndReason(StrEnum):
    """Why a reply ended."""

    END = "end"  # the model said so
    LENGTH = "length"  # the limit of tokens or of the context was reached
    INTERRUPTED = "interrupted"  # `session.interrupt` was called


@dataclass(frozen=True)
class TextDelta:
    """More of the transcript.

    Attributes:
        text: characters that are certain; a character whose bytes are incomplete waits. May be empty.
        ids: the text ids since the last event, joint vocabulary.
    """

    text: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class SpeechDelta:
    """More speech tokens.

    Attributes:
        tokens: codes in [0, codebook_size), not joint ids.
    """

    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AudioDelta:
    """More sound, without a gap after the last event's.

    Attributes:
        wav: float32 (S,) in [-1, 1].
        sample_rate: samples per second.
        first_sample: position of `wav[0]` in the reply.
    """

    wav: npt.NDArray[np.float32]
    sample_rate: int
    first_sample: int


@dataclass(frozen=True)
class Timings:
    """Where the time of a reply went, in seconds from the end of the question; None where it did not come to that.

    Attributes:
        tokenize_s: duration of tokenizing what was not tokenized yet.
        prefill_s: duration of the language model's first step.
        first_text_s: until the first text token.
        first_audio_s: until the first sound (time to first audio).
        total_s: until the reply was complete.
        audio_s: length of the sound.
        stages: seconds of work by stage ("tokenizer", "language", "flow", "vocoder", ...).
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
        """Time of the reply over length of its sound; None without sound."""
        return self.total_s / self.audio_s if self.audio_s > 0 else None


@dataclass(frozen=True)
class ReplyDone:
    """The last event of every reply, whatever ended it.

    Attributes:
        text: the whole transcript; of an interrupted reply what was heard of it, an estimate.
        tokens: all speech tokens, codes in [0, codebook_size); of an interrupted reply those that were heard.
        text_is_estimate: the reply was interrupted, and `text` is cut where its speech may have been.
    """

    text: str
    tokens: tuple[int, ...]
    reason: EndReason
    timings: Timings
    text_is_estimate: bool = False


@dataclass(frozen=True)
class Interrupted:
    """The reply was cut; `ReplyDone` follows.

    Attributes:
        num_samples_played: samples of the reply that had been played by then, at the reply's sample rate.
        num_tokens_heard: speech tokens that stay in the history.
        text: what was heard of the transcript, an estimate where `text_is_estimate`: nothing tells which speech tokens
            say which word, so words are taken to be spread evenly over the speech.
    """

    num_samples_played: int
    num_tokens_heard: int
    text: str = ""
    text_is_estimate: bool = True


Event: TypeAlias = TextDelta | SpeechDelta | AudioDelta | Interrupted | ReplyDone
