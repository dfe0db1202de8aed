"""Echo cancellation of `duologue talk`: the loudspeaker's sound leaves the microphone, the user's voice stays."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE
from duologue.client.playback import CHUNK, Playback
from duologue.pcm import from_int16, to_int16
from duologue.sound_files import load_audio
from duologue.talk.echo import FRAME, EchoCanceller, open_echo_canceller
from duologue.talk.sounds import Loudspeaker, Microphone
from tests.clock import Clock
from tests.test_talk_sounds import FakeDevice

pytest.importorskip("livekit", reason="livekit is not installed (extra talk)")
SOUNDS = Path(__file__).parent.parent / "docs" / "sounds"
Pcm = NDArray[np.int16]


def power_db(pcm: Pcm) -> float:
    return float(10 * np.log10(np.mean(from_int16(pcm).astype(np.float64) ** 2) + 1e-12))


@pytest.fixture(scope="module")
def answer() -> Pcm:
    """An answer twice, with silence around."""
    wav = to_int16(load_audio(SOUNDS / "answer.flac", WIRE_RATE)[0])
    silence = np.zeros(WIRE_RATE // 2, np.int16)
    return np.concatenate([silence, wav, silence, wav, silence])


def echo_of(played: Pcm, gain_db: float, delay_s: float) -> Pcm:
    """The sound as a microphone records it, through a room."""
    rng = np.random.default_rng(0)
    time = np.arange(WIRE_RATE // 4) / WIRE_RATE
    room = 0.3 * rng.standard_normal(len(time)) * np.exp(-time / 0.05)
    room[0] = 1.0
    heard = np.convolve(from_int16(played), room)[: len(played)] * 10 ** (gain_db / 20)
    late = np.concatenate([np.zeros(int(delay_s * WIRE_RATE)), heard])[: len(played)]
    return to_int16((late + 1e-4 * rng.standard_normal(len(late))).astype(np.float32))


def cleaned(played: Pcm, recorded: Pcm, sizes: tuple[int, ...] = (CHUNK,)) -> Pcm:
    echo, found, at, number = EchoCanceller(), [], 0, 0
    while at < len(played):
        size = sizes[number % len(sizes)]
        echo.play(played[at : at + size])
        found.append(echo.clean(recorded[at : at + size]))
        at, number = at + size, number + 1
    return np.concatenate(found)


@pytest.mark.parametrize(("gain_db", "delay_s"), [(-10.0, 0.04), (-20.0, 0.15), (-30.0, 0.04)])
def test_the_echo_leaves_and_the_voice_stays(answer: Pcm, gain_db: float, delay_s: float) -> None:
    recorded = echo_of(answer, gain_db, delay_s)
    found = cleaned(answer, recorded)
    second = slice(len(answer) // 2 + WIRE_RATE // 2, len(found) - WIRE_RATE // 2)
    assert power_db(found[second]) < power_db(recorded[second]) - 15

    question = to_int16(load_audio(SOUNDS / "question.flac", WIRE_RATE)[0])
    begin = len(answer) // 2 + WIRE_RATE // 2
    both = recorded.copy()
    size = min(len(question), len(both) - begin)
    mixed = both[begin : begin + size].astype(np.int32) + question[:size]
    both[begin : begin + size] = np.clip(mixed, -32768, 32767).astype(np.int16)
    spoken = cleaned(answer, both)[begin : begin + size]
    assert power_db(spoken) > power_db(found[begin : begin + size]) + 10


def test_chunks_of_any_size_lose_nothing(answer: Pcm) -> None:
    recorded = echo_of(answer, -20.0, 0.05)
    whole = cleaned(answer, recorded)
    odd = cleaned(answer, recorded, (100, 441, 7, 960))
    assert len(whole) == len(odd) == len(answer) // FRAME * FRAME
    second = slice(len(answer) // 2 + WIRE_RATE // 2, len(odd) - WIRE_RATE // 2)
    assert power_db(odd[second]) < power_db(recorded[second]) - 15


def test_loudspeaker_and_microphone_share_it(answer: Pcm) -> None:
    async def talk() -> Pcm:
        echo, clock, device = EchoCanceller(), Clock(), FakeDevice()
        playback = Playback(WIRE_RATE, ahead_ms=0, clock=clock)
        playback.add("a", answer)
        microphone = Microphone(asyncio.get_running_loop(), echo)
        chunks, found, air = microphone.chunks(), [], np.zeros(CHUNK, np.int16)
        with Loudspeaker(playback, echo).open(device), microphone.open(device):
            loudspeaker, recorder = (stream.callback for stream in device.streams)
            when = types.SimpleNamespace(outputBufferDacTime=10.0, currentTime=10.0)
            for _ in range(len(answer) // CHUNK):
                recorder((air // 10)[:, None], CHUNK, None, None)
                out = np.zeros((CHUNK, 1), np.int16)
                loudspeaker(out, CHUNK, when, None)
                air = out[:, 0]  # 20 ms later
                clock.now += CHUNK / WIRE_RATE
                await asyncio.sleep(0)
                found.append(await anext(chunks))
        return np.concatenate(found)

    found = asyncio.run(talk())
    second = slice(len(answer) // 2 + WIRE_RATE // 2, len(found) - WIRE_RATE // 2)
    assert power_db(found[second]) < power_db(answer[second] // 10) - 15


def test_without_the_library_nothing_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "livekit.rtc", None)
    assert open_echo_canceller() is None


def test_the_process_ends_in_order() -> None:
    code = """
import numpy as np
from duologue.talk.echo import EchoCanceller

echo = EchoCanceller()
echo.play(np.zeros(480, np.int16))
assert len(echo.clean(np.zeros(480, np.int16))) == 480
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
