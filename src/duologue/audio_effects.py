"""What lies between a voice and the recognizer besides a room and noise: music, microphones, telephones and codecs.

Every function is pure: the same arguments and the same state of `rng` give the same samples. Shapes: S samples, in
[-1, 1] as far as the input is.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

Wav = NDArray[np.float32]

TELEPHONE_RATE = 8000
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
_SCALE = np.array([0, 2, 4, 5, 7, 9, 11])  # semitones of the major scale
_MU = 255.0


def music(num_samples: int, sample_rate: int, rng: np.random.Generator) -> Wav:
    """(S,) of chords, a melody and a drum in one key and tempo, RMS about 0.1."""
    beat = int(60.0 / rng.uniform(70.0, 150.0) * sample_rate)
    key = 110.0 * 2 ** (rng.integers(12) / 12)
    brightness = rng.uniform(0.4, 1.0)
    drum = rng.random() < 0.6
    mixed = np.zeros(num_samples + 2 * beat, np.float32)
    for start in range(0, num_samples, beat):
        notes = [float(rng.choice(_SCALE)) + 12.0 * float(rng.integers(1, 3))]
        if start // beat % 2 == 0:
            root = int(rng.integers(len(_SCALE)))
            notes += [float(_SCALE[(root + step) % len(_SCALE)]) for step in (0, 2, 4)]
        for note in notes:
            mixed[start : start + 2 * beat] += _note(key * 2 ** (note / 12), 2 * beat, sample_rate, brightness)
        if drum:
            length = min(beat, sample_rate // 12)
            decay = np.exp(-np.arange(length) / (0.02 * sample_rate))
            mixed[start : start + length] += (0.5 * rng.standard_normal(length) * decay).astype(np.float32)
    mixed = mixed[:num_samples]
    return _wav(mixed * (0.1 / (np.sqrt(np.mean(mixed**2)) + 1e-9)))


def _note(f0: float, num_samples: int, sample_rate: int, brightness: float) -> Wav:
    """One plucked note: four harmonics, by recurrence from the first, under a decay."""
    time = np.arange(num_samples, dtype=np.float32) / sample_rate
    first = np.exp(1j * (2 * np.pi * f0) * time).astype(np.complex64)
    harmonic, wave = first, first.imag.copy()
    for number in range(2, 5):
        if f0 * number >= sample_rate / 2:
            break
        harmonic = harmonic * first
        wave += harmonic.imag * np.float32(brightness ** (number - 1) / number)
    envelope = np.minimum(time / 0.01, 1.0) * np.exp(-time / 0.35)
    return _wav(wave * envelope)


def equalize(wav: Wav, sample_rate: int, range_db: float, rng: np.random.Generator) -> Wav:
    """(S,) -> (S,) through a random smooth frequency response within plus and minus `range_db`."""
    size = _fft_size(len(wav))
    hertz = np.fft.rfftfreq(size, 1.0 / sample_rate)
    octaves = np.log2(np.maximum(hertz, 50.0) / 50.0)
    knots = np.linspace(0.0, float(octaves[-1]), 6)
    gain_db = np.interp(octaves, knots, rng.uniform(-range_db, range_db, 6))
    spectrum = np.fft.rfft(wav, size) * 10 ** (gain_db / 20)
    return np.fft.irfft(spectrum, size)[: len(wav)].astype(np.float32)


def clip_peaks(wav: Wav, share: float) -> Wav:
    """(S,) -> (S,) cut at `share` of the highest peak, as an input does that is driven too hard."""
    peak = float(np.max(np.abs(wav), initial=0.0)) * share
    return np.clip(wav, -peak, peak).astype(np.float32)


def telephone(wav: Wav, sample_rate: int, low_hz: float, high_hz: float) -> Wav:
    """(S,) -> (S,) through the band of a telephone and 8-bit mu-law (ITU-T G.711) at 8 kHz."""
    narrow = soxr.resample(wav, sample_rate, TELEPHONE_RATE)
    size = _fft_size(len(narrow))
    hertz = np.fft.rfftfreq(size, 1.0 / TELEPHONE_RATE)
    band = np.clip((hertz - 0.7 * low_hz) / (0.3 * low_hz), 0.0, 1.0) * np.clip(
        (1.1 * high_hz - hertz) / (0.1 * high_hz), 0.0, 1.0
    )
    narrow = np.fft.irfft(np.fft.rfft(narrow, size) * band, size)[: len(narrow)]
    wide = soxr.resample(mu_law(narrow.astype(np.float32)), TELEPHONE_RATE, sample_rate)
    return _fitted(wide, len(wav))


def mu_law(wav: Wav) -> Wav:
    """(S,) -> (S,) coded in 8 bits of mu-law and decoded."""
    compressed = np.sign(wav) * np.log1p(_MU * np.minimum(np.abs(wav), 1.0)) / np.log1p(_MU)
    levels = np.round(compressed * 127.0) / 127.0
    return _wav(np.sign(levels) * np.expm1(np.abs(levels) * np.log1p(_MU)) / _MU)


def opus(wav: Wav, sample_rate: int, compression: float) -> Wav:
    """(S,) -> (S,) coded in Opus and decoded; `compression` 0.9 is 30, 0.95 is 17 and 0.99 is 8 kbit/s.

    It costs 5 % of real time on one core, twenty times as much as any other part.

    Raises `ValueError` when the rate is none of Opus or libsndfile comes without Opus.
    """
    if sample_rate not in OPUS_RATES:
        raise ValueError(f"Opus has no rate of {sample_rate} Hz; it has {', '.join(map(str, OPUS_RATES))}")
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        raise ValueError("libsndfile comes without Opus; set opus_probability to 0 or install soundfile from its wheel")
    coded = io.BytesIO()
    soundfile.write(coded, wav, sample_rate, format="OGG", subtype="OPUS", compression_level=compression)
    coded.seek(0)
    decoded, _ = soundfile.read(coded, dtype="float32")
    return _fitted(decoded, len(wav))


def _wav(samples: NDArray[np.floating[Any]]) -> Wav:
    return samples.astype(np.float32)


def _fitted(wav: Wav, num_samples: int) -> Wav:
    """Cut or padded by the sample or two that resampling and coding change."""
    return np.pad(wav[:num_samples], (0, max(0, num_samples - len(wav)))).astype(np.float32)


def _fft_size(count: int) -> int:
    """The smallest size of the forms 2^n and 3 x 2^n that holds `count` samples: other sizes may be slow."""
    size = 1 << max(count - 1, 1).bit_length()
    return size * 3 // 4 if size * 3 // 4 >= count else size
