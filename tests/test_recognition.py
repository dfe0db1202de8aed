"""The recognizer of an evaluation gets the language of the text, and gives words with their times."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from duologue.evaluation.recognition import TimedWord, WhisperRecognizer


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
    return recognizer


@pytest.mark.parametrize(("language", "passed"), [("en", "en"), ("zh", "zh"), ("", None)])
def test_the_language_reaches_whisper(whisper: WhisperRecognizer, language: str, passed: str | None) -> None:
    assert whisper.transcribe(np.ones(8000, np.float32), 8000, language) == "one"
    assert whisper._model.options["language"] == passed
    assert whisper._model.options["num_samples"] == 16_000


def test_words_have_times_and_silence_has_none(whisper: WhisperRecognizer) -> None:
    assert whisper.words(np.ones(1600, np.float32), 16_000) == [TimedWord("one", 0.1, 0.4)]
    assert whisper.words(np.zeros(1600, np.float32), 16_000) == []
