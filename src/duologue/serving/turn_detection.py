"""Turn detection: Silero VAD gives a speech probability per 32 ms window, and a state machine derives turns.

The state machine has no clock and no model: it counts samples at 16 kHz.
"""

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

START_WINDOWS = 2  # consecutive speech windows that start a turn; a click is shorter
HYSTERESIS = 0.15  # an open turn continues down to threshold - HYSTERESIS
PER_MS = rates.LISTEN_SAMPLE_RATE // 1000

# Additional silence of `semantic_vad` over `server_vad`, by eagerness.
SEMANTIC_WAIT_MS = {"high": 0, "medium": 300, "auto": 300, "low": 1000}


@dataclass(frozen=True)
class TurnSettings:
    """Settings of `server_vad` in samples. A turn longer than `max_samples` is ended."""

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
class TurnStarted:
    """The start of a turn, at `sample`, including the prefix padding."""

    sample: int


@dataclass(frozen=True)
class TurnEnded:
    """The end of a turn, at `sample`, including the silence."""

    sample: int


@dataclass(frozen=True)
class IdleTimedOut:
    """Silence of the user from `start` to `sample`."""

    start: int
    sample: int


Detection: TypeAlias = TurnStarted | TurnEnded | IdleTimedOut


class TurnDetector:
    """Derives turns from a stream of speech probabilities.

    Attributes:
        settings: may be changed at any time.
        sample: number of samples seen.
        speaking: whether a turn is open.
    """

    def __init__(self, settings: TurnSettings, sample: int = 0) -> None:
        self.settings = settings
        self.sample = sample
        self.speaking = False
        self._earliest = sample  # earlier samples belong to the previous turn
        self._run = 0  # consecutive speech windows
        self._turn_start = sample
        self._last_speech = sample
        self._idle_from: int | None = None

    def step(self, probability: float) -> Detection | None:
        """Takes the probability of the next window."""
        self.sample += WINDOW
        settings = self.settings
        if self.speaking:
            if probability >= max(settings.threshold - HYSTERESIS, 0.01):
                self._last_speech = self.sample
            silent = self.sample - self._last_speech >= settings.silence
            if silent or self.sample - self._turn_start >= settings.max_samples:
                self.end_turn()
                return TurnEnded(self.sample)
            return None
        self._run = self._run + 1 if probability >= settings.threshold else 0
        if self._run >= START_WINDOWS:
            begin = self.sample - self._run * WINDOW - settings.prefix
            self._turn_start, self._last_speech = max(begin, self._earliest), self.sample
            self.speaking, self._idle_from = True, None
            return TurnStarted(self._turn_start)
        if self._idle_from is not None and settings.idle is not None and self.sample - self._idle_from >= settings.idle:
            started, self._idle_from = self._idle_from, None
            self._earliest = self.sample
            return IdleTimedOut(started, self.sample)
        return None

    def end_turn(self) -> None:
        """Ends the turn at the current sample, by silence or by the client."""
        self.speaking, self._run = False, 0
        self._earliest = self.sample

    def start_idle_timer(self) -> None:
        """Starts the idle timeout, when the reply has been played."""
        if not self.speaking:
            self._idle_from = self.sample

    def stop_idle_timer(self) -> None:
        """Stops the idle timeout, when the model speaks."""
        self._idle_from = None


class SpeechProbability(Protocol):
    """The state of one stream: returns the speech probability of each complete window, buffers the rest."""

    def step(self, wav: NDArray[np.float32]) -> list[float]: ...


class SileroStream:
    """Silero VAD on one stream of 16 kHz audio."""

    def __init__(self) -> None:
        self._rest = np.zeros(0, np.float32)
        self._context = np.zeros(CONTEXT, np.float32)
        self._state = np.zeros((2, 1, 128), np.float32)

    def step(self, wav: NDArray[np.float32]) -> list[float]:
        """Takes wav (S,) float32; returns a probability for each complete window. Call it in a thread."""
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
    """Loads the weights, which all streams share. Inference does not change them."""
    # Disables telemetry; must be set before onnxruntime is imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(MODEL_FILE, options, providers=["CPUExecutionProvider"])
