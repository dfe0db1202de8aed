"""All of pocket, from nothing to the folder that ships: corpus, vocabulary, trainings, evaluation.

    python -m recipes.pocket.run [--hours 16] [--turns 40000] [--workers 2] [--from STEP] [--list]

Stop it whenever you like and start it again: a step that is done is passed over, and a training goes on from its last
checkpoint. Everything lies under `runs/pocket`; delete a step's folder to have it made anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RUNS = Path("runs/pocket")
RECIPES = Path("recipes/pocket")


@dataclass(frozen=True)
class Step:
    """One command, and the file that is there once it has come to its end."""

    name: str
    command: tuple[str, ...]
    done: Path


def steps(hours: float, turns: int, workers: int) -> list[Step]:
    """All steps in order."""
    corpus = RUNS / "corpus"
    texts, known = RUNS / "texts.txt", RUNS / "vocabulary" / "vocabulary.json"
    make = ("-m", "recipes.pocket.corpus", "--out", str(corpus), "--workers", str(workers))
    return [
        Step("free", (*make, "--only", "free", "--hours", str(hours)), corpus / "free" / "done"),
        Step("dialogues", (*make, "--only", "dialogues", "--turns", str(turns)), corpus / "dialogues" / "done"),
        Step("test", (*make, "--only", "test"), corpus / "test" / "done"),
        Step(
            "writing", ("-m", "recipes.pocket.writing", "--out", str(RUNS / "writing")), RUNS / "writing" / "facts.txt"
        ),
        Step("texts", ("-m", "recipes.pocket.corpus", "--texts", str(texts)), texts),
        Step(
            "vocabulary", ("-m", "recipes.pocket.text", "--texts", str(texts), "--out", str(RUNS / "vocabulary")), known
        ),
        _train("tokenizer", "tokenizer", "recognizer/config.json"),
        Step("freeze", ("-m", "recipes.pocket.freeze"), RUNS / "frozen" / "recognizer" / "config.json"),
        _train("vocoder", "vocoder", "vocoder/config.json"),
        _train("flow", "flow", "flow/config.json"),
        _train("flow", "flow-voice", "flow/config.json"),
        Step("tokens", _training("tokens", "tokens", RUNS / "tokens"), RUNS / "tokens" / "manifest.json"),
        _train("pretrain", "pretrain", "language/siblings.json"),
        _train("chat", "chat", "language/siblings.json"),
        Step(
            "assemble",
            ("-m", "recipes.pocket.assemble", "--out", str(RUNS / "pocket")),
            RUNS / "pocket" / "duologue.json",
        ),
    ]


def _training(stage: str, recipe: str, out: Path) -> tuple[str, ...]:
    return ("-m", "duologue.cli", "train", stage, "--recipe", str(RECIPES / f"{recipe}.yaml"), "--out", str(out))


def _train(stage: str, name: str, done: str) -> Step:
    return Step(name, _training(stage, name, RUNS / name), RUNS / name / "final" / done)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=16.0, help="of free speech for the tokenizer")
    parser.add_argument("--turns", type=int, default=40000, help="spoken questions with their answers")
    parser.add_argument("--workers", type=int, default=2, help="processes that synthesize")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not")
    args = parser.parse_args(arguments)
    for step in steps(args.hours, args.turns, args.workers):
        if args.list:
            print(f"{'done' if step.done.exists() else 'to do':6}{step.name}")
            continue
        if step.done.exists():
            continue
        print(f"--- {step.name}: python {' '.join(step.command)}", flush=True)
        result = subprocess.run([sys.executable, *step.command], check=False).returncode
        if result:
            print(f"{step.name} stopped with exit code {result}; mend it and run this again", file=sys.stderr)
            return result
        step.done.parent.mkdir(parents=True, exist_ok=True)
        if not step.done.exists():
            step.done.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
