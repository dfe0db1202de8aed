"""`duologue data check`: every fault is found in a corpus made for it, and a good clip has none."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from duologue.audio import resample
from duologue.cli import main
from duologue.config import read_json
from duologue.pcm import to_int16
from duologue.sound_files import load_audio
from duologue.training.checking import FAULTS, check_corpus
from duologue.training.sources.items import ImportOptions
from duologue.training.sources.writer import import_source

POCKET = Path(__file__).parent.parent / "src" / "duologue" / "pocket"
TEXT = "What is the capital of France?"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spoken question, good and spoiled in every way; each file has the name of its fault."""
    folder = tmp_path_factory.mktemp("check")
    wav, _ = load_audio(POCKET / "question.wav", 16_000)
    sounds: dict[str, tuple[NDArray[np.float32], str]] = {
        "good": (wav, TEXT),
        "silent": (wav * 1e-4, f"{TEXT} One."),
        "clipped": (np.clip(wav * 40, -1, 1), f"{TEXT} Two."),
        "too short": (wav[8000:11200], "is"),
        "too long": (np.tile(wav, 40)[: 16_000 * 31], f"{TEXT} " * 15),
        "narrow band": (resample(resample(wav, 16_000, 8000), 8000, 16_000), f"{TEXT} Three."),
        "text too fast": (wav, f"{TEXT} " * 5),
        "text too slow": (wav, "no"),
        "wrong text": (wav, "My green bird sings every day."),
        "double text": (wav, TEXT),
    }
    for number, (name, (sound, text)) in enumerate(sounds.items()):
        soundfile.write(folder / f"{number} {name}.wav", sound, 16_000, subtype="FLOAT")
        (folder / f"{number} {name}.txt").write_text(text)
    import_source("folder", folder, folder / "corpus", ImportOptions())
    slow = to_int16(resample(wav, 16_000, 8000))
    record = json.loads((folder / "corpus" / "clips-00000.jsonl").read_text().splitlines()[0])
    record |= {"id": "wrong rate", "text": "Other words than before.", "sample_rate": 8000, "num_samples": len(slow)}
    (folder / "corpus" / "clips-00001.jsonl").write_text(json.dumps({**record, "offset": 0}) + "\n")
    slow.tofile(folder / "corpus" / "clips-00001.pcm")
    return folder / "corpus"


def test_every_fault_is_found(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "check", str(corpus), "-o", str(tmp_path), "--recognizer", "pocket"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    faults = {clip["id"].partition(" ")[2].removesuffix(".wav"): clip["faults"] for clip in report["clips"]}
    faults["wrong rate"] = faults.pop("rate")
    assert report["num_clips"] == 11
    assert "good" not in faults
    for fault in FAULTS:
        assert fault in faults[fault], faults
    assert report["faults"]["silent"] == report["faults"]["clipped"] == report["faults"]["wrong rate"] == 1
    assert read_json(tmp_path / "check.json")["faults"] == report["faults"]
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_the_table(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(corpus), "-o", str(tmp_path), "--limit", "4"]) == 0
    out = capsys.readouterr().out
    assert "4 clips" in out
    assert "no recognizer was named" in out
    assert all(fault in out for fault in FAULTS)
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2


def test_errors_are_measured_with_the_recognizer_that_is_given(corpus: Path) -> None:
    report = check_corpus(corpus, transcribe=lambda wav, rate, language: TEXT)
    good = next(clip for clip in report.clips if clip.id.startswith("0 "))
    assert (good.errors, good.heard, good.faults) == (0.0, TEXT, ())
    assert check_corpus(corpus).clips[0].errors is None
