"""The recorded questions of the package, asked as they are and in other rooms, and what is read of the answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import duologue
from duologue.evaluation.bundled import ask_bundled, ask_variants, bundled_rows, load_bundled, vary


def test_bundled_questions_are_asked_and_told_apart(tiny_folder: Path) -> None:
    class Ears:
        name = "ears"

        def transcribe(self, wav: np.ndarray, sample_rate: int, language: str = "en") -> str:
            assert wav.size
            assert sample_rate == 22050
            return "The capital of France is Paris."

    bot, recordings = duologue.load(tiny_folder), load_bundled()
    exchanges = ask_bundled(bot, recordings, Ears(), {"question.wav": "what is"})
    assert exchanges[0].asked == "What is the capital of France?"
    assert [one.transcript for one in exchanges[:2]] == ["what is", None]
    assert len(exchanges) == 7
    varied = ask_variants(bot, recordings[:2], 3)
    assert [one.intent for one in varied] == ["question", "capital", "question"]
    rows = {row.name: row for row in bundled_rows(exchanges, varied, "")}
    assert rows["answer heard"].value == pytest.approx(1 / 7)
    assert rows["answer heard"].parts == {
        **{one.intent: 0.0 for one in exchanges},
        "question": 1.0,
    }
    assert rows["right in the text"].value == sum(one.correct for one in exchanges) / 7
    right = [replace(one, said="It is Paris.") for one in varied]
    (row,) = [row for row in bundled_rows(exchanges, right, "") if row.name == "right under gain, noise, room"]
    assert (row.num, row.parts) == (3, {"question": 1.0, "capital": 0.0})
    assert row.value == pytest.approx(2 / 3)
    assert (row.aim, row.met) == (0.95, False)
    assert bundled_rows(exchanges, varied, "no ears")[1].skipped == "no ears"


def test_variants_differ_and_repeat() -> None:
    one, other, *_ = load_bundled()
    sounds = [vary(one, other, np.random.default_rng((0, index))) for index in (1, 1, 2)]
    assert all(sound.sample_rate == 16000 and np.abs(sound.wav).max() <= 1 for sound in sounds)
    np.testing.assert_array_equal(sounds[0].wav, sounds[1].wav)
    assert not np.array_equal(sounds[0].wav[:8000], sounds[2].wav[:8000])
    assert all(len(sound.wav) >= len(one.clip.samples) * 16000 // one.sample_rate for sound in sounds)
