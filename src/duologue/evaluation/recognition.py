"""The independent recognizers that read questions and replies: Whisper by faster-whisper, Paraformer by FunASR."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from duologue.audio import resample
from duologue.evaluation.intelligibility import Unavailable

WHISPER_FOLDERS = ("runs/pocket/parts/whisper-base-ct2", "runs/whisper-base-ct2")  # where a run of the recipe has it
SAMPLE_RATE = 16_000
_FILES = ("model.bin", "config.json", "tokenizer.json")
_MAX_THREADS = 2


@dataclass(frozen=True)
class TimedWord:
    """A word and its place in the sound, in seconds."""

    text: str
    start: float
    end: float


class SoundRecognizer(Protocol):
    """What reads sound, such as `WhisperRecognizer`; `name` goes into reports."""

    name: str

    def transcribe(self, wav: NDArray[np.float32], sample_rate: int, language: str = "en") -> str: ...


@runtime_checkable
class TimedRecognizer(SoundRecognizer, Protocol):
    """A recognizer that also gives the times of words."""

    def words(self, wav: NDArray[np.float32], sample_rate: int, language: str = "en") -> list[TimedWord]: ...


class WhisperRecognizer:
    """Whisper in int8 with beam search, blind to everything but the sound: the same clip gives the same text.

    Args:
        folder: a CTranslate2 folder: model.bin, config.json, tokenizer.json.

    Raises:
        Unavailable: faster-whisper is not installed.
        ValueError: the folder is not a CTranslate2 Whisper.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.name = folder.resolve().name
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


class ParaformerRecognizer:
    """A model of FunASR, such as Paraformer for Chinese (`paraformer-zh`, the recognizer of seed-tts-eval).

    Args:
        model: a name that FunASR downloads, or a local folder.

    Raises:
        ValueError: funasr is not installed, or it cannot load the model.
    """

    def __init__(self, model: str) -> None:
        try:
            from funasr import AutoModel
        except ImportError as error:
            raise ValueError(
                f"{error.name} is not installed, which reads Chinese for --chinese-recognizer: run pip install funasr"
            ) from None
        self.name = Path(model).name
        try:
            self._model = AutoModel(
                model=model, device="cpu", disable_update=True, disable_pbar=True, log_level="ERROR"
            )
        except Exception as error:  # funasr raises many types for a model that it does not find
            raise ValueError(f"funasr cannot load {model}: {' '.join(str(error).split())[:200]}") from None

    def transcribe(self, wav: NDArray[np.float32], sample_rate: int, language: str = "zh") -> str:
        """wav (S,) float32 in [-1, 1] -> what is said; the model knows its language."""
        if not wav.any():
            return ""
        found = self._model.generate(input=resample(wav, sample_rate, SAMPLE_RATE))
        return " ".join(str(one["text"]).strip() for one in found)


class BilingualRecognizer:
    """One recognizer for Chinese and another for everything else."""

    def __init__(self, other: WhisperRecognizer, chinese: SoundRecognizer) -> None:
        self.name = f"{other.name}; {chinese.name} for Chinese"
        self._other, self._chinese = other, chinese

    def transcribe(self, wav: NDArray[np.float32], sample_rate: int, language: str = "en") -> str:
        chosen = self._chinese if language == "zh" else self._other
        return chosen.transcribe(wav, sample_rate, language)

    def words(self, wav: NDArray[np.float32], sample_rate: int, language: str = "en") -> list[TimedWord]:
        """By the recognizer of the other languages."""
        return self._other.words(wav, sample_rate, language)


def open_recognizer(folder: Path | None, chinese: str = "") -> tuple[TimedRecognizer | None, str]:
    """The recognizer, or None and the reason.

    Args:
        folder: a CTranslate2 folder that must be there; None for the first of `WHISPER_FOLDERS` that is.
        chinese: a model of FunASR for Chinese; empty reads Chinese with Whisper too.

    Raises:
        ValueError: the folder that was asked for is no Whisper, or a library of what was asked for is not installed.
    """
    found = folder or next((Path(name) for name in WHISPER_FOLDERS if Path(name).is_dir()), None)
    try:
        if found is None:
            raise Unavailable(
                f"there is no {' or '.join(WHISPER_FOLDERS)}; name a CTranslate2 folder with Whisper base: "
                "--recognizer FOLDER"
            )
        whisper = WhisperRecognizer(found)
    except Unavailable as error:
        if folder is not None or chinese:
            raise ValueError(str(error)) from None
        return None, str(error)
    return BilingualRecognizer(whisper, ParaformerRecognizer(chinese)) if chinese else whisper, ""
