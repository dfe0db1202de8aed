"""The tables of the paper on small data sets in their own layouts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from duologue.cli import main
from duologue.conversation.answer import language_of
from duologue.evaluation.benchmarks.speech_sets import (
    read_aishell,
    read_librispeech,
    read_libritts,
    read_stories,
)
from duologue.evaluation.likelihood import mean_log_likelihood, prefers_right_end, transcribe_with_language_model
from duologue.models import Models
from tests.benchmark_data import write_openaudiobench, write_seed_tts, write_sound

Capture = pytest.CaptureFixture[str]


def write_librispeech(folder: Path, num: int = 2) -> Path:
    chapter = folder / "12" / "34"
    for number in range(num):
        write_sound(chapter / f"12-34-{number:04d}.flac")
    lines = "".join(f"12-34-{number:04d} THREE RED STOOLS\n" for number in range(num))
    (chapter / "12-34.trans.txt").write_text(lines)
    return folder


def write_aishell(folder: Path) -> Path:
    write_sound(folder / "wav" / "test" / "S1" / "BAC1.wav")
    write_sound(folder / "wav" / "test" / "S1" / "BAC2.wav")  # without a transcript
    (folder / "transcript").mkdir()
    (folder / "transcript" / "aishell_transcript_v0.8.txt").write_text("BAC1 今天 天气 很 好\n", encoding="utf-8")
    return folder


def write_libritts(folder: Path) -> Path:
    write_sound(folder / "1" / "2" / "1_2_3.wav")
    (folder / "1" / "2" / "1_2_3.normalized.txt").write_text("Hello there.\n")
    return folder


def write_stories(folder: Path, num: int = 3) -> Path:
    rows = []
    for number in range(num):
        for name in ("context", "right", "wrong"):
            write_sound(folder / f"{number}-{name}.wav", 0.4 + 0.1 * len(name))
        sounds = {name: f"{number}-{name}.wav" for name in ("context", "right", "wrong")}
        rows.append({"id": number, **sounds, "right_text": "It is seven.", "wrong_text": "The capital of France?"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def models(tiny_folder: Path) -> Models:
    return Models.load(tiny_folder)


def test_readers(tmp_path: Path) -> None:
    (first, _) = read_librispeech(write_librispeech(tmp_path / "a"))
    assert (first.id, first.text, first.language, first.sound.is_file()) == (
        "12-34-0000",
        "THREE RED STOOLS",
        "en",
        True,
    )
    (only,) = read_aishell(write_aishell(tmp_path / "b"))
    assert (only.id, only.text, only.language) == ("BAC1", "今天 天气 很 好", "zh")
    (read,) = read_libritts(write_libritts(tmp_path / "c"))
    assert (read.id, read.text) == ("1_2_3", "Hello there.")
    assert [pair.id for pair in read_stories(write_stories(tmp_path / "d"))] == ["0", "1", "2"]
    (tmp_path / "a" / "12" / "34" / "12-34-0001.flac").unlink()
    with pytest.raises(ValueError, match="names the sound 12-34-0001.flac, which is missing"):
        read_librispeech(tmp_path / "a")


def test_likelihood_is_that_of_the_model(models: Models) -> None:
    context, end = models.vocabulary.speech_ids([1, 2, 3]), models.vocabulary.encode_text("It is seven.")
    ids = models.vocabulary.document_sample([*context, *end]).ids[:-1]
    with torch.inference_mode():
        logits = language_of(models)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    at = len(ids) - len(end)
    expected = np.mean([float(logits[at - 1 + index, token]) for index, token in enumerate(end)])
    assert mean_log_likelihood(models, context, end) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="needs a context and an end"):
        mean_log_likelihood(models, context, [])
    with pytest.raises(ValueError, match="do not fit the 512 positions"):
        mean_log_likelihood(models, context * 200, end)


def test_the_likelier_end_is_preferred(models: Models, tmp_path: Path) -> None:
    pair = read_stories(write_stories(tmp_path))[0]
    first = prefers_right_end(models, pair, spoken=False)
    swapped = pair.__class__(**{**vars(pair), "right_text": pair.wrong_text, "wrong_text": pair.right_text})
    assert {first, prefers_right_end(models, swapped, spoken=False)} == {0.0, 1.0}
    same = pair.__class__(**{**vars(pair), "wrong": pair.right})
    assert prefers_right_end(models, same, spoken=True) == 0.5


def test_the_language_model_transcribes(models: Models) -> None:
    text = transcribe_with_language_model(models, [1, 2, 3])
    assert text == transcribe_with_language_model(models, [1, 2, 3])
    with pytest.raises(ValueError, match="do not fit the 512 positions"):
        transcribe_with_language_model(models, [1] * 600)


def paper(folder: Path, model: Path, capsys: Capture, *more: str) -> dict[tuple[str, str], dict[str, Any]]:
    command = ["evaluate", "paper", "--data", str(folder / "data"), "--model", str(model), "-o", str(folder / "out")]
    assert main([*command, "--json", *more]) == 0
    report = json.loads(capsys.readouterr().out)
    return {(row["group"], row["name"]): row for row in report["rows"]}


def test_missing_data_is_named(
    tmp_path: Path, tiny_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows = paper(tmp_path, tiny_folder, capsys)
    data = tmp_path / "data"
    skipped = {key: row["skipped"] for key, row in rows.items()}
    assert skipped["table 1, tokenizer: LibriSpeech test-clean", "all"] == f"there is no {data}/LibriSpeech/test-clean"
    assert skipped["table 3, speech language model: sStoryCloze", "accuracy"] == f"there is no {data}/sStoryCloze"
    assert skipped["table 4, spoken questions: OpenAudioBench", "all"] == f"there is no {data}/OpenAudioBench"
    assert skipped["table 5, ASR and TTS: Seed-TTS", "all"] == f"there is no {data}/seedtts_testset"
    assert skipped["table 6, chat: chat", "all"]
    assert all(skipped.values())


@pytest.mark.slow
def test_what_the_data_allows_is_computed_once(
    tmp_path: Path, tiny_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    write_librispeech(data / "LibriSpeech" / "test-clean")
    write_aishell(data / "data_aishell")
    write_stories(data / "sStoryCloze")
    write_openaudiobench(data / "OpenAudioBench", num=1)
    write_libritts(data / "LibriTTS" / "test-clean")
    write_seed_tts(data / "seedtts_testset")
    write_sound(data / "chat" / "a.wav")
    (data / "chat" / "general.jsonl").write_text(json.dumps({"sound": "a.wav", "text": "Hello?"}) + "\n")
    rows = paper(tmp_path, tiny_folder, capsys, "--limit", "1")
    head = rows["table 1, tokenizer: LibriSpeech test-clean", "WER of the recognition head"]
    assert (head["num"], head["interval"] is not None) == (1, True)
    assert rows["table 1, tokenizer: AISHELL-1 test", "CER of the recognition head"]["value"] is not None
    assert "recognizer" in rows["table 1, tokenizer: LibriSpeech test-clean", "WER after reconstruction"]["skipped"]
    for side in ("S->T", "S->S"):
        row = rows["table 3, speech language model: sStoryCloze", f"accuracy {side}"]
        assert row["value"] in (0.0, 0.5, 1.0)
    assert rows["table 4, spoken questions: OpenAudioBench web_questions", "right, text"]["num"] == 1
    assert rows["table 5, ASR and TTS: LibriSpeech test-clean", "WER of the language model"]["value"] is not None
    assert rows["table 5, ASR and TTS: Seed-TTS zh", "CER, sound"]["skipped"]
    assert rows["table 6, chat: chat general", "judged, text"]["skipped"] == "needs a judge: --judge URL"
    parts = (tmp_path / "out" / "parts.jsonl").read_text()
    again = paper(tmp_path, tiny_folder, capsys, "--limit", "1", "--resume")
    assert (tmp_path / "out" / "parts.jsonl").read_text() == parts
    assert again == rows
