"""Microphone and loudspeaker with fake devices, and the errors without them."""

import asyncio
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duologue.cli import main
from duologue.client.connection import WIRE_RATE
from duologue.client.playback import CHUNK, Playback
from duologue.talk.sounds import Loudspeaker, Microphone, devices
from tests.clock import Clock

SOUND = (np.arange(WIRE_RATE) % 1000 + 1).astype(np.int16)  # one second, never silent


class FakeStream:
    def __init__(self, device: "FakeDevice", **settings: Any) -> None:
        if settings["samplerate"] not in device.rates:
            raise device.PortAudioError("Invalid sample rate")
        self.callback, self.settings = settings["callback"], settings
        device.streams.append(self)

    def start(self) -> None: ...

    def close(self) -> None: ...


class FakeDevice:
    """A fake of the sounddevice module."""

    PortAudioError = type("PortAudioError", (Exception,), {})

    def __init__(self, rates: tuple[int, ...] = (24000,), kinds: tuple[str, ...] = ("input", "output")) -> None:
        self.rates, self.kinds, self.streams = rates, kinds, list[FakeStream]()

    def query_devices(self, kind: str) -> dict[str, Any]:
        if kind not in self.kinds:
            raise self.PortAudioError("Error querying device -1")
        return {"default_samplerate": float(self.rates[0])}

    def check_input_settings(self, samplerate: int, channels: int, dtype: str) -> None:
        if samplerate not in self.rates:
            raise self.PortAudioError("Invalid sample rate")

    check_output_settings = check_input_settings

    def InputStream(self, **settings: Any) -> FakeStream:  # noqa: N802
        return FakeStream(self, **settings)

    OutputStream = InputStream


def test_the_microphone_drops_and_counts_the_oldest_chunks() -> None:
    async def listen() -> tuple[int, list[int]]:
        device, microphone = FakeDevice(), Microphone(asyncio.get_running_loop())
        with microphone.open(device):
            for number in range(103):
                status = types.SimpleNamespace(input_overflow=number == 50)
                device.streams[0].callback(np.full((CHUNK, 1), number, np.int16), CHUNK, None, status)
            await asyncio.sleep(0)
            chunks = microphone.chunks()
            return microphone.num_lost, [int((await anext(chunks))[0]) for _ in range(2)]

    assert asyncio.run(listen()) == (4, [3, 4])


@pytest.mark.parametrize("rate", [24000, 48000, 44100])
def test_the_loudspeaker_plays_at_the_rate_of_the_device(rate: int) -> None:
    device, clock = FakeDevice((rate,)), Clock()
    playback = Playback(WIRE_RATE, ahead_ms=0, clock=clock)
    tone = (8000 * np.sin(np.arange(WIRE_RATE) * 2 * np.pi * 440 / WIRE_RATE)).astype(np.int16)
    playback.add("a", tone)
    with Loudspeaker(playback).open(device):
        stream = device.streams[0]
        assert stream.settings["samplerate"] == rate
        when = types.SimpleNamespace(outputBufferDacTime=10.03, currentTime=10.0)
        parts = []
        for _ in range(25):  # half a second
            out = np.zeros((rate // 50, 1), np.int16)
            stream.callback(out, len(out), when, None)
            parts.append(out[:, 0])
            clock.now += 0.02
    played = np.concatenate(parts)[rate // 10 :].astype(float)
    spectrum = np.abs(np.fft.rfft(played * np.hanning(len(played))))
    assert spectrum.argmax() * rate / len(played) == pytest.approx(440, abs=3)
    (cut,) = playback.cut()  # 500 ms were given, 30 are inside the device
    assert cut.played_ms == pytest.approx(470, abs=1 if rate == WIRE_RATE else 45)


def test_a_device_that_refuses_is_named() -> None:
    device = FakeDevice((24000,))
    device.check_output_settings = lambda **settings: None  # type: ignore[method-assign]
    device.rates = ()
    with pytest.raises(ValueError, match=r"the loudspeaker cannot be opened \(Invalid sample rate\)"):
        Loudspeaker(Playback(WIRE_RATE)).open(device).__enter__()


@pytest.mark.parametrize(("missing", "found"), [("microphone", ("output",)), ("loudspeaker", ("input",))])
def test_no_device_is_one_sentence(
    missing: str, found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", FakeDevice(kinds=found))
    assert main(["talk", "--server", "http://127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"duologue: this machine has no {missing}; use audio files instead")
    assert error.count("\n") == 1


def test_no_sounddevice_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ValueError, match=r'sounddevice is not installed: run pip install -e "\.\[talk\]"'):
        devices("microphone")


def test_no_portaudio_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    with pytest.raises(ValueError, match="PortAudio library not found: install it"):
        devices("microphone")
