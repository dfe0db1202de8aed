"""Pocket's recipe from nothing to an evaluated model folder, every step for moments, and where it stopped."""

import importlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

import duologue
from duologue.config import parse_config
from duologue.language.backbone import load_language, load_provenance
from duologue.training.pretrain import Mixture
from duologue.training.recipes import read_recipe
from duologue.vocabulary import Vocabulary
from recipes.pocket import run
from recipes.pocket.run import FURTHER, main, steps
from recipes.pocket.synthesis import STYLE_NAMES
from recipes.pocket.take_apart import PLACES, take_apart
from recipes.pocket.text import main as write_vocabulary

PROGRAMS = ("flite", "espeak-ng", "text2wave")


def run_here(command: Sequence[str]) -> int:
    """Runs `-m MODULE ARGUMENTS` in this process, which imports torch once for all steps."""
    _, module, *arguments = command
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        return int(importlib.import_module(module).main() or 0)


@pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="the synthesizers are not installed")
@pytest.mark.slow
def test_every_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(run, "run_python", run_here)
    assert main(["--smoke", "--workers", "1"]) == 0, capfd.readouterr().err[-3000:]
    capfd.readouterr()
    assert main(["--list"]) == 0
    assert capfd.readouterr().out.split() == [word for step in steps(1, 1, 1) for word in ("done", step.name)]
    assert main(["--smoke"]) == 0
    assert "---" not in capfd.readouterr().out  # nothing is done twice
    bot = duologue.load(tmp_path / "runs" / "pocket" / "pocket")
    assert bot.chat(text="Hello").audio.size


def test_a_step_that_fails_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in steps(1, 1, 1):
        if step.name == "vocabulary":
            break
        step.done.parent.mkdir(parents=True, exist_ok=True)
        step.done.touch()
    (run.RUNS / "texts.txt").write_bytes(b"\xff")  # not UTF-8
    assert main([]) == 1
    assert "vocabulary stopped with exit code 1" in capfd.readouterr().err


def without_styles(pocket: Path, copy: Path) -> Path:
    """A copy of pocket with the vocabulary that it had before it knew styles."""
    shutil.copytree(pocket, copy)
    file = copy / "vocabulary" / "vocabulary.json"
    settings = json.loads(file.read_text())
    del settings["styles"]
    file.write_text(json.dumps(settings))
    return copy


def test_a_trained_model_is_trained_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pocket = without_styles(Path(duologue.__file__).parent / "pocket", tmp_path / "pocket")
    wanted = steps(1, 1, 1, further=str(pocket))
    assert [step.name for step in wanted[:4]] == ["take-apart", "free", "words", "dialogues"]
    assert not {"tokenizer", "vocoder", "pretrain"} & {step.name for step in wanted}
    take_apart(pocket, run.RUNS)
    assert wanted[0].done.exists()
    for part, place in PLACES.items():
        assert {file.name for file in (pocket / part).iterdir()} == {file.name for file in (run.RUNS / place).iterdir()}
    vocabulary = Vocabulary.load(run.RUNS / "vocabulary")
    assert set(vocabulary.config.styles) == set(STYLE_NAMES)
    language = run.RUNS / "pretrain/final/language"
    assert load_provenance(language).vocabulary == vocabulary.hash
    rows = load_language(language).get_input_embeddings().weight
    for style, words in (("softer", " softer"), ("higher2", " even higher")):
        assert torch.equal(rows[vocabulary.config.styles[style]], rows[vocabulary.encode_text(words)].mean(0))
    for name, start in (("chat", "pretrain/final/language"), ("flow-voice", "flow/final")):
        recipe = yaml.safe_load((run.RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        assert recipe["start_from"] == str(run.RUNS / start)
        changed = read_recipe(run.RECIPES / f"{name}.yaml", FURTHER[name].split()[1:])
        assert changed["loop"]["num_steps"] < recipe["loop"]["num_steps"]
    changed = read_recipe(run.RECIPES / "chat.yaml", FURTHER["chat"].split()[1:])
    assert parse_config(Mixture, changed["mixture"]).tts == 0.35
    with pytest.raises(ValueError, match="nowhere has no tokenizer"):
        take_apart(Path("nowhere"), run.RUNS)


def test_the_vocabulary_has_the_codes_of_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one and two is three\n", encoding="utf-8")
    write_vocabulary(["--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "v"), "--vocab-size", "320"])
    recipe = yaml.safe_load((run.RECIPES / "tokenizer.yaml").read_text(encoding="utf-8"))
    assert Vocabulary.load(tmp_path / "v").codebook_size == recipe["tokenizer"]["quantizer"]["codebook_size"]
