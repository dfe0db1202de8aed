"""The microphone client of Hugging Face's speech-to-speech (`talk`), with a scripted sound device."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from speech_to_speech.api.openai_realtime import audio_client

SAMPLE_RATE = 24_000


@dataclass
class Heard:
    """What the client showed and played, and errors."""

    texts: list[str] = field(default_factory=list)
    sound: bytes = b""
    errors: list[str] = field(default_factory=list)


class Stream:
    """A stream of a sound device in real time: `work` is called with the samples that a block has, every block."""

    def __init__(self, work: Callable[[int], None], blocksize: int, samplerate: int) -> None:
        self._work, self._blocksize, self._pause = work, blocksize, blocksize / samplerate
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def close(self) -> None:
        pass

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            self._work(self._blocksize)
            due += self._pause


def sound_device(pcm: bytes, heard: Heard) -> ModuleType:
    """A module like `sounddevice`: its microphone says `pcm` and then silence, its loudspeaker fills `heard`."""
    said = bytearray(pcm)

    def microphone(*, callback: Callable[..., None], blocksize: int, samplerate: int, **_: Any) -> Stream:
        def work(count: int) -> None:
            block = bytes(said[: 2 * count]).ljust(2 * count, b"\0")
            del said[: 2 * count]
            callback(block, count, None, None)

        return Stream(work, blocksize, samplerate)

    def loudspeaker(*, callback: Callable[..., None], blocksize: int, samplerate: int, **_: Any) -> Stream:
        def work(count: int) -> None:
            block = bytearray(2 * count)
            callback(block, count, None, None)
            if heard.sound or any(block):  # from the first sound on
                heard.sound += bytes(block)

        return Stream(work, blocksize, samplerate)

    module = ModuleType("sounddevice")
    module.RawInputStream, module.RawOutputStream = microphone, loudspeaker  # type: ignore[attr-defined]
    return module


async def talk(url: str, key: str, pcm: bytes) -> Heard:
    """Asks aloud and waits until the answer was played.

    Args:
        url: base URL, such as ws://127.0.0.1:8000/v1.
        pcm: a question with silence after it, 16 bit at 24 kHz.
    """
    heard, stop = Heard(), threading.Event()
    handle = audio_client.handle_server_event

    def noting(event: Any, *, playback: Any, **more: Any) -> None:
        handle(event, playback=playback, **more)
        if event.type == "response.output_audio_transcript.done":
            heard.texts.append(event.transcript)
        elif event.type == "error":
            heard.errors.append(event.error.message)
        elif event.type == "response.done":
            threading.Thread(target=_stop_after, args=(playback, stop), daemon=True).start()

    config = audio_client.RealtimeAudioClientConfig(
        url=f"{url}/realtime", api_key=key, send_rate=SAMPLE_RATE, recv_rate=SAMPLE_RATE, instructions="You are brief."
    )
    before = sys.modules.get("sounddevice")
    sys.modules["sounddevice"] = sound_device(pcm, heard)
    audio_client.handle_server_event = noting
    try:
        await audio_client.listen_and_play_realtime(config, stop_event=stop)
    finally:
        audio_client.handle_server_event = handle
        del sys.modules["sounddevice"]
        if before is not None:
            sys.modules["sounddevice"] = before
    return heard


def _stop_after(playback: Any, stop: threading.Event) -> None:
    while playback.buffered_bytes:
        time.sleep(0.02)
    stop.set()
