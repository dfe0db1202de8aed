"""Sound files as people and programs leave them: every door reads them through `load_audio`."""

import io
import logging
import os
import struct
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from duologue import rates
from duologue.serving.encoders import FILE_FORMATS, FileEncoder, FileFormat, encode
from duologue.sound_files import AudioTooLong, load_audio, save_audio

RATE = 24_000
SECONDS = 4.0


def tone(hertz: float = 220.0, rate: int = RATE, seconds: float = SECONDS) -> NDArray[np.float32]:
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def file_of(wav: NDArray[np.float32], kind: str, subtype: str | None = None, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wav, rate, subtype, format=kind)
    return buffer.getvalue()


def strength(wav: NDArray[np.float32], rate: int, hertz: float) -> float:
    """Amplitude of one frequency."""
    time = np.arange(len(wav)) / rate
    return float(2 * abs(np.mean(wav * np.exp(-2j * np.pi * hertz * time))))


@pytest.mark.parametrize("kind", [kind for kind in FILE_FORMATS if kind != "pcm"])
def test_what_the_server_streams_is_read_back(kind: FileFormat, tmp_path: Path) -> None:
    encoder, wav = FileEncoder(kind), tone(rate=rates.SPEAK_SAMPLE_RATE)
    parts = [encoder.step(wav[start : start + 4000]) for start in range(0, len(wav), 4000)]
    data = b"".join([*parts, encoder.step(wav[:0], last=True)])
    path = tmp_path / f"answer.{kind}"
    path.write_bytes(data)
    for source in (path, data):
        heard, rate = load_audio(source)
        assert len(heard) / rate == pytest.approx(SECONDS, abs=0.1)
        assert strength(heard, rate, 220.0) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_sizes_in_the_header_of_a_wav_are_not_trusted(size: int) -> None:
    data = bytearray(file_of(tone(), "WAV"))
    at = data.index(b"data")
    data[4:8] = data[at + 4 : at + 8] = struct.pack("<I", size)
    heard, _ = load_audio(bytes(data))
    np.testing.assert_allclose(heard, tone(), atol=1e-4)


def test_a_wav_without_samples_and_notes_behind_is_empty() -> None:
    note = b"LIST" + struct.pack("<I", 4) + b"INFO"
    with pytest.raises(ValueError, match="is empty"):
        load_audio(file_of(tone()[:0], "WAV") + note)


def test_pipes_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(tone(), "WAV")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    heard, rate = load_audio(pipe)
    writer.join()
    assert (len(heard), rate) == (len(tone()), RATE)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    again, _ = load_audio("-")
    np.testing.assert_array_equal(again, heard)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "IMA_ADPCM", "MS_ADPCM", "PCM_24", "ULAW", "DOUBLE"])
def test_codecs_inside_a_wav(subtype: str, tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    path.write_bytes(file_of(tone(rate=8000), "WAV", subtype, 8000))
    heard, rate = load_audio(path)
    assert len(heard) / rate == pytest.approx(SECONDS, abs=0.05)
    assert strength(heard, rate, 220.0) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("suffix", [".raw", ".pcm"])
def test_samples_without_a_header_get_a_sentence(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"sound{suffix}"
    path.write_bytes((tone() * 32767).astype("<i2").tobytes())
    with pytest.raises(ValueError, match="has no header that states its sample rate"):
        load_audio(path)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(40) + data[middle + 40 :]


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("harm", [cut, damaged])
def test_a_harmed_file_keeps_what_was_decoded(kind: str, harm: Any, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).standard_normal(round(SECONDS * RATE)).astype(np.float32)
    data = harm(file_of(0.1 * noise, kind))
    with caplog.at_level(logging.WARNING):
        heard, rate = load_audio(data)
    assert len(heard) / rate > 0.3 * SECONDS
    if kind == "FLAC":  # the others find their way back, or know no better
        assert "is damaged: only its first" in caplog.text


def test_one_silent_channel_is_left_out_and_two_are_mixed() -> None:
    one, other, silence = tone(220.0), tone(700.0), np.zeros(len(tone()), np.float32)
    for voice in ([silence, one], [one, silence], [silence, one, silence]):
        heard, _ = load_audio(file_of(np.stack(voice, 1), "WAV"))
        np.testing.assert_allclose(heard, one, atol=1e-4)
    heard, rate = load_audio(file_of(np.stack([one, other], 1), "WAV"))
    assert strength(heard, rate, 220.0) == pytest.approx(0.15, abs=0.01)
    assert strength(heard, rate, 700.0) == pytest.approx(0.15, abs=0.01)
    heard, rate = load_audio(file_of(np.stack([one, -one], 1), "WAV"))
    assert strength(heard, rate, 220.0) == pytest.approx(0.3, abs=0.01)


def test_mp3_files_that_were_joined() -> None:
    first, second = (encode(tone(hertz, rates.SPEAK_SAMPLE_RATE), "mp3") for hertz in (220.0, 700.0))
    heard, rate = load_audio(first + second)
    assert len(heard) / rate == pytest.approx(2 * SECONDS, abs=0.1)
    assert strength(heard[: len(heard) // 2], rate, 220.0) == pytest.approx(0.3, abs=0.02)
    assert strength(heard[len(heard) // 2 :], rate, 700.0) == pytest.approx(0.3, abs=0.02)


def recorded(container: str, codec: str, rate: int) -> bytes:
    av = pytest.importorskip("av", reason="PyAV is not installed (extra: media)")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        samples = (tone(rate=rate) * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("webm", "libopus", 48_000),
        ("matroska", "libopus", 48_000),
        ("ipod", "aac", 44_100),
        ("mp4", "aac", 48_000),
        ("adts", "aac", 44_100),
        ("amr", "libopencore_amrnb", 8_000),
    ],
)
def test_recordings_of_browsers_and_phones(container: str, codec: str, rate: int) -> None:
    heard, heard_rate = load_audio(recorded(container, codec, rate), 16_000)
    assert heard_rate == 16_000
    assert len(heard) / heard_rate == pytest.approx(SECONDS, abs=0.15)
    assert strength(heard, heard_rate, 220.0) == pytest.approx(0.3, abs=0.1)


def test_without_pyav_a_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="needs PyAV"):
        load_audio(b"\x1a\x45\xdf\xa3" + bytes(100))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "not a sound file"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a sound file"),
        (b"\x1a\x45\xdf\xa3 and no more", "not a sound file"),
    ],
)
def test_what_is_no_sound_gets_a_sentence(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_audio(data, name="file")


def test_a_file_that_is_too_long() -> None:
    with pytest.raises(AudioTooLong, match="file is longer than 2 s"):
        load_audio(file_of(tone(), "FLAC"), 16_000, 2.0, "file")


@pytest.fixture
def two_minutes() -> NDArray[np.float32]:
    return tone(rate=rates.SPEAK_SAMPLE_RATE, seconds=120.0)


@pytest.mark.parametrize("suffix", [".ogg", ".mp3", ".flac", ".wav"])
def test_minutes_are_written_in_every_format(suffix: str, two_minutes: NDArray[np.float32], tmp_path: Path) -> None:
    path = tmp_path / f"answer{suffix}"
    save_audio(path, two_minutes, rates.SPEAK_SAMPLE_RATE)
    heard, rate = load_audio(path)
    assert len(heard) / rate == pytest.approx(120.0, abs=0.1)
