"""Every file in examples/ runs as a user runs it, and stays short."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile

import duologue
from duologue.checkpoint import load_tensors
from duologue.conversation.chatbot import model_folder
from duologue.sound_files import load_audio
from tests.live_server import TEXT, LiveServer

EXAMPLES = Path(__file__).parent.parent / "examples"
MAX_LINES = 40


def run_example(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    """Runs an example as a user does, in this process."""
    path = EXAMPLES / name
    monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


def test_every_example_is_run_here_and_is_short() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"offline.py", "streaming.py", "client.py", "finetune_voice.py"}
    for name in names:
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_LINES, name
        assert f"python examples/{name}" in text


def test_offline_gives_the_reply_of_chat(
    tiny_folder: Path,
    question: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = tmp_path / "answer.wav"
    run_example(monkeypatch, "offline.py", question, "-o", answer, "--model", tiny_folder)
    reply = duologue.load(tiny_folder).chat(question)
    wav, sample_rate = load_audio(answer)
    assert sample_rate == reply.sample_rate
    assert len(reply.audio) > 0
    np.testing.assert_allclose(wav, reply.audio, atol=1e-4, rtol=0)
    assert capsys.readouterr().out.strip() == reply.text.strip()


def test_streaming_answers_twice_and_is_interrupted_once(
    tiny_folder: Path,
    question: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = tmp_path / "answers.wav"
    run_example(monkeypatch, "streaming.py", question, "-o", answers, "--model", tiny_folder)
    wav, sample_rate = load_audio(answers)
    assert len(wav) > sample_rate
    first, second = re.findall(r"\[(\w+); heard: ", capsys.readouterr().out)
    assert first in ("end", "length")
    assert second == "interrupted"


def test_client_writes_the_answer_of_a_server(
    server: LiveServer,
    question: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = tmp_path / "answer.wav"
    run_example(monkeypatch, "client.py", question, "-o", answer, "--server", server.url)
    assert capsys.readouterr().out.strip() == TEXT
    assert soundfile.info(answer).duration > 1.0


@pytest.mark.slow
def test_finetune_voice_makes_a_model_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    time = np.arange(9 * 16_000) / 16_000
    recording = tmp_path / "mine.wav"
    soundfile.write(recording, 0.2 * np.sin(2 * np.pi * 150 * time) * (np.sin(6 * np.pi * time) > -0.5), 16_000)
    run_example(monkeypatch, "finetune_voice.py", tmp_path / "out", recording, "--steps", 2)
    assert "velocity" in capsys.readouterr().out
    model = tmp_path / "out" / "model"
    before = load_tensors(model_folder() / "decoder" / "flow")
    after = load_tensors(model / "decoder" / "flow")
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    reply = duologue.load(model).chat(model / "question.wav")
    assert len(reply.audio) > 0
