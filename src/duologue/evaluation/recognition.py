"""The independent recognizer that reads questions and replies: Whisper in a CTranslate2 folder, by faster-whisper."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from duologue.audio import resample
from duologue.evaluation.intelligibility import Unavailable

WHISPER_FOLDER = "runs/pocket/parts/whisper-base-ct2"
SAMPLE_RATE = 16_000
_FILES = ("model.bin", "config.json", "tokenizer.json")
_MAX_THREADS = 2


class Judge(Protocol):
    """What reads sound: `WhisperJudge`, or a test's own."""

    def transcribe(self, wav: NDArray[np.float32], sample_rate: int, language: str = "en") -> str: ...


@dataclass(frozen=True)
class TimedWord:
    """A word and its place in the sound, in seconds."""

    text: str
    start: float
    end: float


class WhisperJudge:
    """Whisper in int8 with beam search, blind to everything but the sound: the same clip gives the same text.

    Args:
        folder: a CTranslate2 folder: model.bin, config.json, tokenizer.json.

    Raises:
        Unavailable: faster-whisper is not installed.
        ValueError: the folder is not a CTranslate2 Whisper.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} is no CTranslate2 folder with a Whisper: {missing[0]} is missing")
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise Unavailable(
                f'{error.name} is not installed: run pip install -e ".[eval]" in the folder of Duologue'
            ) from None
        logging.getLogger("faster_whisper").setLevel(logging.WARNING)
        threads = min(_MAX_THREADS, torch.get_num_threads())
        try:
            self._model = WhisperModel(
                str(folder), device="cpu", compute_type="int8", cpu_threads=threads, local_files_only=True
            )
        except RuntimeError as error:
            raise ValueError(f"{folder} cannot be read as a CTranslate2 Whisper: {error}") from None

    def transcribe(self, wav: NDArray[np.float32], sample_rate: int, language: str = "en") -> str:
        """wav (S,) float32 in [-1, 1] -> what is said; empty for silence and where no speech is recognized.

        Args:
            language: code of Whisper, such as "en" or "zh"; empty lets the model detect it.
        """
        return " ".join(segment.text.strip() for segment in self._read(wav, sample_rate, language))

    def words(self, wav: NDArray[np.float32], sample_rate: int, language: str = "en") -> list[TimedWord]:
        """As `transcribe`, but the words with their times."""
        found = (word for one in self._read(wav, sample_rate, language, word_timestamps=True) for word in one.words)
        return [TimedWord(word.word.strip(), float(word.start), float(word.end)) for word in found]

    def _read(self, wav: NDArray[np.float32], sample_rate: int, language: str, **options: Any) -> list[Any]:
        if not wav.any():
            return []
        segments, _ = self._model.transcribe(
            resample(wav, sample_rate, SAMPLE_RATE),
            language=language or None,
            beam_size=5,
            temperature=0.0,  # no second try with sampling: its text would depend on chance
            condition_on_previous_text=False,
            vad_filter=False,
            **{"without_timestamps": True, **options},
        )
        return list(segments)


def open_judge(folder: Path | None) -> tuple[WhisperJudge | None, str]:
    """The recognizer, or None and the reason.

    Args:
        folder: a CTranslate2 folder that must be there; None for `WHISPER_FOLDER`, which may be missing.

    Raises:
        ValueError: the folder that was asked for is no Whisper, or faster-whisper is not installed.
    """
    if folder is None and not Path(WHISPER_FOLDER).is_dir():
        return None, f"there is no {WHISPER_FOLDER}; name a CTranslate2 folder with Whisper base: --recognizer FOLDER"
    try:
        return WhisperJudge(folder or WHISPER_FOLDER), ""
    except Unavailable as error:
        if folder is not None:
            raise ValueError(str(error)) from None
        return None, str(error)
