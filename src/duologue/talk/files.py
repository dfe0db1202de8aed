"""A sound file in place of the microphone, and one in place of the loudspeaker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duologue.audio import load_audio, resample, save_audio
from duologue.client.connection import WIRE_RATE
from duologue.client.pace import CHUNK, Pace
from duologue.client.playback import Playback
from duologue.pcm import from_int16, to_int16


def read_pcm(path: str | Path) -> NDArray[np.int16]:
    """A sound file as (S,) at `WIRE_RATE`. Raises ValueError as `load_audio`."""
    wav, sample_rate = load_audio(path)
    return to_int16(resample(wav, sample_rate, WIRE_RATE))


class PlaybackRecorder:
    """A loudspeaker that writes down what it plays: the answers one after the other, without the waiting between."""

    def __init__(self, playback: Playback) -> None:
        self._playback = playback
        self._played: list[NDArray[np.int16]] = []

    async def run(self, pace: Pace) -> None:
        """Plays in real time until it is cancelled."""
        while True:
            await pace.tick()
            if self._playback.active:
                self._played.append(self._playback.take(CHUNK))

    @property
    def num_samples(self) -> int:
        return sum(map(len, self._played))

    def save(self, path: str | Path) -> None:
        """Writes it as a sound file; its name says of what kind. Raises ValueError when nothing was played."""
        if not self._played:
            raise ValueError(f"{path} is not written: nothing was played")
        save_audio(path, from_int16(np.concatenate(self._played)), WIRE_RATE)
