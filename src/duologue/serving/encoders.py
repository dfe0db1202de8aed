"""Streaming encoders for audio files: wav, pcm, flac, mp3, opus and aac, mono at 24 kHz.

libsndfile writes flac, mp3 and opus; PyAV writes aac, as ADTS frames.

The length of a streamed file is unknown at its start. A streamed WAV header holds 0xFFFFFFFF in its size fields; the
other formats need no length.
"""

from __future__ import annotations

import io
import struct
from typing import Any, Literal, TypeAlias, get_args

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import StreamingResampler
from duologue.pcm import to_int16
from duologue.serving.tempo import Tempo
from duologue.sound_files import write_blocks

FileFormat: TypeAlias = Literal["wav", "pcm", "flac", "mp3", "opus", "aac"]
FILE_FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
SAMPLE_RATE = 24_000  # for every format, as in OpenAI's API
MEDIA_TYPES: dict[FileFormat, str] = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
}
_LIBSNDFILE: dict[FileFormat, tuple[str, str]] = {
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}
_UNKNOWN = 0xFFFFFFFF
_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


class FileEncoder:
    """An encoder of one file, fed with the decoder's audio. Call it in a thread.

    Args:
        file_format: container and codec.
        speed: playback speed, see `Tempo`.
    """

    def __init__(self, file_format: FileFormat, speed: float = 1.0) -> None:
        self.num_samples = 0  # written so far
        self._format = file_format
        self._tempo = Tempo(speed, rates.SPEAK_SAMPLE_RATE)
        self._resampler = StreamingResampler(rates.SPEAK_SAMPLE_RATE, SAMPLE_RATE)
        self._growing = _GrowingFile()
        self._file: Any = None
        if file_format in _LIBSNDFILE:
            container, subtype = _LIBSNDFILE[file_format]
            # MP3 at a constant 80 kbit/s, so that players can estimate the duration of a partial file.
            mode, level = ("CONSTANT", 0.5) if file_format == "mp3" else (None, None)
            self._file = soundfile.SoundFile(
                self._growing, "w", SAMPLE_RATE, 1, subtype, None, container, True, level, mode
            )
        elif file_format == "aac":
            self._file = _AacFile(self._growing)
        elif file_format == "wav":
            self._growing.write(_wav_header(_UNKNOWN))

    def step(self, wav: NDArray[np.float32], last: bool = False) -> bytes:
        """Encodes wav (S,) at the decoder's rate; returns the bytes that are ready, possibly none. `last` flushes the
        rest."""
        wav = self._resampler.step(self._tempo.step(wav, last), last)
        self.num_samples += len(wav)
        if self._file is None:
            self._growing.write(to_int16(wav).tobytes())
        elif isinstance(self._file, _AacFile):
            self._file.write(wav)
        elif len(wav):
            write_blocks(self._file, wav)
        if last and self._file is not None:
            self._file.close()
        if self._format == "mp3" and not self._growing.taken:
            self._growing.taken = _tag_length(self._growing.getvalue())
        return self._growing.take()

    def finished_file(self) -> bytes:
        """Returns the complete file. Its header holds the length where the format stores one."""
        data = self._growing.getvalue()
        return data if self._format != "wav" else _wav_header(2 * self.num_samples) + data[44:]


def encode(wav: NDArray[np.float32], file_format: FileFormat, speed: float = 1.0) -> bytes:
    """Returns a complete file of wav (S,) at the decoder's rate."""
    encoder = FileEncoder(file_format, speed)
    encoder.step(wav, last=True)
    return encoder.finished_file()


def _wav_header(num_bytes: int) -> bytes:
    riff = _UNKNOWN if num_bytes == _UNKNOWN else 36 + num_bytes
    head = struct.pack(
        "<4sI4s4sIHHIIHH", b"RIFF", riff, b"WAVE", b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16
    )
    return head + struct.pack("<4sI", b"data", num_bytes)


def _tag_length(data: bytes) -> int:
    """Returns the length in bytes of an MP3's Xing or Info frame, or 0 without one.

    A streamed file drops this frame, because it states the length of an unfinished file. See ISO 11172-3 and 13818-3,
    layer III.
    """
    if len(data) < 4 or not any(name in data[:64] for name in (b"Xing", b"Info")):
        return 0
    version, bitrate, rate, padding = data[1] >> 3 & 3, data[2] >> 4, data[2] >> 2 & 3, data[2] >> 1 & 1
    kbps = (_KBPS_1 if version == 3 else _KBPS_2)[bitrate]
    sample_rate = (44_100, 48_000, 32_000)[rate] // (1 if version == 3 else 2)
    return (144_000 if version == 3 else 72_000) * kbps // sample_rate + padding


class _AacFile:
    """AAC at 64 kbit/s in ADTS frames, which need no header and no length."""

    def __init__(self, file: io.BytesIO) -> None:
        self._container = av.open(file, "w", format="adts", options={"flush_packets": "1"}, buffer_size=1024)
        self._stream = self._container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        self._stream.bit_rate = 64_000
        self._num_samples = 0

    def write(self, wav: NDArray[np.float32]) -> None:
        if not len(wav):
            return
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wav)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, self._num_samples
        self._num_samples += len(wav)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()


class _GrowingFile(io.BytesIO):
    """A file in memory that is read while it is written."""

    taken = 0

    def take(self) -> bytes:
        data = self.getbuffer()[self.taken :].tobytes()
        self.taken += len(data)
        return data
