"""Keeping track of trainings: what a run was made of, what runs differ in, what one will cost."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duologue import machine
from duologue.cli import main
from duologue.config import read_json, to_mapping
from duologue.sound_files import save_audio
from duologue.training.log import RunLog
from duologue.training.loop import LoopConfig, run
from duologue.training.pretrain import PretrainRecipe, PretrainStage
from duologue.training.runs import changed_settings, read_run
from duologue.training.tracking import data_hash
from tests.tiny_language import small_corpus

LOOP = LoopConfig(2, 1e-2, warmup_steps=1, precision="fp32", evaluate_every=2, sample_every=10**6, log_every=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and two runs of it with other learning rates."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = small_corpus(folder, PretrainRecipe, loop=LOOP)
    (folder / "recipe.yaml").write_text(json.dumps(to_mapping(recipe)))
    for name, rate in (("slow", 0.001), ("fast", 0.01)):
        assert train(folder, "--out", str(folder / name), "--set", f"loop.learning_rate={rate}") == 0
    return folder


def train(folder: Path, *arguments: str) -> int:
    return main(["train", "pretrain", "--recipe", str(folder / "recipe.yaml"), *arguments])


def test_a_run_says_what_it_was_made_of(folder: Path) -> None:
    assert train(folder, "--out", str(folder / "slow"), "--set", "loop.learning_rate=0.001", "loop.num_steps=3") == 0
    first, second = read_json(folder / "slow" / "run.json")["starts"]
    assert first["commit"] == machine.source_commit()
    assert first["machine"]["torch"] == machine.version_of("torch")
    assert set(first["data"]) == {"corpus", "vocabulary"}
    assert first["data"] == second["data"]
    assert first["data"]["corpus"] == data_hash(folder / "tokens")
    assert first["command"]


def test_the_hash_of_data_follows_its_content(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "x.json"
    hashes = []
    for content in ("one", "two", "three"):
        file.write_text(content)
        hashes.append((data_hash(tmp_path / "a"), data_hash(file)))
    assert len(set(hashes)) == 3
    file.write_text("one")
    assert (data_hash(tmp_path / "a"), data_hash(file)) == hashes[0]
    file.rename(file.with_name("y.json"))
    assert data_hash(tmp_path / "a") != hashes[0][0]


def test_runs_beside_each_other(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "curves.png"
    folders = [str(folder / name) for name in ("slow", "fast")]
    capsys.readouterr()
    assert main(["runs", *folders, "-o", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["|", "|", "slow", "|", "fast", "|"]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert cells["stage"] == ["pretrain", "pretrain"]
    assert cells["loop.learning_rate"] == ["0.001", "0.01"]
    assert "length" not in cells
    final = read_run(folder / "fast").final["valid/asr/text_nll"]
    assert cells["valid/asr/text_nll"][1] == f"{final:.4g}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["--json", "runs", *folders]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["changed"]["loop.learning_rate"] == [0.001, 0.01]
    assert printed["runs"][1]["final"]["valid/asr/text_nll"] == final
    assert main(["runs", str(tmp_path)]) == 2
    assert "log.csv does not exist: give the folder of a training run" in capsys.readouterr().err


def test_pauses_are_no_training_and_changed_data_shows(folder: Path) -> None:
    log = folder / "fast" / "log.csv"
    head, *lines = log.read_text().splitlines()
    # A line every 36 s, whatever the machine needed.
    timed = [f"{line.rsplit(',', 1)[0]},{1000 + 36 * number}" for number, line in enumerate(lines)]
    log.write_text("\n".join([head, *timed]) + "\n")
    slow, fast = (read_run(folder / name) for name in ("slow", "fast"))
    assert fast.hours == pytest.approx((len(lines) - 1) / 100)
    assert not [name for name in changed_settings([fast, fast]) if name]
    last = log.read_text().splitlines()[-1].split(",")
    with log.open("a") as file:
        file.write(f"3,text,1.0,{float(last[3]) + 7200}\r\n")
    assert read_run(folder / "fast").hours == pytest.approx(fast.hours)
    path = folder / "fast" / "run.json"
    record = read_json(path)
    record["starts"][-1]["data"]["corpus"] = "0" * 64
    path.write_text(json.dumps(record))
    changed = changed_settings([slow, read_run(folder / "fast")])
    assert changed["data of corpus"] == [slow.data["corpus"][:12], "0" * 12]


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "run"), "--set", "loop.num_steps=1000")
    capsys.readouterr()
    assert main(["--json", "train", "pretrain", "--recipe", str(folder / "recipe.yaml"), *out, "--dry-run"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    stage = PretrainStage(small_corpus(folder, PretrainRecipe, loop=LOOP))
    num = sum(one.numel() for one in stage.model.parameters())
    assert (cost["num_parameters"], cost["num_trained"], cost["num_steps"]) == (num, num, 1000)
    assert cost["weights_gb"] == pytest.approx(4 * num / 1e9)
    assert cost["optimizer_gb"] == pytest.approx(12 * num / 1e9)
    assert cost["hours"] == pytest.approx(1000 * cost["step_s"] / 3600)
    assert 0.01 < cost["peak_gb"] < 100
    assert train(folder, "--dry-run") == 0
    assert "time" in capsys.readouterr().out
    assert main(["train", "tokens", "--recipe", str(folder / "recipe.yaml"), "--dry-run"]) == 2
    assert "stage 'tokens' has no optimizer steps to try" in capsys.readouterr().err


def test_samples_can_be_heard_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra train)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save_audio(tmp_path / "one.wav", np.zeros(2205, np.float32), 22050)
    log = RunLog(tmp_path, 0)
    log.add_sounds(5, tmp_path)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (sound,) = events.Audio("samples/one")
    assert (sound.step, sound.sample_rate, sound.length_frames) == (5, 22050, 2205)


class FakeWandb(types.ModuleType):
    """Stands for the library; its calls are kept."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def init(self, **settings: Any) -> FakeWandb:
        self.started = settings
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_where_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    asked = ("--out", str(tmp_path / "run"), "--set", "loop.wandb_project=voices")
    assert train(folder, *asked) == 0
    assert (fake.started["project"], fake.started["name"], fake.started["resume"]) == ("voices", "run", "allow")
    assert fake.started["config"]["loop"]["learning_rate"] == 1e-2
    assert [step for step, values in fake.logged if "text" in values] == [1, 2]
    assert any("valid/asr/text_nll" in values for _, values in fake.logged)
    assert fake.finished


def test_weights_and_biases_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    loop = LoopConfig(2, 1e-2, wandb_project="voices")
    stage = PretrainStage(small_corpus(tmp_path, PretrainRecipe, loop=loop))
    with pytest.raises(ValueError, match=r"loop\.wandb_project needs wandb, which is not installed: pip install wandb"):
        run(stage, loop, tmp_path / "run")
