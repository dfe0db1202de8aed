"""How speech is said: pace, pitch and level, whether a style moved them, and what the tokens keep of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import pitch, resample
from duologue.scoring import normalize

PLAIN = "plain"  # no style was asked for
_FRAME_S = 0.02
_SILENCE_DB = -40.0  # frames this far under the loudest are no speech
# style -> (what it is measured by, sign of the change, smallest change that counts)
STYLES = {
    "faster": ("word_s", -1, math.log(1.05)),
    "slower": ("word_s", 1, math.log(1.05)),
    "higher": ("f0", 1, math.log(1.03)),
    "lower": ("f0", -1, math.log(1.03)),
    "louder": ("level_db", 1, 1.0),
    "softer": ("level_db", -1, 1.0),
}


@dataclass(frozen=True)
class Prosody:
    """Speed, pitch and level of an utterance.

    Attributes:
        word_s: seconds of speech per word, without silence at both ends.
        f0: median fundamental frequency in Hz of the voiced frames; NaN where there are none.
        level_db: RMS of the frames with speech, dB under full scale; NaN in silence.
    """

    word_s: float
    f0: float
    level_db: float


def measure_prosody(wav: NDArray[np.float32], sample_rate: int, text: str) -> Prosody:
    """Of one reply: wav (S,) float32 in [-1, 1] and what it says."""
    hop = int(_FRAME_S * sample_rate)
    frames = wav[: len(wav) // hop * hop].reshape(-1, hop)
    power = np.square(frames.astype(np.float64)).mean(1)
    num_words = len(normalize(text).split())
    if not power.size or power.max() < 1e-9:
        return Prosody(math.nan, math.nan, math.nan)
    speech = np.flatnonzero(power > power.max() * 10 ** (_SILENCE_DB / 10))
    seconds = (speech[-1] - speech[0] + 1) * _FRAME_S
    f0 = pitch(torch.from_numpy(resample(wav, sample_rate, 16_000))[None], 16_000, 160)[0].numpy()
    voiced = f0[f0 > 0]
    return Prosody(
        word_s=seconds / num_words if num_words else math.nan,
        f0=float(np.median(voiced)) if voiced.size else math.nan,
        level_db=float(10 * np.log10(power[speech].mean())),
    )


def style_name(style: str) -> str:
    """ "faster2", a second step of it, is the style "faster"."""
    return style.rstrip("0123456789")


def style_change(style: str, styled: Prosody, plain: Prosody) -> float:
    """How far the measure of a style moved: log ratio of pace or pitch, dB of level. NaN where it was not measurable.

    Raises:
        ValueError: the style is none of `STYLES`;
    """
    name = style_name(style)
    if name not in STYLES:
        raise ValueError(f"{style!r} is no style that is measured; the choices are {', '.join(STYLES)}")
    measure = STYLES[name][0]
    new, old = getattr(styled, measure), getattr(plain, measure)
    if measure == "level_db":
        return float(new - old)
    return math.log(new / old) if new > 0 and old > 0 else math.nan


def style_moved(style: str, change: float) -> bool:
    """Whether a change goes the asked way by at least what can be noticed."""
    _, sign, smallest = STYLES[style_name(style)]
    return sign * change >= smallest


def token_prosody(wav: NDArray[np.float32]) -> NDArray[np.float64]:
    """16 kHz wav (S,) -> per speech token (T, 2): level in dB, and log2 of F0 over 100 Hz, NaN where unvoiced."""
    size = rates.SAMPLES_PER_TOKEN
    padded = torch.from_numpy(np.pad(wav, (0, -len(wav) % size)))[None]
    level = 10 * padded.unflatten(1, (-1, size)).square().mean(-1).clamp(min=1e-7).log10()[0]
    f0 = pitch(padded, rates.LISTEN_SAMPLE_RATE, size)[0]
    return np.stack([level.numpy(), torch.where(f0 > 0, (f0 / 100).log2(), torch.nan).numpy()], 1).astype(np.float64)


def probe(
    codes: Sequence[NDArray[np.int64]],
    targets: Sequence[NDArray[np.float64]],
    codebook: NDArray[np.float32],
    ridge: float = 1.0,
) -> float:
    """How well a number per token can be read from the tokens: R2 of a linear probe on clips that it was not fitted on.

    The probe sees the codebook vectors of the token and of its two neighbors, and is fitted on every clip with an even
    index, judged on the others. 1 is perfect, 0 no better than the mean.

    Args:
        codes: (T_i,) of each clip.
        targets: (T_i,) of each clip; tokens with NaN are left out.
        codebook: (codebook_size, D).

    Raises:
        ValueError: fewer than two clips, or no measured token on one of the sides.
    """
    if len(codes) < 2:
        raise ValueError(f"a probe needs at least 2 clips, got {len(codes)}")
    sides = []
    for first in (0, 1):
        x = np.concatenate([_neighborhood(codebook[clip]) for clip in codes[first::2]])
        y = np.concatenate(targets[first::2])
        sides.append((x[~np.isnan(y)], y[~np.isnan(y)]))
    (x, y), (x_test, y_test) = sides
    if not len(y) or not len(y_test):
        raise ValueError("a probe needs measured tokens on both sides, got none on one")
    x_mean, x_std, y_mean = x.mean(0), x.std(0) + 1e-6, y.mean()
    z = (x - x_mean) / x_std
    weights = np.linalg.solve(z.T @ z + ridge * np.eye(z.shape[1]), z.T @ (y - y_mean))
    error = y_test - (((x_test - x_mean) / x_std) @ weights + y_mean)
    return float(1 - np.square(error).sum() / np.square(y_test - y_test.mean()).sum())


def _neighborhood(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """(T, D) -> (T, 3 D): the vector before, the own one, the one after."""
    padded = np.pad(vectors.astype(np.float64), ((1, 1), (0, 0)))
    return np.concatenate([padded[:-2], padded[1:-1], padded[2:]], 1)
