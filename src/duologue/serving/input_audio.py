"""The input audio buffer of a real-time session: turns the client's audio into user turns while it arrives.

With turn detection, the detector decides where turns start and end. Audio outside turns is buffered for a while,
because the start of a turn is detected late. Without it, all audio belongs to the turn until the client commits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duologue import rates
from duologue.conversation.ear import Ear
from duologue.conversation.history import turn_of
from duologue.serving.formats import WireDecoder
from duologue.serving.items import AudioClip
from duologue.serving.objects import AudioInput, ProtocolError
from duologue.serving.turn_detection import (
    Detection,
    IdleTimedOut,
    SileroStream,
    SpeechProbability,
    TurnDetector,
    TurnEnded,
    TurnSettings,
    TurnStarted,
)
from duologue.turns import Role, Turn

RATE = rates.LISTEN_SAMPLE_RATE
VAD_CHUNK = RATE  # samples per call of the detector
# Short messages are processed on the event loop, in 0.2 ms per 32 ms of audio. A thread switch costs more and waits for
# the models' threads.
SHORT_MESSAGE = 16_384  # characters of base64
SHORT_PIECE = RATE // 10  # samples
MAX_WAITING_S = 30.0  # audio outside turns, kept for clients that commit by themselves
MIN_COMMIT_MS = 100


@dataclass(frozen=True, eq=False)
class UserTurn:
    """A user's turn.

    Attributes:
        turn: its token ids.
        sound: its audio.
        commit_s: seconds spent on the last step.
    """

    turn: Turn
    sound: AudioClip
    commit_s: float


def to_ms(samples: int) -> int:
    return samples * 1000 // RATE


class InputAudioBuffer:
    """The audio of one client. Positions count samples at 16 kHz since the session started.

    Args:
        ear: tokenizes the audio.
        config: format and turn detection.
        max_s: maximum length of a turn.
        on_sound: receives every wav (S,) and its rate, for recording.
        probability: makes the state of one stream's speech probability.
    """

    def __init__(
        self,
        ear: Ear,
        config: AudioInput,
        max_s: float,
        on_sound: Callable[[NDArray[np.float32], int], None] | None = None,
        probability: Callable[[], SpeechProbability] = SileroStream,
    ) -> None:
        self.ear = ear
        self.detector: TurnDetector | None = None
        self._max_s, self._on_sound, self._new_probability = max_s, on_sound, probability
        self._probability = probability()
        self._incoming = WireDecoder(config.format)
        self._total = 0
        self._waiting: deque[NDArray[np.float32]] = deque()  # ends at `_total`
        self._num_waiting = 0
        self._parts: list[NDArray[np.float32]] = []
        self._open = 0  # samples in the open turn
        self.configure(config)

    def configure(self, config: AudioInput) -> None:
        """Applies a new configuration. A turn in progress continues."""
        if config.format != self._incoming.wire:
            self._incoming = WireDecoder(config.format)
        if config.turn_detection is None:
            self.detector = None
            self._take_until(self._total)
            return
        settings = TurnSettings.of(config.turn_detection, self._max_s)
        if self.detector is None:
            self._start_detector(settings)
        else:
            self.detector.settings = settings

    async def append(self, audio: str) -> AsyncIterator[Detection]:
        """Takes audio as base64 text and yields each detection at once.

        The caller ends the turn with `commit` on `TurnEnded` or `IdleTimedOut` before it continues.

        Raises:
            ProtocolError: the audio does not match the format, or exceeds the turn's limit. It is dropped.
        """
        if len(audio) <= SHORT_MESSAGE:
            wav = self._incoming.step(audio)
            await asyncio.sleep(0)  # yields to other sessions when a client sends faster than real time
        else:
            wav = await asyncio.to_thread(self._incoming.step, audio)
        if self.detector is None and self._open + len(wav) > self._max_s * RATE:
            raise ProtocolError(
                f"the input audio buffer holds at most {self._max_s:g} s; commit or clear it", "input_audio_buffer_full"
            )
        if self._on_sound is not None and len(wav):
            self._on_sound(wav, RATE)
        if self.detector is None:
            self._total += len(wav)
            await self._hear(wav)
            return
        for start in range(0, len(wav), VAD_CHUNK):
            piece = wav[start : start + VAD_CHUNK]
            if len(piece) <= SHORT_PIECE:
                probabilities = self._probability.step(piece)
            else:
                probabilities = await asyncio.to_thread(self._probability.step, piece)
            self._waiting.append(piece)
            self._num_waiting += len(piece)
            self._total += len(piece)
            for probability in probabilities:
                detection = self.detector.step(probability)
                if isinstance(detection, TurnStarted):
                    self._take_until(detection.sample)
                if isinstance(detection, IdleTimedOut):
                    # Silence costs context and carries no meaning: only a short piece is kept.
                    self._take_until(
                        detection.sample - max(self.detector.settings.prefix, MIN_COMMIT_MS * RATE // 1000)
                    )
                if detection is not None:
                    yield detection
            if self.detector.speaking:
                await self._hear_until(self.detector.sample)
        self._take_until(self._total - int(MAX_WAITING_S * RATE))

    async def commit(self, detection: Detection | None = None) -> UserTurn:
        """Ends the turn: at the detection, or at the last sample if the client commits.

        Raises:
            ProtocolError: the turn is shorter than 100 ms. If the client commits, the audio is kept.
        """
        if detection is not None:
            await self._hear_until(detection.sample)
            self._check_length(self._open)
        else:
            self._check_length(self._open + self._num_waiting + self._incoming.num_buffered)
            await self._hear_until(self._total)
            await self._hear(self._incoming.end())
            self._restart()
        loop = asyncio.get_running_loop()
        began, parts = loop.time(), self._parts
        self._parts, self._open = [], 0
        spoken = await self.ear.finish()
        vocabulary = self.ear.models.vocabulary
        turn = turn_of(Role.USER, vocabulary.speech_ids(spoken.codes), vocabulary)
        return UserTurn(turn, AudioClip.of(parts, RATE), loop.time() - began)

    def _check_length(self, num_samples: int) -> None:
        if to_ms(num_samples) < MIN_COMMIT_MS:
            raise ProtocolError(
                f"the input audio buffer is too small to commit: it holds {1000 * num_samples / RATE:.0f} ms, and at "
                f"least {MIN_COMMIT_MS} ms are needed",
                "input_audio_buffer_commit_empty",
            )

    def end_turn(self) -> TurnEnded | None:
        """Ends the open turn without waiting for its silence. The caller ends it with `commit`, as after `append`."""
        detector = self.detector
        if detector is None or not detector.speaking:
            return None
        detector.end_turn()
        return TurnEnded(detector.sample)

    def clear(self) -> None:
        """Drops all audio that is not committed."""
        self.ear.discard()
        self._parts, self._open = [], 0
        self._incoming = WireDecoder(self._incoming.wire)
        self._restart()

    def close(self) -> None:
        """Ends the buffer with its conversation."""
        self.clear()
        self.ear.close()

    def _restart(self) -> None:
        """Restarts detection behind the last sample."""
        self._take_until(self._total)
        if self.detector is not None:
            self._start_detector(self.detector.settings)

    def _start_detector(self, settings: TurnSettings) -> None:
        self._probability = self._new_probability()
        self.detector = TurnDetector(settings, self._total)

    async def _hear(self, wav: NDArray[np.float32]) -> None:
        if len(wav):
            self._parts.append(wav)
            self._open += len(wav)
            await self.ear.hear(wav, RATE)

    async def _hear_until(self, sample: int) -> None:
        if parts := self._take_until(sample):
            await self._hear(np.concatenate(parts))

    def _take_until(self, sample: int) -> list[NDArray[np.float32]]:
        """Removes and returns the buffered pieces before this position."""
        parts, rest = [], sample - (self._total - self._num_waiting)
        while rest > 0 and self._waiting:
            piece = self._waiting.popleft()
            if len(piece) > rest:
                self._waiting.appendleft(piece[rest:])
                piece = piece[:rest]
            parts.append(piece)
            rest -= len(piece)
            self._num_waiting -= len(piece)
        return parts
