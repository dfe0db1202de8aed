"""The commands, run in this process on a chatbot with random weights."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from duologue.cli import main
from duologue.conversation.chatbot import model_folder
from duologue.rates import speak_samples_for_tokens, tokens_for_samples
from recipes.pocket.whisper import write_random_whisper

Capture = pytest.CaptureFixture[str]


def run_json(capsys: Capture, *argv: str | Path) -> dict[str, Any]:
    """Runs a command with --json; its standard output must be one line of JSON."""
    assert main([*map(str, argv), "--json"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    result: dict[str, Any] = json.loads(out)
    return result


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys, duologue.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'soundfile'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    for command in ("chat", "tokenize", "synthesize", "data", "train", "plot", "evaluate", "doctor", "bench"):
        assert command in done.stdout


def test_chat_prints_transcript_and_times(question: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    answer = tmp_path / "answer.wav"
    assert main(["chat", str(question), "-o", str(answer), "--model", str(tiny_folder), "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert f"you: {question}\ntiny: " in out
    assert "time to first audio" in out
    assert "real-time factor" in out
    assert str(answer) in out
    assert "untrained" in err  # random weights never pass for a chatbot
    assert soundfile.info(answer).samplerate == 22_050


def test_chat_json(question: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    answer = tmp_path / "answer.flac"
    command = ("chat", question, "-o", answer, "--model", tiny_folder, "--seed", "3")
    first, second = run_json(capsys, *command), run_json(capsys, *command)
    assert first["trained"] is False
    (turn,), (again,) = first["turns"], second["turns"]
    assert turn["speech_tokens"] == again["speech_tokens"]
    assert turn["audio"] == str(answer)
    assert soundfile.info(answer).frames == speak_samples_for_tokens(len(turn["speech_tokens"]))
    assert turn["timings"]["real_time_factor"] > 0


def test_chat_without_a_question_asks_the_bundled_one(tiny_folder: Path, capsys: Capture) -> None:
    bundled = model_folder("pocket") / "question.wav"
    command = ("chat", "--text-only", "--temperature", "0", "--max-tokens", "20", "--model", str(tiny_folder))
    assert main(list(command)) == 0
    out, err = capsys.readouterr()
    assert f"you: {bundled}\ntiny: " in out
    assert f"no question was given; asking the bundled one, {bundled}" in err
    (turn,) = run_json(capsys, *command)["turns"]
    (asked,) = run_json(capsys, *command, bundled)["turns"]
    assert turn["question"] == str(bundled)
    assert turn["text"] == asked["text"]


def test_several_turns_are_one_conversation(question: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    answer = tmp_path / "answer.wav"
    asked = ("chat", question, question, "--text", "And now?", "--temperature", "0", "--model", tiny_folder)
    turns = run_json(capsys, *asked, "-o", answer)["turns"]
    assert [turn["audio"] for turn in turns] == [str(tmp_path / f"answer-{i}.wav") for i in (1, 2, 3)]
    assert not answer.exists()
    assert turns[2]["question"] == "And now?"
    # The second prompt holds the first turn, so the same question is not the same prompt.
    alone = run_json(capsys, "chat", question, "--temperature", "0", "--model", tiny_folder)["turns"]
    assert alone[0]["speech_tokens"] == turns[0]["speech_tokens"]


def test_text_only(question: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    answer = tmp_path / "answer.wav"
    (turn,) = run_json(capsys, "chat", question, "--text-only", "-o", answer, "--model", tiny_folder)["turns"]
    assert turn["text"]
    assert turn["audio"] is None
    assert not answer.exists()


def test_tokens_go_to_a_file_and_back_to_sound(
    question: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, sound = tmp_path / "tokens.json", tmp_path / "sound.wav"
    result = run_json(capsys, "tokenize", question, "-o", tokens, "--model", tiny_folder)
    assert json.loads(tokens.read_text()) == result
    codes = result["tokens"]
    assert isinstance(codes, list)
    assert len(codes) == tokens_for_samples(20_000)
    main(["tokenize", str(question), "--model", str(tiny_folder)])
    assert capsys.readouterr().out.split() == [str(code) for code in codes]

    spoken = run_json(capsys, "synthesize", tokens, "-o", sound, "--model", tiny_folder)
    assert spoken["num_tokens"] == len(codes)
    assert soundfile.info(sound).frames == speak_samples_for_tokens(len(codes))
    first = sound.read_bytes()
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(codes)))
    run_json(capsys, "synthesize", "-", "-o", sound, "--model", tiny_folder)
    assert sound.read_bytes() == first


def test_train_resumes_and_plot_draws(
    audio_corpus: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_random_whisper(Path("whisper"))
    Path("recipe.yaml").write_text(
        f"corpora: [{audio_corpus}]\n"
        "whisper: whisper\n"
        "tokenizer: {encoder: {num_layers: 1}, quantizer: {codebook_size: 16}}\n"
        "batch_s: 3.0\n"
        "loop: {num_steps: 2, learning_rate: 1e-3, log_every: 1, evaluate_every: 2, sample_every: 2}\n"
    )
    command = ("train", "tokenizer", "--recipe", "recipe.yaml", "--out", "run")
    trained = run_json(capsys, *command)
    assert trained["stage"] == "tokenizer"
    assert "wer/valid" in trained["metrics"]
    assert (Path("run") / "final" / "tokenizer" / "model.safetensors").is_file()
    run_json(capsys, *command, "--set", "loop.num_steps=3")
    steps = [line.split(",")[0] for line in Path("run/log.csv").read_text().splitlines()[1:]]
    assert steps[0] == "1"
    assert steps[-1] == "3"
    assert json.loads(Path("run/recipe.json").read_text())["loop"]["num_steps"] == 3

    picture = run_json(capsys, "plot", "run")["picture"]
    assert Path(str(picture)).read_bytes().startswith(b"\x89PNG")


def test_doctor(tiny_folder: Path, capsys: Capture) -> None:
    assert main(["doctor", "--model", str(tiny_folder)]) == 0
    out = capsys.readouterr().out
    assert "random weights" in out
    assert main(["doctor", "--model", "no-such-model", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)
    broken = [check for check in checks if check["state"] == "broken"]
    assert [check["name"] for check in broken] == ["model no-such-model"]
    assert {"Python", "processor", "torch", "GPU", "extra train"} <= {check["name"] for check in checks}
    assert all(check["mend"] for check in checks if check["name"].startswith("extra") and check["state"] != "ok")


class SameWords:
    """In place of Whisper."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def transcribe(self, wav: np.ndarray, sample_rate: int) -> str:
        assert wav.dtype == np.float32
        return "it is three"


def seconds(wav: np.ndarray, sample_rate: int) -> float:
    """In place of DNSMOS."""
    return len(wav) / sample_rate


def test_evaluate_pocket(
    test_set_folder: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duologue.evaluation.recognition.WhisperRecognizer", SameWords)
    monkeypatch.setattr("duologue.evaluation.pocket.Naturalness", lambda: seconds)
    monkeypatch.setattr("duologue.evaluation.bundled.NUM_VARIANTS", 8)
    command = ("evaluate", "pocket", "--data", test_set_folder, "--model", tiny_folder, "-o", tmp_path)
    report = run_json(capsys, *command, "--recognizer", tmp_path, "--players", "9")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("<tr data-group") == 9
    assert len(list((tmp_path / "sounds").iterdir())) == 18
    rows = {(row["group"], row["name"]): row for row in report["rows"]}
    groups = {group for group, _ in rows}
    assert groups == {
        *("tokenizer", "decoder", "bundled questions", "open vocabulary", "understanding"),
        *("speaking", "agreement", "naturalness", "refusals", "style", "time"),
    }
    for row in rows.values():  # a value, or the reason why there is none
        assert (row["value"] is None) == bool(row["skipped"])
    assert rows["tokenizer", "WER of its recognition head, seen voices"]["value"] is not None
    assert rows["understanding", "S->T, seen voices"]["num"] == 3
    assert rows["understanding", "S->T, unseen voices"]["num"] == 1
    # One of three questions of seen voices asks for three.
    assert rows["speaking", "S->S, seen voices"]["value"] == pytest.approx(1 / 3)
    assert rows["time", "to first audio, p50"]["num"] == 5
    assert [sample["split"] for sample in report["samples"]].count("bundled") == 7
    splits = [sample["split"] for sample in report["samples"]]
    assert splits.count("varied") == 8
    assert splits.count("typed") == 5
    assert len(report["samples"]) == 25
    assert rows["understanding", "S->T, warped voices"]["skipped"]
    assert rows["understanding", "S->T, typed"]["num"] == 4
    assert rows["understanding", "single questions, in writing, seen voices"]["num"] == 3
    assert rows["understanding", "single questions, in writing, unseen voices"]["num"] == 1
    assert rows["bundled questions", "right under gain, noise, room"]["num"] == 8
    assert set(report["model"]["hashes"]) == {"tokenizer", "vocabulary", "language", "decoder"}


def test_evaluate_without_a_recognizer_says_so(
    test_set_folder: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("duologue.evaluation.pocket.Naturalness", lambda: seconds)
    command = ["evaluate", "pocket", "--data", str(test_set_folder), "--model", str(tiny_folder)]
    report = run_json(capsys, *command, "--limit", "1")
    skipped = {(row["group"], row["name"]): row["skipped"] for row in report["rows"] if row["skipped"]}
    places = "runs/pocket/parts/whisper-base-ct2 or runs/whisper-base-ct2"
    sentence = f"there is no {places}; name a CTranslate2 folder with Whisper base"
    for row in (("agreement", "WER between the reply's text and what is heard"), ("speaking", "S->S, seen voices")):
        assert skipped[row].startswith(sentence)
    assert main([*command, "--recognizer", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is no CTranslate2 folder with a Whisper: model.bin is missing" in error
