"""Sound files, read and written block by block.

libsndfile reads WAV, FLAC, OGG and MP3. PyAV (extra `media`) reads what browsers and phones record: WebM, MP4, M4A, AAC
and AMR. The length in a header is never trusted.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from duologue.audio import StreamingResampler, check_wav

logger = logging.getLogger(__name__)

Samples = NDArray[np.float32]

MAX_FILE_S = 3600.0
MAX_CHANNELS = 8
STDIN = "-"
FORMATS = "WAV, FLAC, OGG and MP3"
MEDIA_FORMATS = "WebM, MP4, M4A, AAC and AMR"
_READ_FRAMES = 1024  # a damaged block is lost whole
_WRITE_FRAMES = 65_536  # libsndfile's Vorbis encoder crashes on minutes in one call
_SILENT = 1e-3  # peak of a channel that nothing was recorded on
_CHUNKS_AFTER_DATA = {b"LIST", b"id3 ", b"ID3 ", b"fact", b"cue ", b"smpl", b"inst", b"bext", b"PEAK", b"iXML", b"_PMX"}
# The header of an MPEG frame of layer III, its side information, and the tag that states the length of a file.
_MP3_TAG = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][^\xff].(?:.{9}|.{17}|.{32})(?:Xing|Info)", re.DOTALL)
# PyAV gets the format by the first bytes: a playlist must not make it open other files.
_MEDIA = ((0, b"\x1a\x45\xdf\xa3", "matroska"), (4, b"ftyp", "mov"), (0, b"#!AMR", "amr"), (0, b"\xff\xf1", "aac"))


class AudioTooLong(ValueError):
    """The file holds more sound than its reader accepts."""


def load_audio(
    source: str | Path | bytes, rate: int | None = None, max_s: float = MAX_FILE_S, name: str = ""
) -> tuple[Samples, int]:
    """Reads a sound file as mono; a channel that is silent is left out.

    A damaged or cut file gives what could be decoded, and a warning in the log.

    Args:
        source: a file, a pipe, "-" for standard input, or the bytes of a file.
        rate: sample rate of the result; by default that of the file.
        max_s: maximum length in seconds; bounds the memory.
        name: of the source in messages.

    Returns:
        wav (S,) float32 in [-1, 1] and its sample rate.

    Raises:
        AudioTooLong: the file is longer than `max_s`.
        ValueError: the file is missing, unreadable or holds no usable audio.
    """
    name = name or (
        "the audio" if isinstance(source, bytes) else "standard input" if str(source) == STDIN else str(source)
    )
    with closing(_open(source, name)) as stream:
        parts: list[Samples] = []
        loaded = rate
        for each in _files_in(stream):
            channels, loaded = _load(each, name, loaded, max_s - sum(map(len, parts)) / (loaded or 1), max_s)
            parts.append(mix_down(channels))
    assert loaded is not None
    return check_wav(np.concatenate(parts), loaded, name), loaded


def load_channels(
    source: str | Path | bytes, rate: int | None = None, max_s: float = MAX_FILE_S, name: str = ""
) -> tuple[list[Samples], int]:
    """Reads every channel of a sound file; a damaged or cut file is refused.

    Args:
        source, rate, max_s, name: as in `load_audio`.

    Returns:
        one wav (S,) float32 in [-1, 1] for each channel, and their sample rate.

    Raises:
        AudioTooLong: the file is longer than `max_s`.
        ValueError: as in `load_audio`, or the file cannot be decoded to its end.
    """
    name = name or ("the audio" if isinstance(source, bytes) else str(source))
    with closing(_open(source, name)) as stream:
        files = [_load(each, name, rate, max_s, max_s, whole=True) for each in _files_in(stream)]
    loaded = files[0][1]
    joined = zip(*(channels for channels, _ in files), strict=True)
    return [check_wav(np.concatenate(parts), loaded, name) for parts in joined], loaded


def save_audio(path: str | Path, wav: Samples, sample_rate: int) -> None:
    """Writes wav (S,) float32 as 16-bit audio; the suffix selects the format."""
    try:
        with soundfile.SoundFile(path, "w", sample_rate, 1) as file:
            write_blocks(file, wav)
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be written: {error}") from None


def wav_bytes(wav: Samples, sample_rate: int) -> bytes:
    """Returns wav (S,) float32 as the bytes of a 16-bit WAV file."""
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", sample_rate, 1, "PCM_16", format="WAV") as file:
        write_blocks(file, wav)
    return stream.getvalue()


def write_blocks(file: soundfile.SoundFile, wav: Samples) -> None:
    """Appends wav (S,) float32, clipped to [-1, 1], to an open file."""
    for start in range(0, len(wav), _WRITE_FRAMES):
        file.write(np.clip(wav[start : start + _WRITE_FRAMES], -1.0, 1.0))


def _open(source: str | Path | bytes, name: str) -> BinaryIO:
    """Returns a seekable file. Pipes are read into memory."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    if str(path) == STDIN:
        return io.BytesIO(sys.stdin.buffer.read())
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give one sound file ({FORMATS})")
    try:
        if stat.S_ISREG(path.stat().st_mode):
            # Opened by number, because soundfile asks for the sample rate of what is called .raw.
            return open(os.open(path, os.O_RDONLY), "rb")
        return io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None


def _files_in(stream: BinaryIO) -> list[BinaryIO]:
    """Repairs the length of a WAV file, and separates MP3 files that were joined: each has a tag with its length."""
    head = stream.read(12)
    stream.seek(0)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return [_with_data_size(stream)]
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        data = stream.read()
        stream.seek(0)
        cuts = {0}
        for tag in _MP3_TAG.finditer(data):
            flags, at = data[tag.end() + 3 : tag.end() + 4], tag.end() + 4
            length = data[at + 4 : at + 8] if flags and flags[0] & 1 else data[at : at + 4]
            end = tag.start() + int.from_bytes(length) if flags and flags[0] & 2 else 0
            cuts |= {tag.start()} if tag.start() > 4096 else set()
            # Behind the end may be a tag of 128 bytes, or nothing.
            cuts |= {end} if 4096 < end < len(data) - 1024 else set()
        edges = [*sorted(cuts), len(data)]
        if len(edges) > 2:
            return [io.BytesIO(data[start:end]) for start, end in pairwise(edges)]
    return [stream]


def _with_data_size(stream: BinaryIO) -> BinaryIO:
    """Returns a WAV file whose data chunk has the size 0, as an interrupted writer leaves it, with the true size."""
    at = 12
    while len(header := _read_at(stream, at, 8)) == 8:
        kind, size = header[:4], struct.unpack("<I", header[4:])[0]
        if kind == b"data":
            follows = _read_at(stream, at + 8, 4)
            stream.seek(0)
            if size or not follows or follows in _CHUNKS_AFTER_DATA:
                return stream
            data = bytearray(stream.read())
            data[at + 4 : at + 8] = struct.pack("<I", min(len(data) - at - 8, 0xFFFFFFFE))
            return io.BytesIO(bytes(data))
        at += 8 + size + size % 2
    stream.seek(0)
    return stream


def _read_at(stream: BinaryIO, at: int, count: int) -> bytes:
    stream.seek(at)
    return stream.read(count)


def _load(
    stream: BinaryIO, name: str, rate: int | None, left_s: float, max_s: float, whole: bool = False
) -> tuple[list[Samples], int]:
    """Reads the channels of one file, each (S,) float32 at `rate`, or at the rate of the file.

    `whole`: a damaged file raises ValueError.
    """
    channels: list[list[Samples]] = []
    resamplers: list[StreamingResampler] = []
    seconds, from_rate = 0.0, 0
    try:
        for from_rate, block in _blocks(stream, name):
            if not channels:
                num = block.shape[1]
                if num > MAX_CHANNELS or not 4000 <= from_rate <= 384_000:
                    raise ValueError(
                        f"{name} has {num} channels at {from_rate} Hz; up to {MAX_CHANNELS} channels at 4000 to "
                        "384000 Hz are accepted"
                    )
                channels = [[] for _ in range(num)]
                resamplers = [StreamingResampler(from_rate, rate or from_rate) for _ in range(num)]
            seconds += len(block) / from_rate
            if seconds > left_s:
                limit = f"{max_s:.0f} s" if max_s < 600 else f"{max_s / 60:.0f} minutes"
                raise AudioTooLong(f"{name} is longer than {limit}; cut it first")
            for parts, resampler, column in zip(channels, resamplers, block.T, strict=True):
                parts.append(resampler.step(np.ascontiguousarray(column)))
    except _Damaged as error:
        if not channels:
            raise ValueError(f"{name} is not a sound file that can be read ({error}); use {FORMATS}") from None
        if whole:
            raise ValueError(f"{name} is damaged: only its first {seconds:.1f} s can be read ({error})") from None
        logger.warning("%s is damaged: only its first %.1f s could be read (%s)", name, seconds, error)
    if not channels:
        raise ValueError(f"{name} is empty: it holds no samples")
    for parts, resampler in zip(channels, resamplers, strict=True):
        parts.append(resampler.step(np.zeros(0, np.float32), last=True))
    return [np.concatenate(parts) for parts in channels], rate or from_rate


def mix_down(channels: list[Samples]) -> Samples:
    """Returns the mean of the channels that are not silent, or the loudest one if they cancel each other."""
    if len(channels) == 1:
        return channels[0]
    used = [one for one in channels if np.abs(one).max(initial=0.0) > _SILENT] or channels[:1]
    mean: Samples = np.mean(used, axis=0, dtype=np.float32)
    loudest = max(used, key=_energy)
    return mean if _energy(mean) > 0.01 * _energy(loudest) else loudest


def _energy(wav: Samples) -> float:
    return float(np.dot(wav, wav))


class _Damaged(Exception):
    """The rest of a file cannot be decoded."""


class _SoundFile(soundfile.SoundFile):  # type: ignore[misc]
    """Reads forward only: after each block soundfile would seek to where the header says that the block ends."""

    def seekable(self) -> bool:
        return False


def _blocks(stream: BinaryIO, name: str) -> Iterator[tuple[int, Samples]]:
    """Yields the sample rate and blocks (S, C). Raises _Damaged where the file ends too early."""
    head = stream.read(16)
    stream.seek(0)
    if not head:
        raise ValueError(f"{name} is empty: it is not a sound file")
    kind = next((kind for at, magic, kind in _MEDIA if head[at : at + len(magic)] == magic), "")
    if kind:
        yield from _media_blocks(stream, kind, name)
        return
    try:
        file = _SoundFile(stream)
    except (soundfile.LibsndfileError, TypeError) as error:
        if name.lower().endswith((".raw", ".pcm")):
            raise ValueError(f"{name} has no header that states its sample rate; convert it to WAV first") from None
        raise _Damaged(getattr(error, "error_string", error)) from None
    with file:
        try:
            while len(block := file.read(_READ_FRAMES, dtype="float32", always_2d=True)):
                yield file.samplerate, block
        except (soundfile.LibsndfileError, MemoryError) as error:
            raise _Damaged(getattr(error, "error_string", "out of memory")) from None


def _media_blocks(stream: BinaryIO, kind: str, name: str) -> Iterator[tuple[int, Samples]]:
    """Yields the sample rate and blocks (S, C) of the first audio track, decoded by PyAV."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{name} needs PyAV (pip install av), as all {MEDIA_FORMATS}; or use {FORMATS}") from None
    try:
        with av.open(stream, "r", format=kind) as container:
            if not container.streams.audio:
                raise ValueError(f"{name} holds no sound")
            to_float = av.AudioResampler(format="fltp")
            for frame in container.decode(container.streams.audio[0]):
                for part in to_float.resample(frame):
                    yield part.sample_rate, part.to_ndarray().T.astype(np.float32)
    except av.FFmpegError as error:
        raise _Damaged(error.strerror) from None
