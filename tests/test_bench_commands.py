"""`duologue bench`, run tiny: every bench ends in one line of JSON with its checks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from duologue.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "question.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(20_000), 16_000)
    return path


def bench(capsys: Capture, name: str, model: Path, *argv: str | Path) -> dict[str, Any]:
    """Runs a bench with --json; its standard output must be one line of JSON."""
    assert main(["bench", name, *map(str, argv), "--model", str(model), "--json"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    record: dict[str, Any] = json.loads(out)
    assert record["bench"] == name
    assert record["command"].startswith(f"duologue bench {name} ")
    assert record["model"] == {"name": "tiny", "trained": False}
    assert record["machine"]["cores"] >= 1
    assert set(record["machine"]) >= {"processor", "torch", "transformers", "duologue", "threads"}
    assert record["peak_memory_mb"] > 50
    for check in record["checks"]:
        assert set(check) == {"name", "value", "aim", "ok"}
    return record


def test_bench_latency(question: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    few = ("--question", question, "--repetitions", "2", "--warm-up", "1")
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
    assert result["real_time_factor"]["median"] > 0


def test_a_bench_as_a_table(question: Path, tiny_folder: Path, capsys: Capture) -> None:
    few = ["--question", str(question), "--repetitions", "1", "--warm-up", "0"]
    assert main(["bench", "latency", *few, "--model", str(tiny_folder)]) == 0
    out, err = capsys.readouterr()
    assert "time to first audio" in out
    assert "peak memory" in out
    assert "untrained" in err
