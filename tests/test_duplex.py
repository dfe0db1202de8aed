"""Full-Duplex-Bench on a small set in its layout: the figures of known sounds, and a server driven in real time."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from duologue.cli import main
from duologue.conversation.chatbot import model_folder
from duologue.evaluation.benchmarks.fullduplexbench import DuplexItem, load
from duologue.evaluation.duplex import SpeechSpan, item_scores, run_duplex, speech_spans, takes_over
from duologue.evaluation.recognition import TimedWord
from duologue.evaluation.suite import Listener, SuiteSettings
from duologue.sound_files import load_audio
from tests.live_server import LiveServer

RATE = 8000


def talk(duration_s: float, *spans: tuple[float, float]) -> NDArray[np.float32]:
    """Silence with tones in these places."""
    wav = np.zeros(int(duration_s * RATE), np.float32)
    for start, end in spans:
        at = np.arange(int(start * RATE), int(end * RATE))
        wav[at] = 0.2 * np.sin(2 * np.pi * 200 * at / RATE)
    return wav


def figures(kind: str, wav: NDArray[np.float32], words: list[TimedWord] | None = None) -> dict[str, float]:
    item = DuplexItem("task/1", "task", kind, Path("input.wav"), 2.0, 3.0)
    return {one.measure: one.value / one.weight for one in item_scores(item, wav, RATE, words)}


def write_set(folder: Path, sound: NDArray[np.float32], sample_rate: int) -> Path:
    times = [1.0, 1.5]
    files = {
        "v1_0/candor_turn_taking/1/turn_taking.json": [{"text": "[TURN]", "timestamp": times}],
        "v1_0/synthetic_pause_handling/1/pause.json": [{"text": "[PAUSE]", "timestamp": times}],
        "v1_5/user_backchannel/1/metadata.json": {"context_text": "a", "timestamps": times},
        "v1_0/icc_backchannel/1/transcription.json": [],
    }
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(data))
        soundfile.write(path.parent / "input.wav", sound, sample_rate)
    return folder


def test_spans_join_over_short_gaps() -> None:
    spans = speech_spans(talk(4, (0.5, 1.0), (1.3, 1.6), (2.5, 3.0)), RATE)
    flat = [value for span in spans for value in (span.start, span.end)]
    assert flat == pytest.approx([0.5, 1.6, 2.5, 3.0], abs=0.011)
    assert speech_spans(talk(1), RATE) == []


@pytest.mark.parametrize(
    ("seconds", "num_words", "taken"), [(0.9, None, False), (1.0, None, True), (0.5, 4, True), (0.5, 3, False)]
)
def test_take_over(seconds: float, num_words: int | None, taken: bool) -> None:
    words = None if num_words is None else [TimedWord("a", 0.0, 0.1)] * num_words
    assert takes_over([SpeechSpan(1.0, 1.0 + seconds)], words) is taken


def test_turns_pauses_and_interruptions() -> None:
    assert figures("turn", talk(6, (2.4, 5.0))) == pytest.approx(
        {"take-over rate": 1, "response latency": 0.4}, abs=0.02
    )
    assert figures("turn", talk(6, (1.0, 5.0)))["response latency"] == 0.0
    assert figures("turn", talk(6)) == {"take-over rate": 0.0}
    interrupted = figures("interruption", talk(6, (0.5, 2.5), (3.7, 5.5)))
    assert interrupted == pytest.approx({"take-over rate": 1, "response latency": 0.7}, abs=0.02)
    assert figures("pause", talk(6, (2.0, 5.0))) == {"take-over rate": 1.0}  # it fills the pause
    assert figures("pause", talk(6, (4.0, 6.0))) == {"take-over rate": 0.0}
    four = [TimedWord("a", 2.1, 2.2)] * 4
    assert figures("pause", talk(6, (2.1, 2.3)), four) == {"take-over rate": 1.0}


def test_backchannels() -> None:
    found = figures("backchannel", talk(10, (1.0, 1.5), (4.0, 4.4)))
    assert found == pytest.approx({"take-over rate": 0, "backchannels per second": 0.2})
    assert figures("backchannel", talk(10, (1.0, 4.5)))["take-over rate"] == 1.0


def test_overlaps() -> None:
    found = figures("overlap", talk(8, (0.5, 2.6), (4.0, 6.0)))
    assert found == pytest.approx(
        {
            "spoke when the overlap began": 1,
            "stopped during the overlap": 1,
            "stop latency": 0.6,
            "spoke after the overlap": 1,
            "response latency": 1.0,
        },
        abs=0.02,
    )
    through = figures("overlap", talk(8, (0.5, 6.0)))
    assert through["stopped during the overlap"] == 0.0
    assert "stop latency" not in through


def test_loader(tmp_path: Path) -> None:
    items = load(write_set(tmp_path, talk(1), RATE))
    assert {item.id: (item.kind, item.start, item.end) for item in items} == {
        "v1_0/synthetic_pause_handling/1": ("pause", 1.0, 1.5),
        "v1_0/candor_turn_taking/1": ("turn", 1.0, 1.5),
        "v1_0/icc_backchannel/1": ("backchannel", None, None),
        "v1_5/user_backchannel/1": ("overlap", 1.0, 1.5),
    }
    (tmp_path / "v1_0/candor_turn_taking/1/turn_taking.json").write_text("[]")
    with pytest.raises(ValueError, match="turn_taking.json has no times of the task"):
        load(tmp_path)
    with pytest.raises(ValueError, match="has no TASK/ID/input.wav"):
        load(tmp_path / "v1_0")


def test_a_server_is_driven_in_real_time(
    server: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question, sample_rate = load_audio(model_folder() / "question.wav")
    end_s = 0.2 + len(question) / sample_rate
    sound = np.concatenate([np.zeros(sample_rate // 5, np.float32), question, np.zeros(3 * sample_rate, np.float32)])
    write_set(tmp_path / "data", sound, sample_rate)
    path = tmp_path / "data" / "v1_0/candor_turn_taking/1/turn_taking.json"
    path.write_text(json.dumps([{"timestamp": [end_s, end_s + 0.1]}]))
    settings = SuiteSettings(tmp_path / "data", tmp_path / "out", subsets=("v1_0/candor_turn_taking",))
    report = run_duplex(settings, server.url, "tiny", "", Listener(None, "", "none in this test"))
    output = tmp_path / "out" / "own" / "v1_0/candor_turn_taking/1/output.wav"
    wav, rate = load_audio(output)
    assert rate == 24_000
    assert len(wav) / rate == pytest.approx(len(sound) / sample_rate, abs=0.05)
    assert not wav[: int(0.5 * rate)].any()  # nothing is said before the question
    rows = {row.name: row for row in report.rows}
    assert rows["take-over rate"].value is not None
    assert "own judge" in rows["behavior class, relevance"].skipped
    command = ["evaluate", "full-duplex-bench", "--data", str(tmp_path / "data"), "--server", server.url]
    assert main([*command, "-o", str(tmp_path / "out"), "--model", "tiny"]) == 2
    assert "holds outputs: --resume continues" in capsys.readouterr().err
    again = [*command, "-o", str(tmp_path / "out"), "--model", "tiny", "--resume", "--json"]
    assert main([*again, "--subset", "v1_0/candor_turn_taking"]) == 0
    saved = json.loads(capsys.readouterr().out)["rows"]
    assert [row["value"] for row in saved] == [row.value for row in report.rows]
