"""Audio on the wire: base64 of pcm16 at 24 kHz or of G.711 at 8 kHz.

    base64 -> samples at the wire's rate -> 16 kHz wav for the tokenizer      (WireDecoder)
    wav of the decoder -> speed -> the wire's rate -> samples -> base64       (WireEncoder)

Waveforms are float32 (S,) in [-1, 1]. These functions belong in a thread, not on the event loop.
"""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
import soundfile
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import StreamingResampler
from duologue.pcm import from_int16, to_int16
from duologue.serving.objects import Format, Pcm, ProtocolError
from duologue.serving.tempo import Tempo

Wav = NDArray[np.float32]
PIECE_S = 0.5
_SUBTYPES = {"audio/pcmu": "ULAW", "audio/pcma": "ALAW"}
_EMPTY = np.zeros(0, np.float32)


def unpack(audio: str, wire: Format, param: str = "audio") -> Wav:
    """Decodes base64 text to samples (S,) at the format's rate.

    Raises:
        ProtocolError: the text is not base64, or ends within a sample.
    """
    try:
        data = base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError):
        raise ProtocolError(f"{param} is not base64", "invalid_audio", param) from None
    if not isinstance(wire, Pcm):
        return _g711(data, wire)
    if len(data) % 2:
        raise ProtocolError(f"{param} must hold whole 16-bit samples, got {len(data)} bytes", "invalid_audio", param)
    return from_int16(np.frombuffer(data, "<i2"))


def pack(wav: Wav, wire: Format) -> bytes:
    """Encodes samples (S,) at the format's rate as bytes."""
    if isinstance(wire, Pcm):
        return to_int16(wav).tobytes()
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wav, -1.0, 1.0), wire.rate, format="RAW", subtype=_SUBTYPES[wire.type])
    return buffer.getvalue()


def _g711(data: bytes, wire: Format) -> Wav:
    if not data:
        return _EMPTY
    wav, _ = soundfile.read(
        io.BytesIO(data), dtype="float32", format="RAW", subtype=_SUBTYPES[wire.type], channels=1, samplerate=wire.rate
    )
    return np.asarray(wav, np.float32)


class WireDecoder:
    """A decoder of the client's audio stream, resampled to 16 kHz. Buffers up to 40 ms until `end`."""

    def __init__(self, wire: Format) -> None:
        self.wire = wire
        self._resampler = StreamingResampler(wire.rate, rates.LISTEN_SAMPLE_RATE)
        self._num_in = self._num_out = 0

    def step(self, audio: str) -> Wav:
        """Decodes base64 text; returns the 16 kHz samples that are ready. A ProtocolError (see `unpack`) leaves the
        state unchanged."""
        wav = unpack(audio, self.wire)
        ready = self._resampler.step(wav) if len(wav) else _EMPTY
        self._num_in += len(wav)
        self._num_out += len(ready)
        return ready

    @property
    def num_buffered(self) -> int:
        """Number of samples that `end` would return."""
        return round(self._num_in * rates.LISTEN_SAMPLE_RATE / self.wire.rate) - self._num_out

    def end(self) -> Wav:
        """Returns the buffered rest and resets the resampler."""
        wav = self._resampler.step(_EMPTY, last=True)
        self._resampler = StreamingResampler(self.wire.rate, rates.LISTEN_SAMPLE_RATE)
        self._num_in = self._num_out = 0
        return wav


class WireEncoder:
    """An encoder of one reply's audio for the client."""

    def __init__(self, wire: Format, speed: float = 1.0) -> None:
        self.wire = wire
        self._tempo = None if speed == 1.0 else Tempo(speed, rates.SPEAK_SAMPLE_RATE)
        self._resampler = StreamingResampler(rates.SPEAK_SAMPLE_RATE, wire.rate)

    def step(self, wav: Wav, last: bool = False) -> list[tuple[str, float]]:
        """Encodes wav (S,) of the decoder; returns pairs of base64 text and milliseconds, at most 0.5 s each."""
        if self._tempo is not None:
            wav = self._tempo.step(wav, last)
        wav = self._resampler.step(wav, last)
        size = int(PIECE_S * self.wire.rate)
        pieces = [wav[start : start + size] for start in range(0, len(wav), size)]
        return [(_to_base64(pack(piece, self.wire)), 1000 * len(piece) / self.wire.rate) for piece in pieces]


def encode_wav(wav: Wav, sample_rate: int, wire: Format) -> str:
    """Encodes a complete waveform (S,) as base64 text."""
    resampled = StreamingResampler(sample_rate, wire.rate).step(wav, last=True)
    return _to_base64(pack(resampled, wire))


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
