"""Who is speaking: the probability of speech in each 32 ms of sound (Silero VAD), and a state machine that makes turns
of them. The machine knows no clock and no model: it counts samples at 16 kHz."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from duologue import rates
from duologue.serving.objects import SemanticVad, ServerVad

WINDOW = 512  # samples at 16 kHz
CONTEXT = 64
MODEL_FILE = Path(__file__).parent / "silero_vad.onnx"

START_WINDOWS = 2  # windows of speech in a row that begin a turn: a click is shorter
HYSTERESIS = 0.15  # speech that has begun goes on down to this far below the threshold
PER_MS = rates.LISTEN_SAMPLE_RATE // 1000

# What `semantic_vad` waits for beyond the silence of `server_vad`, by eagerness.
SEMANTIC_WAIT_MS = {"high": 0, "medium": 300, "auto": 300, "low": 1000}


@dataclass(frozen=True)
class TurnSettings:
    """`server_vad` in samples; a turn of more than `max_samples` is ended."""

    threshold: float
    prefix: int
    silence: int
    idle: int | None
    max_samples: int

    @classmethod
    def of(cls, detection: ServerVad | SemanticVad, max_s: float) -> TurnSettings:
        longest = int(max_s * rates.LISTEN_SAMPLE_RATE)
        if isinstance(detection, SemanticVad):
            plain = ServerVad()
            wait = plain.silence_duration_ms + SEMANTIC_WAIT_MS[detection.eagerness]
            return cls(plain.threshold, plain.prefix_padding_ms * PER_MS, wait * PER_MS, None, longest)
        idle = detection.idle_timeout_ms
        return cls(
            detection.threshold,
            detection.prefix_padding_ms * PER_MS,
            detection.silence_duration_ms * PER_MS,
            None if idle is None else idle * PER_MS,
            longest,
        )


@dataclass(frozen=True)
class Started:
    """The user speaks; the turn begins at this sample, the prefix padding included."""

    sample: int


@dataclass(frozen=True)
class Stopped:
    """The user has stopped; the turn ends at this sample, the silence included."""

    sample: int


@dataclass(frozen=True)
class TimedOut:
    """Nobody spoke from `start` to `sample`."""

    start: int
    sample: int


Detection: TypeAlias = Started | Stopped | TimedOut


class TurnDetector:
    """Turns one probability after the other into the beginning and end of turns.

    Attributes:
        settings: may be changed at any time.
        sample: samples seen so far.
        speaking: is a turn under way?
    """

    def __init__(self, settings: TurnSettings, sample: int = 0) -> None:
        self.settings = settings
        self.sample = sample
        self.speaking = False
        self._earliest = sample  # sound before it belongs to an earlier turn
        self._run = 0  # windows of speech in a row
        self._turn_start = sample
        self._last_speech = sample
        self._idle_from: int | None = None

    def step(self, probability: float) -> Detection | None:
        """Takes the next window."""
        self.sample += WINDOW
        settings = self.settings
        if self.speaking:
            if probability >= max(settings.threshold - HYSTERESIS, 0.01):
                self._last_speech = self.sample
            silent = self.sample - self._last_speech >= settings.silence
            if silent or self.sample - self._turn_start >= settings.max_samples:
                self.end_turn()
                return Stopped(self.sample)
            return None
        self._run = self._run + 1 if probability >= settings.threshold else 0
        if self._run >= START_WINDOWS:
            begin = self.sample - self._run * WINDOW - settings.prefix
            self._turn_start, self._last_speech = max(begin, self._earliest), self.sample
            self.speaking, self._idle_from = True, None
            return Started(self._turn_start)
        if self._idle_from is not None and settings.idle is not None and self.sample - self._idle_from >= settings.idle:
            started, self._idle_from = self._idle_from, None
            self._earliest = self.sample
            return TimedOut(started, self.sample)
        return None

    def end_turn(self) -> None:
        """The turn is over: here, or because a client ended it. What comes next is another turn's."""
        self.speaking, self._run = False, 0
        self._earliest = self.sample

    def wait_for_user(self) -> None:
        """The reply has been played: from here on the user is expected to speak."""
        if not self.speaking:
            self._idle_from = self.sample

    def stop_waiting(self) -> None:
        """The model speaks: silence of the user means nothing."""
        self._idle_from = None


class SpeechProbability(Protocol):
    """How likely each whole window of a stream is speech; keeps what does not fill a window. One object is one stream's
    state."""

    def step(self, wav: NDArray[np.float32]) -> list[float]: ...


class SileroStream:
    """Silero VAD on one stream of 16 kHz sound."""

    def __init__(self) -> None:
        self._rest = np.zeros(0, np.float32)
        self._context = np.zeros(CONTEXT, np.float32)
        self._state = np.zeros((2, 1, 128), np.float32)

    def step(self, wav: NDArray[np.float32]) -> list[float]:
        """(S,) float32 -> a probability for each window that is now whole. Work for a thread."""
        model = _model()
        wav = np.concatenate([self._rest, wav])
        whole = len(wav) - len(wav) % WINDOW
        probabilities = []
        for start in range(0, whole, WINDOW):
            window = wav[start : start + WINDOW]
            inputs = {
                "input": np.concatenate([self._context, window])[None],
                "state": self._state,
                "sr": np.array(rates.LISTEN_SAMPLE_RATE, np.int64),
            }
            probability, self._state = model.run(None, inputs)
            self._context = window[-CONTEXT:]
            probabilities.append(float(probability[0, 0]))
        self._rest = wav[whole:].copy()
        return probabilities


_loading = threading.Lock()


def _model() -> Any:
    with _loading:
        return _load_model()


@functools.cache
def _load_model() -> Any:
    """One set of weights for all streams; running it changes nothing in it."""
    # Otherwise onnxruntime reports its use to its maker. Has to be set before it is imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(MODEL_FILE, options, providers=["CPUExecutionProvider"])
