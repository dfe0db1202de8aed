"""All of pocket, from nothing to the folder that ships: corpus, vocabulary, trainings, evaluation.

    python -m recipes.pocket.run [--hours 100] [--turns 72000] [--workers 2] [--device cuda] [--list] [--smoke]
        [--carry-over src/duologue/pocket | --further src/duologue/pocket --seed 2]

It can be stopped and started again at any time: finished steps are skipped, and a training resumes from its last
checkpoint. All results are under `runs/pocket`; delete a step's folder to repeat the step. `--smoke` runs every step
for moments on minimal data. It shows whether everything works on this machine, and the tests use it. `--carry-over`
starts flow and language model from those of a trained pocket with another tokenizer, see `carry_over.py`. `--further`
trains a pocket on with its own tokenizer, on a corpus of another seed: hours in place of a day.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RUNS = Path("runs/pocket")
RECIPES = Path(__file__).parent
ROOT = RECIPES.parent.parent
WORD_HOURS = 6.0  # of random words in the voices that ask, and half as many in the voice of the replies


@dataclass(frozen=True)
class Step:
    """One Python command, and the file that exists once it has finished."""

    name: str
    command: tuple[str, ...]
    done: Path


def steps(hours: float, turns: int, workers: int, seed: int = 1, carry_over: str = "", further: str = "") -> list[Step]:
    """All steps in order.

    Args:
        seed: of what the training hears; the test is always the same.
        carry_over: folder of a trained pocket whose flow and language model are the start; empty for random weights.
        further: folder of a trained pocket whose training goes on, with its tokenizer; empty for a training from
            nothing.
    """
    corpus, texts, writing = RUNS / "corpus", RUNS / "texts.txt", RUNS / "writing"
    vocabulary, pocket, report = RUNS / "vocabulary", RUNS / "pocket", RUNS / "evaluation"
    whisper = RUNS / "parts" / "whisper-tiny.en"
    evaluate = ("evaluate", "pocket", "--model", pocket, "--data", corpus / "test", "-o", report)
    learn_text = ("recipes.pocket.text", "--texts", texts, "--out", vocabulary)
    make = ("recipes.pocket.corpus", "--out", corpus, "--workers", workers, "--only")
    carried = RUNS / "carried"
    if carry_over:
        carry = ("recipes.pocket.carry_over", "--model", carry_over, "--runs", RUNS)
        flow = [_step("carry-over", carried / "language" / "siblings.json", *carry)]
        pretrain = []
    else:
        flow = [_train("flow", "flow", RUNS / "flow" / "final" / "flow" / "config.json")]
        pretrain = [_train("pretrain", "pretrain", RUNS / "pretrain" / "final" / "language" / "siblings.json")]
    from_carried = ("--set", f"start_from={carried}") if carry_over else ()
    from_carried_language = ("--set", f"start_from={carried / 'language'}") if carry_over else ()
    take_apart = ("recipes.pocket.take_apart", "--model", further, "--runs", RUNS)
    all_steps = [
        _step("free", corpus / "free" / "done", *make, "free", "--hours", hours, "--seed", seed),
        _step("words", corpus / "words" / "done", *make, "words", "--hours", WORD_HOURS, "--seed", seed),
        _step("valid", corpus / "valid-unseen" / "done", *make, "valid"),
        _step("dialogues", corpus / "dialogues" / "done", *make, "dialogues", "--turns", turns, "--seed", seed),
        _step("test", corpus / "test" / "done", *make, "test"),
        _step("writing", writing / "facts.txt", "recipes.pocket.writing", "--out", writing),
        _step("texts", texts, "recipes.pocket.corpus", "--texts", texts),
        _step("vocabulary", vocabulary / "vocabulary.json", *learn_text),
        _step("whisper", whisper / "config.json", "recipes.pocket.whisper", "--out", whisper),
        _train("tokenizer", "tokenizer", RUNS / "tokenizer" / "final" / "recognizer" / "config.json"),
        _step("freeze", RUNS / "frozen" / "recognizer" / "config.json", "recipes.pocket.freeze"),
        _train("vocoder", "vocoder", RUNS / "vocoder" / "final" / "vocoder" / "config.json"),
        *flow,
        _train("flow-voice", "flow", RUNS / "flow-voice" / "final" / "flow" / "config.json", *from_carried),
        _train("tokens", "tokens", RUNS / "tokens" / "manifest.json"),
        _train("recognizer", "recognizer", RUNS / "recognizer" / "final" / "recognizer" / "config.json"),
        *pretrain,
        _train("chat", "chat", RUNS / "chat" / "final" / "language" / "siblings.json", *from_carried_language),
        _step("assemble", pocket / "duologue.json", "recipes.pocket.assemble", "--out", pocket),
        _step("evaluate", report / "done", "duologue.cli", *evaluate),
    ]
    if not further:
        return all_steps
    first = _step("take-apart", RUNS / "pretrain" / "final" / "language" / "siblings.json", *take_apart)
    return [first, *(step for step in all_steps if step.name not in IN_THE_POCKET)]


def _step(name: str, done: Path, *command: object) -> Step:
    return Step(name, ("-m", *map(str, command)), done)


def _train(name: str, stage: str, done: Path, *options: str) -> Step:
    recipe = RECIPES / f"{name}.yaml"
    return _step(name, done, "duologue.cli", "train", stage, "--recipe", recipe, "--out", RUNS / name, *options)


_MOMENT = "loop.num_steps=2 loop.warmup_steps=1 loop.evaluate_every=2 loop.sample_every=2"
_FEW = "num_rows=2 num_valid_rows=1"
# What `--smoke` adds to the command of a step.
SMOKE = {
    "free": "--hours 0.06 --programs-only",
    "words": "--hours 0.02 --programs-only",
    "valid": "--valid-clips 6 --programs-only",
    "dialogues": "--turns 60 --programs-only",
    "test": "--test-turns 12 --programs-only",
    "writing": "--dialogues 60",
    "vocabulary": "--codebook-size 64 --vocab-size 400",
    "whisper": "--random",
    "tokenizer": f"""--set {_MOMENT} batch_s=10 valid=[] num_valid_clips=2 quantize_from=0.5 kmeans_batches=1
        tokenizer.encoder.num_layers=1 tokenizer.quantizer.codebook_size=64""",
    "freeze": "--max-wer 1000 --min-usage 0",
    "vocoder": f"""--set {_MOMENT} vocoder.width=16 vocoder.ffn_dim=32 vocoder.num_layers=1 batch_size=2
        adversarial_from=0.5 adversarial_warmup=0""",
    "flow": f"""--set {_MOMENT} flow.encoder.width=16 flow.encoder.num_heads=2 flow.encoder.ffn_dim=32
        flow.encoder.num_layers=1 flow.estimator.width=16 flow.estimator.num_heads=2 flow.estimator.ffn_dim=32
        flow.estimator.num_layers=1 batch_s=10 num_valid_clips=2 num_generated=1""",
    "flow-voice": f"--set {_MOMENT} batch_s=10 num_valid_clips=2 num_generated=1",
    "tokens": "--set variants=1",
    "recognizer": f"--set {_MOMENT} decoder_layers=[0] batch_s=10 num_valid_clips=2",
    "pretrain": f"""--set {_MOMENT} {_FEW} language.width=32 language.num_heads=2 language.head_dim=16
        language.ffn_dim=64""",
    "chat": f"--set {_MOMENT} {_FEW} num_questions=2",
    # A model that has learned nothing talks until it may not go on, and its noise takes a recognizer minutes.
    "assemble": "--max-tokens 60",
    "evaluate": "--limit 2",
}


# Steps that a trained pocket makes unnecessary.
IN_THE_POCKET = {
    *("valid", "texts", "vocabulary", "whisper", "tokenizer", "freeze", "vocoder", "flow", "recognizer", "pretrain")
}
# What `--further` adds: shorter trainings at lower rates, and more reading aloud, which is learned last.
FURTHER = {
    "flow-voice": "--set loop.num_steps=1600 loop.learning_rate=1e-3",
    "tokens": "--set variants=1",
    "chat": """--set loop.num_steps=2400 loop.learning_rate=6e-4 loop.optimizer=muon loop.average_decay=0.998
        loop.evaluate_every=800
        mixture={"asr":0.45,"tts":0.35,"woven":0.0,"spans":0.0,"speech":0.0,"text":0.0,"written":0.2}""",
}


# What `--device cuda` adds: trainings by the clock, with batches that fill a GPU and processes that fill the batches.
# No run with these has been made yet.
CUDA = {
    "tokenizer": "--set batch_s=440 augment.opus_probability=0.0 loop.minutes=4 loop.num_workers=13",
    "vocoder": "--set batch_size=48 loop.minutes=4 loop.num_workers=2",
    "flow": "--set batch_s=400 loop.minutes=1 loop.num_workers=6",
    "flow-voice": "--set batch_s=400 loop.minutes=2 loop.num_workers=6",
    "recognizer": "--set batch_s=2000 loop.minutes=1 loop.num_workers=4",
    "pretrain": "--set num_rows=64 loop.minutes=1 loop.num_workers=12",
    "chat": "--set num_rows=64 loop.minutes=3 loop.num_workers=12",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=100.0, help="of free speech for the tokenizer")
    parser.add_argument("--turns", type=int, default=72000, help="spoken questions with their answers")
    parser.add_argument("--workers", type=int, default=2, help="processes that synthesize")
    parser.add_argument("--device", default="cpu", help="of the trainings; cuda trains by the clock, see CUDA here")
    parser.add_argument("--smoke", action="store_true", help="run every step for moments on next to nothing")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not")
    parser.add_argument("--seed", type=int, default=1, help="of what the training hears")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--carry-over", default="", metavar="FOLDER", help="start from this pocket, with a new tokenizer"
    )
    start.add_argument("--further", default="", metavar="FOLDER", help="train this pocket on, with its tokenizer")
    args = parser.parse_args(arguments)
    for step in steps(args.hours, args.turns, args.workers, args.seed, args.carry_over, args.further):
        if args.list:
            print(f"{'done' if step.done.exists() else 'to do':6}{step.name}")
            continue
        if step.done.exists():
            continue
        command = [*step.command, *_options(step, args.device, args.smoke, bool(args.further))]
        print(f"--- {step.name}: python {' '.join(command)}", flush=True)
        if result := run_python(command):
            print(f"{step.name} stopped with exit code {result}; mend it and run this again", file=sys.stderr)
            return result
        step.done.parent.mkdir(parents=True, exist_ok=True)
        if not step.done.exists():
            step.done.touch()
    return 0


def run_python(command: Sequence[str]) -> int:
    """Runs Python with these arguments in a process of its own and returns the exit code."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def _options(step: Step, device: str, smoke: bool, further: bool) -> list[str]:
    """What this run adds to the command of a step."""
    added = SMOKE.get(step.name, "").split() if smoke else []
    if further and not smoke:
        added += FURTHER.get(step.name, "").split()
    if device != "cpu" and "train" in step.command:
        added += [*("--device", device), *(() if smoke else CUDA.get(step.name, "").split())]
    return added


if __name__ == "__main__":
    sys.exit(main())
