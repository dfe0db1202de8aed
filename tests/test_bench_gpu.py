"""The benchmark of a CUDA device, with small models on the CPU: all sections, without a failure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import SECTIONS, main
from benchmarks.gpu.record import Record

ROOT = Path(__file__).parent.parent
# The device's machine has none of these.
MISSING = (
    *("fastapi", "uvicorn", "websockets", "starlette", "multipart", "prometheus_client", "faster_whisper", "librosa"),
    *("matplotlib", "tensorboard", "sounddevice", "speechmos", "whisper_normalizer", "pyworld", "piper", "hibari"),
)


@pytest.mark.slow
def test_every_section_gives_figures(tmp_path: Path) -> None:
    output = tmp_path / "gpu.jsonl"
    main(["--tiny", "--device", "cpu", "--limit", "900", "-o", str(output)])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    failed = [line for line in lines if "error" in line or "reason" in line]
    assert not failed
    figures: dict[str, list[object]] = {section: [] for section in SECTIONS}
    for line in lines:
        if line["section"] in figures and line["name"] != "section":
            figures[line["section"]].append(line["value"])
    assert all(values and None not in values for values in figures.values()), figures


def test_a_failure_costs_one_line(tmp_path: Path) -> None:
    record = Record(tmp_path / "out.jsonl", 0.0)
    with record.attempt("broken"):
        raise RuntimeError("no such kernel")
    record.add("next", 1.0, "ms")
    assert [line.get("error") for line in record.lines] == ["RuntimeError: no such kernel", None]
    assert "FAILED RuntimeError" in record.table()
    with pytest.raises(ValueError, match="unknown sections"):
        main(["--only", "nothing"])


@pytest.mark.slow
def test_it_imports_without_what_the_machine_lacks() -> None:
    """Package, training stages and benchmark, with other extras blocked."""
    script = f"""
import sys
sys.modules.update(dict.fromkeys({MISSING!r}))  # an import of None fails, and find_spec finds nothing
import duologue
from duologue.training import chat, flow, pretrain, tokenize, tokenizer, vocoder
import benchmarks.gpu.__main__
"""
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
