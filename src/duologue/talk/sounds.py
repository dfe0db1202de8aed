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
from duologue.talk.echo import EchoCanceller

CHUNK_S = 0.02
MAX_WAITING = 100  # microphone chunks: 2 s
DIRECTIONS = {"microphone": "input", "loudspeaker": "output"}


def devices(*kinds: Literal["microphone", "loudspeaker"]) -> Any:
    """Imports sounddevice and checks that devices of these kinds exist.

    Raises:
        ValueError: names what is missing and how to install it.
    """
    try:
        import sounddevice
    except ImportError:
        raise ValueError(
            'sounddevice is not installed: run pip install -e ".[talk]" in the folder of Duologue'
        ) from None
    except OSError as error:  # the package is installed, PortAudio is not
        raise ValueError(
            f"{error}: install it (Debian: apt install libportaudio2; macOS: brew install portaudio)"
        ) from None
    for kind in kinds:
        try:
            sounddevice.query_devices(kind=DIRECTIONS[kind])
        except (ValueError, sounddevice.PortAudioError):
            raise ValueError(
                f"this machine has no {kind}; use audio files instead: duologue talk --input a.wav --output b.wav"
            ) from None
    return sounddevice


class Microphone:
    """A source of 20 ms chunks at `WIRE_RATE`. When the queue is full, the oldest chunk is dropped.

    Args:
        echo: takes the loudspeaker's sound out of the chunks; None leaves them as they are.

    Attributes:
        num_lost: chunks dropped by the queue or the device.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, echo: EchoCanceller | None = None) -> None:
        self._loop, self._echo = loop, echo
        self._waiting: asyncio.Queue[NDArray[np.int16]] = asyncio.Queue(MAX_WAITING)
        self._resampler: soxr.ResampleStream | None = None
        self.num_lost = 0

    @contextlib.contextmanager
    def open(self, sounddevice: Any) -> Iterator[None]:
        """Opens the device. Raises ValueError if it cannot be opened."""
        rate = _rate(sounddevice, "input")
        if rate != WIRE_RATE:
            self._resampler = soxr.ResampleStream(rate, WIRE_RATE, 1, dtype="int16")
        with _device_errors(sounddevice, "microphone"):
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
        """Receives samples (S, 1) on the device's thread."""
        pcm = samples[:, 0].copy()
        if self._resampler is not None:
            pcm = self._resampler.resample_chunk(pcm)
        if self._echo is not None:
            pcm = self._echo.clean(pcm)
        lost = bool(status and status.input_overflow)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._put, pcm, lost)

    async def chunks(self) -> AsyncIterator[NDArray[np.int16]]:
        """Yields the recorded chunks without end."""
        while True:
            yield await self._waiting.get()

    def _put(self, pcm: NDArray[np.int16], lost: bool) -> None:
        self.num_lost += lost
        if self._waiting.full():
            self._waiting.get_nowait()
            self.num_lost += 1
        self._waiting.put_nowait(pcm)


class Loudspeaker:
    """Plays the queue of a `Playback`.

    Args:
        echo: gets what is played; None for no echo cancellation.
    """

    def __init__(self, playback: Playback, echo: EchoCanceller | None = None) -> None:
        self._playback, self._echo = playback, echo
        self._resampler: soxr.ResampleStream | None = None
        self._rest = np.zeros(0, np.int16)  # resampled samples for the next call
        self._rate = WIRE_RATE
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def open(self, sounddevice: Any) -> Iterator[None]:
        """Opens the device. Raises ValueError if it cannot be opened."""
        self._rate = _rate(sounddevice, "output")
        if self._rate != WIRE_RATE:
            self._resampler = soxr.ResampleStream(WIRE_RATE, self._rate, 1, dtype="int16")
        with _device_errors(sounddevice, "loudspeaker"):
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
        """Fills out (S, 1) on the device's thread."""
        delay_s = max(0.0, when.outputBufferDacTime - when.currentTime)
        if self._resampler is None:
            out[:, 0] = self._take(num, delay_s)
            return
        while len(self._rest) < num:
            later_s = delay_s + len(self._rest) / self._rate
            pcm = self._take(round(WIRE_RATE * CHUNK_S), later_s)
            self._rest = np.concatenate([self._rest, self._resampler.resample_chunk(pcm)])
        out[:, 0], self._rest = self._rest[:num], self._rest[num:]

    def _take(self, num: int, delay_s: float) -> NDArray[np.int16]:
        pcm = self._playback.take(num, delay_s)
        if self._echo is not None:
            self._echo.play(pcm)
        return pcm


def _rate(sounddevice: Any, kind: str) -> int:
    """Returns `WIRE_RATE` if the device supports it, else the device's default rate."""
    check = sounddevice.check_input_settings if kind == "input" else sounddevice.check_output_settings
    try:
        check(samplerate=WIRE_RATE, channels=1, dtype="int16")
    except (ValueError, sounddevice.PortAudioError):
        return int(sounddevice.query_devices(kind=kind)["default_samplerate"])
    return WIRE_RATE


@contextlib.contextmanager
def _device_errors(sounddevice: Any, name: str) -> Iterator[None]:
    try:
        yield
    except sounddevice.PortAudioError as error:
        raise ValueError(f"the {name} cannot be opened ({error})") from None
