"""How well speech can be understood and how good it sounds: word error rates, DNSMOS, use of the codebook.

Where an optional library is missing, `Unavailable` says so, and a measure that needs it is reported as skipped with
that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from duologue.audio import resample
from duologue.evaluation.intervals import bootstrap
from duologue.evaluation.report import Row
from duologue.scoring import word_errors

_MOS_SAMPLES = int(9.01 * 16_000)

_Tool = TypeVar("_Tool")


class Unavailable(Exception):
    """A measure cannot be computed on this machine; the text says why and what mends it."""


@dataclass
class ErrorRate:
    """Word error rate, summed over texts: (substitutions + deletions + insertions) / reference words."""

    num_edits: int = 0
    num_words: int = 0
    num_texts: int = 0

    def add(self, reference: str, hypothesis: str) -> None:
        edits, words = word_errors(reference, hypothesis)
        self.num_edits += edits
        self.num_words += words
        self.num_texts += 1

    @property
    def value(self) -> float | None:
        """None where there was no word to recognize."""
        return self.num_edits / self.num_words if self.num_words else None


def error_rate(pairs: Iterable[tuple[str, str]]) -> ErrorRate:
    """Of (reference, hypothesis) texts, both normalized here."""
    rate = ErrorRate()
    for reference, hypothesis in pairs:
        rate.add(reference, hypothesis)
    return rate


def error_row(
    group: str,
    name: str,
    pairs: Sequence[tuple[str, str]],
    aim: float | None = None,
    dialogues: Sequence[str] | None = None,
) -> Row:
    """The word error rate of (reference, hypothesis) texts as a row, with its interval.

    Args:
        dialogues: which dialogue each pair comes from; pairs of one dialogue are drawn together. None: each is its own.
    """
    rate = error_rate(pairs)
    if rate.value is None:
        return Row(group, name, None, "%", aim, skipped="the test set has no such clips")
    edits, words = zip(*(word_errors(*pair) for pair in pairs), strict=True)
    interval = bootstrap(edits, words, dialogues or [str(index) for index in range(len(pairs))])
    note = f"{rate.num_words} words"
    return Row(group, name, rate.value, "%", aim, num=rate.num_texts, note=note, interval=interval)


def quality_row(group: str, name: str, values: Sequence[float], aim: float | None = None) -> Row:
    """The mean of DNSMOS values, one of each clip, as a row."""
    if not values:
        return Row(group, name, None, "MOS", aim, "at least", skipped="there is no sound to judge")
    interval = bootstrap(values, [1.0] * len(values), [str(index) for index in range(len(values))])
    return Row(group, name, float(np.mean(values)), "MOS", aim, "at least", num=len(values), interval=interval)


class Naturalness:
    """DNSMOS (speechmos): the overall quality that listeners would give, from 1 to 5.

    It hears windows of 9.01 s; shorter clips are repeated until they fill one.

    Raises:
        Unavailable: speechmos or what it needs is not installed.
    """

    def __init__(self) -> None:
        try:
            from speechmos import dnsmos
        except ImportError as error:
            raise Unavailable(
                f'{error.name} is not installed: run pip install -e ".[eval]" in the folder of Duologue'
            ) from None
        self._dnsmos = dnsmos

    def __call__(self, wav: NDArray[np.float32], sample_rate: int) -> float:
        """wav (S,) float32 -> DNSMOS OVRL. Raises ValueError for a clip without samples."""
        if not len(wav):  # speechmos would double it for ever
            raise ValueError("a clip without samples has no quality")
        wav = np.clip(resample(wav, sample_rate, 16_000), -1.0, 1.0)
        # speechmos doubles a short clip and hears it several times over, at several times the cost.
        wav = wav if len(wav) >= _MOS_SAMPLES else np.resize(wav, _MOS_SAMPLES)
        return float(self._dnsmos.run(wav, sr=16_000)["ovrl_mos"])


def if_available(make: Callable[[], _Tool]) -> tuple[_Tool | None, str]:
    """What `make` makes, or the reason why it cannot."""
    try:
        return make(), ""
    except Unavailable as error:
        return None, str(error)


def codebook_usage(codes: Sequence[NDArray[np.int64]], codebook_size: int) -> tuple[float, float]:
    """Share of the codes that occur, and the perplexity of their distribution (at most codebook_size)."""
    counts = np.bincount(np.concatenate(codes), minlength=codebook_size)
    share = counts[counts > 0] / counts.sum()
    return float((counts > 0).mean()), float(np.exp(-(share * np.log(share)).sum()))
