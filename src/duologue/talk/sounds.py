"""Microphone and loudspeaker of this machine, through sounddevice (PortAudio)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE
from duologue.client.playback import Playback

CHUNK_S = 0.02
MAX_WAITING = 100  # chunks of the microphone: 2 s
DIRECTIONS = {"microphone": "input", "loudspeaker": "output"}


def devices(*kinds: Literal["microphone", "loudspeaker"]) -> Any:
    """sounddevice, when this machine has it and devices of these kinds.

    Raises:
        ValueError: one sentence that says what is missing and what mends it.
    """
    try:
        import sounddevice
    except ImportError:
        raise ValueError('sounddevice is not installed: pip install "duologue[talk]"') from None
    except OSError as error:  # the package is there, the library is not
        raise ValueError(
            f"{error}: install it (Debian: apt install libportaudio2; macOS: brew install portaudio)"
        ) from None
    for kind in kinds:
        try:
            sounddevice.query_devices(kind=DIRECTIONS[kind])
        except (ValueError, sounddevice.PortAudioError):
            raise ValueError(
                f"this machine has no {kind}; give sound files instead: duologue talk --input a.wav --output b.wav"
            ) from None
    return sounddevice


class Microphone:
    """Chunks of 20 ms at `WIRE_RATE`. When nobody takes them the oldest are lost, and counted.

    Attributes:
        num_lost: chunks that were lost, by us or by the device.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: asyncio.Queue[NDArray[np.int16]] = asyncio.Queue(MAX_WAITING)
        self._resampler: soxr.ResampleStream | None = None
        self.num_lost = 0

    @contextlib.contextmanager
    def open(self, sounddevice: Any) -> Iterator[None]:
        """Listens. Raises ValueError when the device refuses."""
        rate = _rate(sounddevice, "input")
        if rate != WIRE_RATE:
            self._resampler = soxr.ResampleStream(rate, WIRE_RATE, 1, dtype="int16")
        with _refusals(sounddevice, "microphone"):
            stream = sounddevice.InputStream(
                samplerate=rate,
                blocksize=round(rate * CHUNK_S),
                channels=1,
                dtype="int16",
                latency="low",
                callback=self.hear,
            )
            stream.start()
        with contextlib.closing(stream):
            yield

    def hear(self, samples: NDArray[np.int16], num: int, when: object, status: Any) -> None:
        """Called by the device's thread: samples (S, 1)."""
        pcm = samples[:, 0].copy()
        if self._resampler is not None:
            pcm = self._resampler.resample_chunk(pcm)
        lost = bool(status and status.input_overflow)
        with contextlib.suppress(RuntimeError):  # the loop has just been closed
            self._loop.call_soon_threadsafe(self._put, pcm, lost)

    async def chunks(self) -> AsyncIterator[NDArray[np.int16]]:
        """What is heard, without end."""
        while True:
            yield await self._waiting.get()

    def _put(self, pcm: NDArray[np.int16], lost: bool) -> None:
        self.num_lost += lost
        if self._waiting.full():
            self._waiting.get_nowait()
            self.num_lost += 1
        self._waiting.put_nowait(pcm)


class Loudspeaker:
    """Plays what a `Playback` holds."""

    def __init__(self, playback: Playback) -> None:
        self._playback = playback
        self._resampler: soxr.ResampleStream | None = None
        self._rest = np.zeros(0, np.int16)  # resampled and not taken by the device yet
        self._rate = WIRE_RATE
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def open(self, sounddevice: Any) -> Iterator[None]:
        """Plays. Raises ValueError when the device refuses."""
        self._rate = _rate(sounddevice, "output")
        if self._rate != WIRE_RATE:
            self._resampler = soxr.ResampleStream(WIRE_RATE, self._rate, 1, dtype="int16")
        with _refusals(sounddevice, "loudspeaker"):
            stream = sounddevice.OutputStream(
                samplerate=self._rate,
                blocksize=round(self._rate * CHUNK_S),
                channels=1,
                dtype="int16",
                latency="low",
                callback=self.play,
            )
            stream.start()
        with contextlib.closing(stream):
            yield

    def play(self, out: NDArray[np.int16], num: int, when: Any, status: object) -> None:
        """Called by the device's thread: fills out (S, 1)."""
        delay_s = max(0.0, when.outputBufferDacTime - when.currentTime)
        if self._resampler is None:
            out[:, 0] = self._playback.take(num, delay_s)
            return
        while len(self._rest) < num:
            later_s = delay_s + len(self._rest) / self._rate
            pcm = self._playback.take(round(WIRE_RATE * CHUNK_S), later_s)
            self._rest = np.concatenate([self._rest, self._resampler.resample_chunk(pcm)])
        out[:, 0], self._rest = self._rest[:num], self._rest[num:]


def _rate(sounddevice: Any, kind: str) -> int:
    """That of the wire where the device takes it, else the device's own."""
    check = sounddevice.check_input_settings if kind == "input" else sounddevice.check_output_settings
    try:
        check(samplerate=WIRE_RATE, channels=1, dtype="int16")
    except (ValueError, sounddevice.PortAudioError):
        return int(sounddevice.query_devices(kind=kind)["default_samplerate"])
    return WIRE_RATE


@contextlib.contextmanager
def _refusals(sounddevice: Any, name: str) -> Iterator[None]:
    try:
        yield
    except sounddevice.PortAudioError as error:
        raise ValueError(f"the {name} cannot be opened ({error})") from None
