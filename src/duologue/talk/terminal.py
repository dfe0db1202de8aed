"""Runs a conversation: connects a microphone or file, a loudspeaker or file, and a display to the server."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE, open_connection
from duologue.client.conversation import TalkClient, TalkSettings, TalkSummary
from duologue.client.playback import CHUNK, Playback, Ticker, in_real_time, silence
from duologue.pcm import from_int16, to_int16
from duologue.sound_files import load_audio, save_audio
from duologue.talk.echo import open_echo_canceller
from duologue.talk.screen import Display, JsonDisplay, LevelMeter, TerminalDisplay
from duologue.talk.sounds import Loudspeaker, Microphone, devices


def read_pcm(path: str | Path) -> NDArray[np.int16]:
    """Reads an audio file as (S,) int16 at `WIRE_RATE`. Raises ValueError as `load_audio`."""
    return to_int16(load_audio(path, WIRE_RATE)[0])


class PlaybackRecorder:
    """A virtual loudspeaker that records the answers, without the pauses between them."""

    def __init__(self, playback: Playback) -> None:
        self._playback = playback
        self._played: list[NDArray[np.int16]] = []

    async def run(self, ticker: Ticker) -> None:
        """Plays in real time until cancelled."""
        while True:
            await ticker.tick()
            if self._playback.active:
                self._played.append(self._playback.take(CHUNK))

    @property
    def num_samples(self) -> int:
        return sum(map(len, self._played))

    def save(self, path: str | Path) -> None:
        """Writes the recording; the suffix selects the format. Raises ValueError if nothing was played."""
        if not self._played:
            raise ValueError(f"{path} is not written: nothing was played")
        save_audio(path, from_int16(np.concatenate(self._played)), WIRE_RATE)


@dataclass(frozen=True)
class AudioEndpoints:
    """Source and target of the audio.

    Attributes:
        source: an audio file, or None for the microphone.
        target: an audio file, or None for the loudspeaker.
        cancels_echo: whether the loudspeaker's sound is taken out of the microphone, where livekit is installed.
    """

    source: Path | None = None
    target: Path | None = None
    cancels_echo: bool = True

    def check(self) -> None:
        """Raises ValueError if a file is unreadable or a device is missing."""
        if self.source is not None:
            read_pcm(self.source)
        else:
            devices("microphone")
        if self.target is None:
            devices("loudspeaker")


async def converse(
    server: str,
    model: str,
    key: str,
    endpoints: AudioEndpoints,
    settings: TalkSettings,
    as_json: bool,
    reconnect: bool = False,
) -> TalkSummary:
    """Holds one conversation; Ctrl-C ends it.

    Args:
        server, model, key, reconnect: see `open_connection`.
        endpoints: source and target of the audio.
        settings: settings of the conversation.
        as_json: print events as JSON lines instead of a transcript.

    Raises:
        ValueError: one sentence: a file or device is unusable, or the server is missing or refused.
    """
    playback, meter = Playback(WIRE_RATE), LevelMeter()
    display: Display = JsonDisplay() if as_json else TerminalDisplay(model, lambda: meter.level, lambda: playback.level)
    heard = read_pcm(endpoints.source) if endpoints.source is not None else None
    recorder = PlaybackRecorder(playback)
    in_the_air = endpoints.source is None and endpoints.target is None
    echo = open_echo_canceller() if endpoints.cancels_echo and in_the_air else None
    async with open_connection(server, model, key, reconnect) as connection:
        talk = TalkClient(connection, playback, settings, display.observe)
        with contextlib.ExitStack() as stack:
            if endpoints.target is None:
                stack.enter_context(Loudspeaker(playback, echo).open(devices("loudspeaker")))
            else:
                playing = asyncio.create_task(recorder.run(Ticker()))
                stack.callback(playing.cancel)
            stack.enter_context(display)
            stack.enter_context(_ends_on_ctrl_c(talk))
            if heard is not None:
                ticker = Ticker()
                summary = await talk.run(meter.through(in_real_time(heard, ticker)), silence(ticker))
            else:
                microphone = Microphone(asyncio.get_running_loop(), echo)
                stack.enter_context(microphone.open(devices("microphone")))
                summary = await talk.run(meter.through(microphone.chunks()))
                summary.num_lost = microphone.num_lost
    if endpoints.target is not None and recorder.num_samples:
        recorder.save(endpoints.target)
        summary.output = str(endpoints.target)
    return summary


@contextlib.contextmanager
def _ends_on_ctrl_c(talk: TalkClient) -> Iterator[None]:
    """Makes Ctrl-C end the conversation, so that the summary and the output file are still written."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, talk.stop)
    except (NotImplementedError, RuntimeError):  # Windows; a thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
