"""`duologue bench`, run tiny: every bench ends in one line of JSON with its checks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.commit import CommitTimes
from benchmarks.harness import Spread
from duologue.cli import main
from duologue.sound_files import save_audio

Capture = pytest.CaptureFixture[str]


def bench(capsys: Capture, name: str, model: Path, *argv: str | Path) -> dict[str, Any]:
    """Runs a bench with --json; its standard output must be one line of JSON."""
    assert main(["bench", name, *map(str, argv), "--model", str(model), "--json"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    record: dict[str, Any] = json.loads(out)
    assert record["bench"] == name
    assert record["command"].startswith(f"duologue bench {name} ")
    assert record["model"].items() >= {"name": "tiny", "trained": False}.items()
    assert record["machine"]["cores"] >= 1
    assert set(record["machine"]) >= {"processor", "torch", "transformers", "duologue", "threads"}
    assert record["peak_memory_mb"] > 50
    for check in record["checks"]:
        assert set(check) == {"name", "value", "aim", "ok"}
    return record


def commits() -> CommitTimes:
    """In place of minutes of listening, which tests/test_benches.py has in short."""
    spread = Spread.of([20.0])
    return CommitTimes(((2.5, spread), (29.0, spread)), ((1, spread), (10, spread)), ((2.5, 0.1), (29.0, 0.2)))


def test_bench_latency(
    question: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--question", question, "--repetitions", "1", "--warm-up", "0")
    monkeypatch.setattr("benchmarks.latency.measure_commits", lambda *_: commits())
    picture = tmp_path / "new" / "latency.png"
    record = bench(capsys, "latency", tiny_folder, *few, "--plot", picture, "-o", tmp_path)
    assert json.loads((tmp_path / "latency.json").read_text()) == record
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = record["results"]
    stages = result["stages"]
    assert list(stages) == [
        "features and tokenizer, last block",
        "prefill",
        "23 decode steps",
        "flow, first block",
        "vocoder, first block",
    ]
    assert all(0 < stage["median_ms"] <= stage["p95_ms"] for stage in stages.values())
    assert result["chain_ms"] == pytest.approx(sum(stage["median_ms"] for stage in stages.values()))
    assert result["first_audio_s"]["median"] > 0
    assert result["baseline_first_audio_s"]["median"] > 0
    assert result["real_time_factor"]["median"] > 0
    assert [check["ok"] for check in record["checks"]] == [True, True]
    assert result["commit"]["by_speech"][0][0] == 2.5


def test_bench_tokenizer(tiny_folder: Path, capsys: Capture) -> None:
    record = bench(capsys, "tokenizer", tiny_folder, "--seconds", "4", "--repetitions", "1", "--warm-up", "0")
    assert [check["name"] for check in record["checks"]] == ["tokenizer.stream_over_offline", "tokenizer.flat"]
    assert record["results"]["speech_s"] == 4.0


def test_bench_decoder(tiny_folder: Path, capsys: Capture) -> None:
    record = bench(capsys, "decoder", tiny_folder, "--seconds", "8", "--repetitions", "1", "--replies", "1")
    assert [check["name"] for check in record["checks"]] == ["decoder.pocket.last_over_second"]
    assert record["results"]["num_steps"] == 2


def test_bench_sessions_as_a_table(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    asked = tmp_path / "asked"
    asked.mkdir()
    argv = ["--sessions", "1", "--seconds", "0.2", "-o", str(tmp_path), "--plot", str(tmp_path / "s.svg")]
    argv += ["--questions", str(asked), "--model", str(tiny_folder)]
    assert main(["bench", "sessions", *argv]) == 2
    assert "has no recordings" in capsys.readouterr().err
    save_audio(asked / "long.wav", np.zeros(8000, np.float32), 16000)
    assert main(["bench", "sessions", *argv]) == 0
    out, err = capsys.readouterr()
    assert "sessions.p95_ttfa_s" in out
    assert "peak memory" in out
    assert f"-> {tmp_path / 's.svg'}" in out
    assert "untrained" in err
    record = json.loads((tmp_path / "sessions.json").read_text())
    (crowd,) = record["results"]["crowds"]
    assert crowd["num_sessions"] == 1
    assert crowd["exchanges"][0]["said_at"] - crowd["exchanges"][0]["asked_at"] == pytest.approx(0.5)


def test_bench_gguf(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make test-gguf)")
    file = tmp_path / "x.gguf"
    assert main(["convert", str(tiny_folder / "language"), "-o", str(file), "--gguf", "f16"]) == 0
    capsys.readouterr()
    record = bench(capsys, "gguf", tiny_folder, "--gguf", file, "--prompt", "40", "--repetitions", "1")
    result = record["results"]
    assert result["weight_gb"] * 1e9 < 2.5 * result["num_parameters"]
    assert [count for count, _ in result["step_ms"]] == [1, 4, 8]
    assert record["checks"][0]["value"] == pytest.approx(result["step_ms"][0][1]["median"] / result["floor_ms"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("sessions", "--sessions", "0"), "'0' is not a positive whole number"),
        (("decoder", "--seconds", "-1"), "'-1' is no number of seconds"),
        (("decoder", "--seconds", "nan"), "no number of seconds"),
        (("tokenizer", "--seconds", "1"), "at least four blocks"),
        (("tokenizer", "--preset", "glm-5"), "glm-4-voice-9b"),
        (("latency", "--repetitions", "1", "--warm-up", "-1"), "warm_up"),
        (("gguf",), "duologue convert FOLDER -o x.gguf"),
        (("nothing",), "is not one of its values"),
    ],
)
def test_bad_input_is_one_sentence(argv: tuple[str, ...], words: str, tiny_folder: Path, capsys: Capture) -> None:
    model = () if argv[0] == "nothing" else ("--model", str(tiny_folder))
    assert main(["bench", *argv, *model]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len([line for line in err.splitlines() if "untrained" not in line and ": loading " not in line]) == 1


def test_without_the_repository_the_command_says_what_it_needs(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duologue.cli.bench.CHECKOUT", tmp_path)
    assert main(["bench", "latency", "--repetitions", "1"]) == 2
    assert "duologue bench needs a checkout of the repository" in capsys.readouterr().err
