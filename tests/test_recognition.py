"""The recognizer of an evaluation gets the language of the text, and gives words with their times."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from duologue.evaluation.recognition import (
    BilingualRecognizer,
    ParaformerRecognizer,
    TimedRecognizer,
    TimedWord,
    WhisperRecognizer,
    open_recognizer,
)
from duologue.scoring import word_errors


class FakeWhisper:
    """In place of faster-whisper's model: returns one segment and keeps its options."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def transcribe(self, wav: np.ndarray, **options: Any) -> tuple[list[Any], None]:
        self.options = {"num_samples": len(wav), **options}
        words = [SimpleNamespace(word=" one", start=0.1, end=0.4)] if options.get("word_timestamps") else None
        return [SimpleNamespace(text=" one", words=words)], None


@pytest.fixture
def whisper() -> WhisperRecognizer:
    recognizer = WhisperRecognizer.__new__(WhisperRecognizer)
    recognizer._model = FakeWhisper()
    recognizer.name = "whisper"
    return recognizer


@pytest.mark.parametrize(("language", "passed"), [("en", "en"), ("zh", "zh"), ("", None)])
def test_the_language_reaches_whisper(whisper: WhisperRecognizer, language: str, passed: str | None) -> None:
    assert whisper.transcribe(np.ones(8000, np.float32), 8000, language) == "one"
    assert whisper._model.options["language"] == passed
    assert whisper._model.options["num_samples"] == 16_000


def test_words_have_times_and_silence_has_none(whisper: WhisperRecognizer) -> None:
    assert whisper.words(np.ones(1600, np.float32), 16_000) == [TimedWord("one", 0.1, 0.4)]
    assert whisper.words(np.zeros(1600, np.float32), 16_000) == []


class FakeAutoModel:
    """In place of funasr 1.4's AutoModel: `generate` takes a list or samples at 16 kHz and returns rows with a text."""

    def __init__(self, **options: Any) -> None:
        if options["model"] == "unknown":
            raise AssertionError("unknown is not registered")
        assert options["disable_update"] is True
        self.options = options

    def generate(self, input: np.ndarray, **options: Any) -> list[dict[str, str]]:
        assert input.dtype == np.float32
        return [{"key": "rand_key", "text": "今 天 " + ("好" if len(input) == 16_000 else "?")}]


@pytest.fixture
def funasr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "funasr", SimpleNamespace(AutoModel=FakeAutoModel))


@pytest.mark.usefixtures("funasr")
def test_chinese_is_read_by_paraformer_and_the_rest_by_whisper(whisper: WhisperRecognizer) -> None:
    both = BilingualRecognizer(whisper, ParaformerRecognizer("models/paraformer-zh"))
    assert both.name == "whisper; paraformer-zh for Chinese"
    assert isinstance(both, TimedRecognizer)
    wav = np.ones(8000, np.float32)
    assert both.transcribe(wav, 8000, "en") == "one"
    assert both.transcribe(wav, 8000, "zh") == "今 天 好"
    assert word_errors("今天好。", "今 天 好", "zh") == (0, 3)
    assert both.transcribe(np.zeros(8000, np.float32), 8000, "zh") == ""
    assert both.words(wav, 8000)[0].text == "one"
    with pytest.raises(ValueError, match="funasr cannot load unknown: unknown is not registered"):
        ParaformerRecognizer("unknown")


def test_a_missing_funasr_and_a_missing_whisper_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "funasr", None)
    with pytest.raises(ValueError, match="funasr is not installed.*pip install funasr"):
        ParaformerRecognizer("paraformer-zh")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no runs/pocket/parts/whisper-base-ct2 or runs/whisper-base-ct2"):
        open_recognizer(None, "paraformer-zh")
