"""Augmentation: what a room, a microphone and a line do to a clean voice, drawn at random. Shapes: S samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from duologue.audio_effects import Wav, clip_peaks, equalize, music, opus, telephone


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to a clip before it is heard; a probability of 0 leaves a part out.

    Attributes:
        gain_db: range of the level, relative to the clip.
        snr_db: range of the noise's level under the voice; noise is white, colored, or another clip.
        speed: range of the playing speed, which moves pitch and formants too.
        edge_s: up to this much room tone before and after the voice.
        room_decay_s, room_db: range of the time in which a room dies down by 60 dB, and of how far its tail lies below
            the voice.
        music_db: range of the level of music under the voice.
        equalizer_db: the frequency response of a microphone stays within plus and minus this.
        peak_share: range of the share of the highest peak at which the wave is cut.
        telephone_low_hz, telephone_high_hz: ranges of the edges of a telephone's band; mu-law at 8 kHz goes with it.
        opus_compression: range of libsndfile's compression level; 0.9 is 30 kbit/s, 0.98 is 10 kbit/s.
    """

    gain_db: tuple[float, float] = (-14.0, 8.0)
    noise_probability: float = 0.5
    snr_db: tuple[float, float] = (8.0, 40.0)
    room_probability: float = 0.3
    speed_probability: float = 0.5
    speed: tuple[float, float] = (0.92, 1.08)
    edge_s: float = 0.4
    room_decay_s: tuple[float, float] = (0.05, 0.35)
    room_db: tuple[float, float] = (3.0, 15.0)
    music_probability: float = 0.0
    music_db: tuple[float, float] = (8.0, 30.0)
    equalizer_probability: float = 0.0
    equalizer_db: float = 8.0
    clipping_probability: float = 0.0
    peak_share: tuple[float, float] = (0.2, 0.7)
    telephone_probability: float = 0.0
    telephone_low_hz: tuple[float, float] = (150.0, 350.0)
    telephone_high_hz: tuple[float, float] = (3000.0, 3700.0)
    opus_probability: float = 0.0
    opus_compression: tuple[float, float] = (0.88, 0.98)


def augment(
    wav: Wav, sample_rate: int, config: AugmentConfig, rng: np.random.Generator, babble: Callable[[], Wav]
) -> Wav:
    """One clip (S,) in a room, with noise, through a channel, at another level and speed: (S',).

    A pure function of its arguments and the state of `rng`; a probability of 0 takes nothing from `rng`.
    """
    return corrupt(place(wav, sample_rate, config, rng), sample_rate, config, rng, babble)


def place(wav: Wav, sample_rate: int, config: AugmentConfig, rng: np.random.Generator) -> Wav:
    """The half of `augment` that moves sound in time: another speed, silence at both ends: (S,) -> (S',)."""
    if rng.random() < config.speed_probability:
        speed = rng.uniform(*config.speed)
        wav = np.interp(np.arange(0, len(wav) - 1, speed), np.arange(len(wav)), wav).astype(np.float32)
    edges = (rng.uniform(0, config.edge_s, 2) * sample_rate).astype(int)
    return np.pad(wav, (int(edges[0]), int(edges[1])))


def corrupt(
    wav: Wav, sample_rate: int, config: AugmentConfig, rng: np.random.Generator, babble: Callable[[], Wav]
) -> Wav:
    """The half of `augment` that keeps time: a room, noise, a channel, another level: (S,) -> (S,), aligned."""
    if rng.random() < config.room_probability:
        wav = _in_room(wav, sample_rate, config, rng)
    level = float(np.sqrt(np.mean(wav**2))) + 1e-6
    if rng.random() < config.noise_probability:
        wav = _under(wav, _noise(len(wav), rng, babble), level, config.snr_db, rng)
    if _happens(config.music_probability, rng):
        wav = _under(wav, music(len(wav), sample_rate, rng), level, config.music_db, rng)
    wav = _through_channel(wav, sample_rate, config, rng)
    wav = wav * 10 ** (rng.uniform(*config.gain_db) / 20)
    return np.clip(wav, -1.0, 1.0).astype(np.float32)


def _happens(probability: float, rng: np.random.Generator) -> bool:
    return probability > 0 and rng.random() < probability


def _under(wav: Wav, other: Wav, level: float, below_db: tuple[float, float], rng: np.random.Generator) -> Wav:
    """The voice (S,) of RMS `level` with another sound (S,) this far below it."""
    other_level = float(np.sqrt(np.mean(other**2))) + 1e-6
    return wav + other * (level / other_level * 10 ** (-rng.uniform(*below_db) / 20))


def _through_channel(wav: Wav, sample_rate: int, config: AugmentConfig, rng: np.random.Generator) -> Wav:
    """The microphone, the input stage and the line, in their order."""
    if _happens(config.equalizer_probability, rng):
        wav = equalize(wav, sample_rate, config.equalizer_db, rng)
    if _happens(config.clipping_probability, rng):
        wav = clip_peaks(wav, float(rng.uniform(*config.peak_share)))
    if _happens(config.telephone_probability, rng):
        low, high = rng.uniform(*config.telephone_low_hz), rng.uniform(*config.telephone_high_hz)
        wav = telephone(np.clip(wav, -1.0, 1.0), sample_rate, float(low), float(high))
    if _happens(config.opus_probability, rng):
        wav = opus(np.clip(wav, -1.0, 1.0), sample_rate, float(rng.uniform(*config.opus_compression)))
    return wav


def _in_room(wav: Wav, sample_rate: int, config: AugmentConfig, rng: np.random.Generator) -> Wav:
    """Convolves with a decaying tail of noise behind the direct sound."""
    decay_s = rng.uniform(*config.room_decay_s)
    time = np.arange(int(decay_s * sample_rate)) / sample_rate
    tail = rng.standard_normal(len(time)) * np.exp(-6.9 * time / decay_s)
    tail *= 10 ** (-rng.uniform(*config.room_db) / 20) / (np.sqrt(np.sum(tail**2)) + 1e-9)
    tail[0] = 1.0
    size = 1 << (len(wav) + len(tail)).bit_length()
    wet = np.fft.irfft(np.fft.rfft(wav, size) * np.fft.rfft(tail, size), size)
    return wet[: len(wav)].astype(np.float32)


def _noise(num_samples: int, rng: np.random.Generator, babble: Callable[[], Wav]) -> Wav:
    """White, colored (falling by 3 to 6 dB an octave) or other voices."""
    kind = rng.integers(3)
    if kind == 2:
        return np.resize(babble() + np.float32(1e-4), num_samples)
    white = rng.standard_normal(num_samples).astype(np.float32)
    if kind == 0:
        return white
    spectrum = np.fft.rfft(white)
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -rng.uniform(0.5, 1.0)
    return np.fft.irfft(spectrum, num_samples).astype(np.float32)
