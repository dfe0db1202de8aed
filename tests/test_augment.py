"""Augmentation of clips: what each part does to a sound, and that the defaults leave the old stream as it was."""

from dataclasses import asdict, fields

import numpy as np
import pytest
import soundfile

from duologue.audio_effects import Wav, clip_peaks, equalize, mu_law, music, opus, telephone
from duologue.augmentation import AugmentConfig, augment

RATE = 16000
QUIET = AugmentConfig(
    gain_db=(0.0, 0.0), noise_probability=0.0, room_probability=0.0, speed_probability=0.0, edge_s=0.0
)
HAS_OPUS = "OPUS" in soundfile.available_subtypes("OGG")


def chirp(seconds: float = 1.0) -> Wav:
    """A tone that rises through the whole band."""
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * (100 + 3500 * time / seconds) * time)).astype(np.float32)


def power(wav: Wav, low: float, high: float) -> float:
    spectrum = np.abs(np.fft.rfft(wav)) ** 2
    hertz = np.fft.rfftfreq(len(wav), 1 / RATE)
    return float(spectrum[(hertz >= low) & (hertz < high)].sum())


def babble() -> Wav:
    return chirp()[::-1].copy()


BEFORE = [5764.6719, 5880.4614, 1250.4176, 2695.8994]


def test_the_defaults_are_what_they_were() -> None:
    """Sums of clips under the default configuration, taken before there were channels."""
    rng = np.random.default_rng(7)
    sums = [float(np.abs(augment(chirp(), RATE, AugmentConfig(), rng, babble)).sum()) for _ in range(4)]
    np.testing.assert_allclose(sums, BEFORE, rtol=1e-4)


def test_without_any_part_a_clip_stays() -> None:
    np.testing.assert_allclose(augment(chirp(), RATE, QUIET, np.random.default_rng(0), babble), chirp(), atol=1e-6)


def parts() -> list[str]:
    names = [field.name for field in fields(AugmentConfig) if field.name.endswith("_probability")]
    return [name for name in names if HAS_OPUS or name != "opus_probability"]


@pytest.mark.parametrize("name", parts())
def test_every_part_changes_a_clip_and_repeats(name: str) -> None:
    config = AugmentConfig(**{**asdict(QUIET), name: 1.0})
    first, second = (augment(chirp(), RATE, config, np.random.default_rng(5), babble) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.float32
    assert np.abs(first).max() <= 1.0
    assert len(first) != len(chirp()) or np.abs(first - chirp()).max() > 1e-3


def test_a_telephone_leaves_its_band() -> None:
    heard = telephone(chirp(), RATE, 300.0, 3400.0)
    assert len(heard) == len(chirp())
    assert power(heard, 500, 3000) > 0.7 * power(chirp(), 500, 3000)
    assert power(heard, 4200, 8000) < 0.01 * power(chirp(), 4200, 8000)
    assert power(heard, 0, 200) < 0.05 * power(chirp(), 0, 200)


def test_mu_law_is_close_and_keeps_zero() -> None:
    wave = chirp()
    error = mu_law(wave) - wave
    assert 10 * np.log10(np.mean(wave**2) / np.mean(error**2)) > 33
    assert mu_law(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


def test_clipping_cuts_at_its_share() -> None:
    assert np.abs(clip_peaks(chirp(), 0.5)).max() == pytest.approx(0.5 * np.abs(chirp()).max())
    assert clip_peaks(np.zeros(0, np.float32), 0.5).size == 0


def test_an_equalizer_stays_in_its_range() -> None:
    rng = np.random.default_rng(2)
    noise = rng.standard_normal(RATE).astype(np.float32)
    heard = equalize(noise, RATE, 6.0, rng)
    ratios = [power(heard, low, low + 300) / power(noise, low, low + 300) for low in range(100, 7600, 300)]
    decibels = 10 * np.log10(ratios)
    assert np.abs(decibels).max() < 6.5
    assert np.ptp(decibels) > 1.0


def test_music_is_tonal_and_level() -> None:
    sound = music(3 * RATE, RATE, np.random.default_rng(4))
    assert sound.shape == (3 * RATE,)
    assert np.sqrt(np.mean(sound**2)) == pytest.approx(0.1, rel=0.01)
    spectrum = np.sort(np.abs(np.fft.rfft(sound)) ** 2)[::-1]
    assert spectrum[: len(spectrum) // 50].sum() > 0.5 * spectrum.sum()


@pytest.mark.skipif(not HAS_OPUS, reason="libsndfile comes without Opus")
def test_opus_keeps_place_and_length() -> None:
    wave = chirp()
    coded = opus(wave, RATE, 0.9)
    assert coded.shape == wave.shape
    middle = slice(2000, 14000)
    assert np.corrcoef(coded[middle], wave[middle])[0, 1] > 0.7


def test_opus_names_its_rates() -> None:
    with pytest.raises(ValueError, match="no rate of 22050 Hz"):
        opus(chirp(), 22050, 0.9)
