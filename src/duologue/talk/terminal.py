"""Puts a conversation together: a connection, something to hear with, something to play with, something to look at."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from duologue.client.connection import WIRE_RATE, open_connection
from duologue.client.conversation import Summary, Talk, TalkSettings
from duologue.client.pace import Pace, paced, silence
from duologue.client.playback import Playback
from duologue.talk.files import PlaybackRecorder, read_pcm
from duologue.talk.screen import Display, JsonLines, Meter, Screen
from duologue.talk.sounds import Loudspeaker, Microphone, devices


@dataclass(frozen=True)
class Ends:
    """Where sound comes from and goes to.

    Attributes:
        source: a sound file; None is the microphone.
        target: a sound file; None is the loudspeaker.
    """

    source: Path | None = None
    target: Path | None = None

    def check(self) -> None:
        """Raises ValueError, one sentence, when a file cannot be read or a device is not there."""
        if self.source is not None:
            read_pcm(self.source)
        else:
            devices("microphone")
        if self.target is None:
            devices("loudspeaker")


async def converse(server: str, model: str, key: str, ends: Ends, settings: TalkSettings, as_json: bool) -> Summary:
    """Holds one conversation; Ctrl-C ends it.

    Args:
        server, model, key: see `open_connection`.
        as_json: print every event as a line of JSON instead of a transcript.
    Raises:
        ValueError: one sentence: a file or a device that cannot be used, a server that is not there or refuses.
    """
    playback, meter = Playback(WIRE_RATE), Meter()
    display: Display = JsonLines() if as_json else Screen(model, lambda: meter.level, lambda: playback.level)
    heard = read_pcm(ends.source) if ends.source is not None else None
    recorder = PlaybackRecorder(playback)
    async with open_connection(server, model, key) as connection:
        talk = Talk(connection, playback, settings, display.observe)
        with contextlib.ExitStack() as stack:
            if ends.target is None:
                stack.enter_context(Loudspeaker(playback).open(devices("loudspeaker")))
            else:
                playing = asyncio.create_task(recorder.run(Pace()))
                stack.callback(playing.cancel)
            stack.enter_context(display)
            stack.enter_context(_ends_on_ctrl_c(talk))
            if heard is not None:
                pace = Pace()
                summary = await talk.run(meter.through(paced(heard, pace)), silence(pace))
            else:
                microphone = Microphone(asyncio.get_running_loop())
                stack.enter_context(microphone.open(devices("microphone")))
                summary = await talk.run(meter.through(microphone.chunks()))
                summary.num_lost = microphone.num_lost
    if ends.target is not None and recorder.num_samples:
        recorder.save(ends.target)
        summary.output = str(ends.target)
    return summary


@contextlib.contextmanager
def _ends_on_ctrl_c(talk: Talk) -> Iterator[None]:
    """Ctrl-C is the way to end a conversation: the summary comes and the file is written."""
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
