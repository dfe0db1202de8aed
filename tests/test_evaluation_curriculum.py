"""A recogniser that listens for the curriculum, and the questions of the package that it listens to."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import duologue
from duologue.audio import load_audio
from duologue.conversation.chatbot import model_folder
from duologue.evaluation.bundled import ask_bundled, bundled_rows
from duologue.evaluation.conversations import CURRICULUM, OPEN
from duologue.evaluation.curriculum import Curriculum, bigram_arpa, english_sentences
from duologue.evaluation.intelligibility import Recogniser
from duologue.evaluation.scoring import normalize
from duologue.evaluation.testset import load_test_set


def test_bundled_questions_are_asked_and_told_apart(tiny_folder: Path) -> None:
    class Ears:
        def transcribe(self, wav: np.ndarray, sample_rate: int) -> str:
            assert wav.size
            assert sample_rate == 22050
            return "the capital of france is paris"

    exchanges = ask_bundled(duologue.load(tiny_folder), {OPEN: Ears(), CURRICULUM: Ears()})  # type: ignore[dict-item]
    assert exchanges[0].asked == "What is the capital of France?"
    assert len(exchanges) == 7
    rows = {row.name: row for row in bundled_rows(exchanges, "")}
    assert rows["answer heard"].value == rows["answer heard over the curriculum"].value == pytest.approx(1 / 7)
    assert rows["answer heard"].parts == {
        **{one.intent: 0.0 for one in exchanges},
        "question": 1.0,
    }
    assert rows["right in the text"].value == sum(one.correct for one in exchanges) / 7
    assert bundled_rows(exchanges, "no ears")[1].skipped == "no ears"


def test_the_language_model_of_a_curriculum_is_a_probability() -> None:
    sentences = english_sentences(["The cat sat.", "The dog sat!", "The cat and the dog.", "猫"])
    assert len(sentences) == 3
    lines = bigram_arpa(sentences).splitlines()
    start = lines.index("\\2-grams:")
    ones = [line.split() for line in lines[lines.index("\\1-grams:") + 1 : start - 1]]
    twos = [line.split() for line in lines[start + 1 : -2]]
    single = {word: (10 ** float(share), 10 ** float(rest)) for share, word, rest in ones}
    pairs = {(word, other): 10 ** float(share) for share, word, other in twos}
    vocabulary = {"the", "cat", "dog", "sat", "and", "</s>"}
    assert set(single) == vocabulary | {"<s>"}
    assert sum(single[word][0] for word in vocabulary) == pytest.approx(1, abs=1e-3)
    for word in (vocabulary | {"<s>"}) - {"</s>"}:
        rest = single[word][1]
        total = sum(pairs.get((word, other), rest * single[other][0]) for other in vocabulary)
        assert total == pytest.approx(1, abs=1e-3)
    assert pairs["the", "cat"] > single["the"][1] * single["sat"][0]  # what was seen is likelier than what was not
    assert f"ngram 1={len(single)}" in lines
    assert f"ngram 2={len(pairs)}" in lines
    with pytest.raises(ValueError, match="at least one sentence"):
        bigram_arpa([])


def test_a_recogniser_over_a_curriculum_hears_nothing_else() -> None:
    pytest.importorskip("pocketsphinx")
    wav, sample_rate = load_audio(model_folder() / "question.wav")  # "What is the capital of France?"
    texts = ("What is the capital of France?", "What is a duologue of France?", "Zzyzzq is a capital.", "日本")
    ears = Recogniser(Curriculum(texts, {"duologue": "D UW AH L AO G"}))
    assert normalize(ears.transcribe(wav, sample_rate)) == "what is the capital of france"
    other = Recogniser(Curriculum(("We sat on a duologue.", "You ran."), {"duologue": "D UW AH L AO G"}))
    assert set(other.transcribe(wav, sample_rate).split()) <= {"we", "sat", "on", "a", "duologue", "you", "ran"}


def test_a_test_set_can_hold_a_curriculum(test_set_folder: Path, tmp_path: Path) -> None:
    assert load_test_set(test_set_folder).curriculum is None
    folder = Path(shutil.copytree(test_set_folder, tmp_path / "test"))
    (folder / "curriculum.json").write_text(json.dumps({"texts": ["It is three."], "pronunciations": {"it": "IH T"}}))
    loaded = load_test_set(folder)
    assert loaded.curriculum == loaded.limited(1).curriculum == Curriculum(("It is three.",), {"it": "IH T"})
    (folder / "curriculum.json").write_text("[]")
    with pytest.raises(ValueError, match="curriculum.json"):
        load_test_set(folder)
