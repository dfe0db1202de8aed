"""From a stage's name and a recipe file to a training.

A recipe is YAML that is read as data into the frozen dataclass of its stage. An unknown key is an error, and nothing is
executed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.config import parse_config, parse_value, read_yaml, to_mapping, write_json
from duologue.training.tracking import RECIPE_FILE, record_start

if TYPE_CHECKING:  # torch is not needed to name the stages
    from duologue.training.dry_run import RunCost
    from duologue.training.loop import LoopConfig, TrainingStage

STAGES = {
    "tokenizer": "speech recognition through a vector quantizer",
    "tokens": "an audio corpus becomes a token corpus, by the frozen tokenizer",
    "interleave": "text with spans that a text-to-token model speaks, a token corpus",
    "recognizer": "a smaller recognizer for a frozen tokenizer, distilled from a larger one",
    "vocoder": "mel -> wave, against discriminators",
    "flow": "speech tokens -> mel",
    "voice": "a new voice for a trained model, from recordings of one speaker",
    "pretrain": "the language model, stage 1: speech and text become one language",
    "text-to-token": "a text-to-token model, which reads the text of another model aloud",
    "chat": "the language model, stage 2: spoken questions are answered aloud",
}


# Steps that make a token corpus: module, recipe and function.
CORPUS_STEPS = {
    "tokens": ("tokenize", "TokensRecipe", "run_tokens"),
    "interleave": ("synthetic", "InterleaveRecipe", "run_interleave"),
}


@dataclass(frozen=True)
class Trained:
    """Result of a run of a stage.

    Attributes:
        folder: folder of the finished component, or of the token corpus.
        metrics: the last evaluation; counts for a token corpus.
    """

    stage: str
    folder: Path
    metrics: dict[str, float]


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, with `section.key=value` overrides applied; values are read as YAML.

    Raises:
        ValueError: the file is not plain YAML, or an override does not have that form.
    """
    recipe = read_yaml(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise ValueError(f"{override!r} is no setting; write it like loop.num_steps=20")
        inner = recipe
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{override!r}: {name!r} in {path} holds {inner!r}, which has no keys")
        inner[names[-1]] = parse_value(text)
    return recipe


def train(
    stage: str,
    recipe: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    ray: str = "",
) -> Trained:
    """Runs a stage to its end, resuming from its last checkpoint.

    Args:
        stage: one of `STAGES`.
        recipe: the YAML file.
        out: folder of the run; "runs/<stage>" by default. `tokens` and `interleave` write where their recipes say.
        overrides: see `read_recipe`.
        ray: address of a Ray cluster for `tokens` or `interleave`, see `cluster.run_on_ray`.

    Raises:
        ValueError: unknown stage, a recipe that is not as its dataclass describes, a corpus or model that is missing or
            made with another tokenizer.
    """
    if stage not in STAGES:
        raise ValueError(f"there is no stage {stage!r}; the stages are {', '.join(STAGES)}")
    mapping = read_recipe(recipe, overrides)
    if stage in CORPUS_STEPS:
        if out is not None:
            mapping["out"] = str(out)
        return _make_corpus(stage, mapping, str(recipe), device, ray)
    if ray:
        makers = " and ".join(CORPUS_STEPS)
        raise ValueError(f"stage {stage!r} does not run on Ray; {makers} do. Use torchrun for several processes")
    folder = Path(out) if out is not None else Path("runs") / stage
    from duologue.training.loop import run

    made, loop, parsed = _make(stage, mapping, str(recipe))
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(folder / RECIPE_FILE, {"stage": stage, **to_mapping(parsed)})
        record_start(folder, to_mapping(parsed))
    return Trained(stage, folder / "final", run(made, loop, folder, device))


def estimate(stage: str, recipe: str | Path, overrides: Sequence[str] = (), device: str = "cpu") -> RunCost:
    """Returns what a training would cost, from a few of its steps; nothing is written.

    Raises:
        ValueError: as `train`, or the stage makes a corpus.
    """
    if stage not in STAGES or stage in CORPUS_STEPS:
        raise ValueError(f"stage {stage!r} has no optimizer steps to try")
    from duologue.training.dry_run import dry_run

    made, loop, _ = _make(stage, read_recipe(recipe, overrides), str(recipe))
    return dry_run(made, loop, device)


def _make(name: str, mapping: dict[str, Any], where: str) -> tuple[TrainingStage, LoopConfig, object]:
    """Stage, loop and recipe. The stage's libraries are imported here: others may need an extra that is missing."""
    words = name.split("-")
    module, title = importlib.import_module(f"duologue.training.{'_'.join(words)}"), "".join(map(str.capitalize, words))
    recipe: Any = parse_config(getattr(module, f"{title}Recipe"), mapping, where)
    return getattr(module, f"{title}Stage")(recipe), recipe.loop, recipe


def _make_corpus(stage: str, mapping: dict[str, Any], where: str, device: str, ray: str) -> Trained:
    name, recipe_name, function = CORPUS_STEPS[stage]
    module = importlib.import_module(f"duologue.training.{name}")
    recipe = parse_config(getattr(module, recipe_name), mapping, where)
    manifest = getattr(module, function)(recipe, device, ray)
    counts = ("num_samples", "num_text_tokens", "num_speech_tokens")
    return Trained(stage, Path(recipe.out), {name: float(getattr(manifest, name)) for name in counts})
