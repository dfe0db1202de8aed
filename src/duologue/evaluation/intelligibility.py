"""How well speech can be understood: word error rates, an independent recogniser, and how good it sounds.

The recogniser is pocketsphinx with its open English language model, which knows nothing of the curriculum, or with one
over the curriculum (`curriculum.py`). Where an optional library is missing, `Unavailable` says so, and a measure that
needs it is reported as skipped with that reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from duologue.audio import resample
from duologue.evaluation.curriculum import Curriculum, bigram_arpa, english_sentences
from duologue.evaluation.report import Row
from duologue.evaluation.scoring import word_errors
from duologue.pcm import to_int16

RECOGNISER_SAMPLE_RATE = 16_000
_EDGE_S = 0.25  # silence around a clip: the recogniser's noise estimate needs some, and drops words at bare edges
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
        """None where there was no word to recognise."""
        return self.num_edits / self.num_words if self.num_words else None


def error_rate(pairs: Iterable[tuple[str, str]]) -> ErrorRate:
    """Of (reference, hypothesis) texts, both normalised here."""
    rate = ErrorRate()
    for reference, hypothesis in pairs:
        rate.add(reference, hypothesis)
    return rate


def error_row(group: str, name: str, pairs: Sequence[tuple[str, str]], aim: float | None = None) -> Row:
    """The word error rate of (reference, hypothesis) texts as a row."""
    rate = error_rate(pairs)
    if rate.value is None:
        return Row(group, name, None, "%", skipped="the test set has no such clips")
    return Row(group, name, rate.value, "%", aim, num=rate.num_texts, note=f"{rate.num_words} words")


class Recogniser:
    """pocketsphinx with its own English models, forgetting each clip before the next.

    Args:
        curriculum: listen for what it holds, and for nothing else; the open language model where it is None.

    Raises:
        Unavailable: pocketsphinx is not installed.
        ValueError: the curriculum holds no English text of words whose pronunciation is known.
    """

    def __init__(self, curriculum: Curriculum | None = None) -> None:
        try:
            import pocketsphinx
        except ImportError:
            raise Unavailable('pocketsphinx is not installed: pip install "duologue[eval]"') from None
        if curriculum is None:
            self._decoder = pocketsphinx.Decoder(samprate=RECOGNISER_SAMPLE_RATE, loglevel="FATAL")
            return
        self._decoder = pocketsphinx.Decoder(samprate=RECOGNISER_SAMPLE_RATE, loglevel="FATAL", lm=None)
        sentences = english_sentences(curriculum.texts)
        known = set()
        for word in {word for sentence in sentences for word in sentence}:
            if self._decoder.lookup_word(word) is None and word in curriculum.pronunciations:
                self._decoder.add_word(word, curriculum.pronunciations[word], False)
            if self._decoder.lookup_word(word) is not None:
                known.add(word)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "curriculum.lm"
            path.write_text(bigram_arpa([sentence for sentence in sentences if known.issuperset(sentence)]))
            self._decoder.add_lm_file("curriculum", str(path))
        self._decoder.activate_search("curriculum")

    def transcribe(self, wav: NDArray[np.float32], sample_rate: int) -> str:
        """wav (S,) float32 -> lower-case words; empty where nothing was recognised."""
        if not wav.any():  # it would hear words in digital silence
            return ""
        wav = resample(wav, sample_rate, RECOGNISER_SAMPLE_RATE)
        edge = np.zeros(int(_EDGE_S * RECOGNISER_SAMPLE_RATE), np.float32)
        pcm = to_int16(np.concatenate([edge, wav, edge])).tobytes()
        self._decoder.reinit_feat()  # forgets the cepstral mean of the clip before
        self._decoder.start_utt()
        self._decoder.process_raw(pcm, full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return str(hypothesis.hypstr) if hypothesis is not None else ""


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
            raise Unavailable(f'{error.name} is not installed: pip install "duologue[eval]"') from None
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
