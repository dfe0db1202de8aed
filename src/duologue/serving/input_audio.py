"""The input audio buffer of one real-time session: sound of the client becomes the user's turn while it comes.

With turn detection the detector says where turns begin and end; sound outside of them waits for a while, because the
beginning of a turn is known only after it. Without it everything belongs to the turn until the client commits.
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
from duologue.serving.formats import Incoming
from duologue.serving.items import Sound
from duologue.serving.objects import AudioInput, ProtocolError
from duologue.serving.turn_detection import (
    Detection,
    SileroStream,
    SpeechProbability,
    Started,
    TimedOut,
    TurnDetector,
    TurnSettings,
)
from duologue.turns import Role, Turn

RATE = rates.LISTEN_SAMPLE_RATE
AT_ONCE = RATE  # samples whose probabilities are computed in one piece of work
# What clients send at a time in live speech is worked on in the event loop, 0.2 ms for each 32 ms of sound: the way to
# a thread and back costs more than that, and waits while the models' threads run.
SHORT_MESSAGE = 16_384  # characters of base64
SHORT_PIECE = RATE // 10  # samples
WAITING_S = 30.0  # sound outside of turns that is kept for a client that commits by itself
MIN_COMMIT_MS = 100


@dataclass(frozen=True, eq=False)
class UserTurn:
    """A turn of the user: its ids, its sound, and the seconds that its end took."""

    turn: Turn
    sound: Sound
    commit_s: float


def to_ms(samples: int) -> int:
    return samples * 1000 // RATE


class Listener:
    """One client's sound. Positions count samples at 16 kHz since the session began.

    Args:
        ear: hears the user.
        max_s: length of a turn.
        on_sound: gets every wav (S,) and its rate, for recording.
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
        self._incoming = Incoming(config.format)
        self._total = 0
        self._waiting: deque[NDArray[np.float32]] = deque()  # ends at `_total`
        self._num_waiting = 0
        self._parts: list[NDArray[np.float32]] = []
        self._open = 0  # samples of the open turn
        self.configure(config)

    def configure(self, config: AudioInput) -> None:
        """Takes a new configuration. A turn under way goes on."""
        if config.format != self._incoming.wire:
            self._incoming = Incoming(config.format)
        if config.turn_detection is None:
            self.detector = None
            self._drop_until(self._total)
            return
        settings = TurnSettings.of(config.turn_detection, self._max_s)
        if self.detector is None:
            self._start_detector(settings)
        else:
            self.detector.settings = settings

    async def append(self, audio: str) -> AsyncIterator[Detection]:
        """Takes sound as base64 text and yields what the detector finds, each at once: whoever gets `Stopped` or
        `TimedOut` ends the turn with `commit` before going on.

        Raises:
            ProtocolError: not sound of this format, or more of it than a turn may have; it is not heard then.
        """
        if len(audio) <= SHORT_MESSAGE:
            wav = self._incoming.step(audio)
            await asyncio.sleep(0)  # a client that sends faster than real time does not keep the loop to itself
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
        for start in range(0, len(wav), AT_ONCE):
            piece = wav[start : start + AT_ONCE]
            if len(piece) <= SHORT_PIECE:
                probabilities = self._probability.step(piece)
            else:
                probabilities = await asyncio.to_thread(self._probability.step, piece)
            self._waiting.append(piece)
            self._num_waiting += len(piece)
            self._total += len(piece)
            for probability in probabilities:
                detection = self.detector.step(probability)
                if isinstance(detection, Started):
                    self._drop_until(detection.sample)
                if isinstance(detection, TimedOut):
                    # The silence itself means nothing to the model and costs context; a little stands for it.
                    self._drop_until(
                        detection.sample - max(self.detector.settings.prefix, MIN_COMMIT_MS * RATE // 1000)
                    )
                if detection is not None:
                    yield detection
            if self.detector.speaking:
                await self._hear_until(self.detector.sample)
        self._drop_until(self._total - int(WAITING_S * RATE))

    async def commit(self, detection: Detection | None = None) -> UserTurn:
        """Ends the turn: where the detector said, or here when the client does it.

        Raises:
            ProtocolError: less than 100 ms are there.
        """
        if detection is not None:
            await self._hear_until(detection.sample)
        else:
            await self._hear_until(self._total)
            await self._hear(self._incoming.end())
            self._restart()
        if to_ms(self._open) < MIN_COMMIT_MS:
            have = 1000 * self._open / RATE
            self.clear()
            raise ProtocolError(
                f"the input audio buffer is too small to commit: it holds {have:.0f} ms, and at least "
                f"{MIN_COMMIT_MS} ms are needed",
                "input_audio_buffer_commit_empty",
            )
        loop = asyncio.get_running_loop()
        began, parts = loop.time(), self._parts
        self._parts, self._open = [], 0
        spoken = await self.ear.finish()
        vocabulary = self.ear.models.vocabulary
        turn = turn_of(Role.USER, vocabulary.speech_ids(spoken.codes), vocabulary)
        return UserTurn(turn, Sound.of(parts, RATE), loop.time() - began)

    def clear(self) -> None:
        """Forgets all sound that is not committed."""
        self.ear.discard()
        self._parts, self._open = [], 0
        self._incoming = Incoming(self._incoming.wire)
        self._restart()

    def close(self) -> None:
        """The conversation is over."""
        self.clear()
        self.ear.close()

    def _restart(self) -> None:
        """Detection begins anew behind the last sample."""
        self._drop_until(self._total)
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

    def _drop_until(self, sample: int) -> None:
        self._take_until(sample)

    def _take_until(self, sample: int) -> list[NDArray[np.float32]]:
        """Takes out what waits from before this position."""
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
