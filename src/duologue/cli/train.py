"""`duologue train`, `duologue plot` and `duologue runs`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from duologue.cli.parser import add_command, add_device
from duologue.training.recipes import STAGES

TRAIN_EXAMPLES = (
    "duologue train tokenizer --recipe recipes/pocket/tokenizer.yaml",
    "duologue train chat --recipe recipes/pocket/chat.yaml --set loop.num_steps=20",
)
PLOT_EXAMPLES = ("duologue plot runs/tokenizer",)
RUNS_EXAMPLES = ("duologue runs runs/chat runs/chat-2 -o curves.png",)


def add(commands: Any) -> None:
    text = "train one part of a chatbot; resumes from the last checkpoint"
    train = add_command(commands, "train", _train, text, examples=TRAIN_EXAMPLES)
    stages = "; ".join(f"{name}: {what}" for name, what in STAGES.items())
    train.add_argument("stage", choices=STAGES, metavar="STAGE", help=stages)
    train.add_argument("--recipe", type=Path, required=True, help="a YAML file, see recipes/")
    train.add_argument("--out", type=Path, help="folder of the run (default: runs/STAGE)")
    train.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override values, such as loop.num_steps=20",
    )
    train.add_argument(
        "--ray",
        default="",
        metavar="ADDRESS",
        help="stages tokens and interleave: Ray cluster whose workers do it, such as auto; local starts one here",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="make a few steps, write nothing, and say what the training would cost"
    )
    add_device(train)

    plot = add_command(commands, "plot", _plot, "plot the curves of a training run", examples=PLOT_EXAMPLES)
    plot.add_argument("folder", type=Path, help="folder of the run")
    plot.add_argument("-o", "--output", type=Path, help="the plot (default: curves.png in the folder)")

    text = "compare training runs: final figures, changed settings, curves"
    runs = add_command(commands, "runs", _runs, text, examples=RUNS_EXAMPLES)
    runs.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="folder of a run")
    runs.add_argument(
        "-o", "--output", type=Path, metavar="PICTURE", help="draw the curves of all runs into one picture"
    )


def _train(args: argparse.Namespace) -> None:
    if args.dry_run:
        _estimate(args)
        return
    from duologue.training.recipes import train

    trained = train(args.stage, args.recipe, args.out, args.set, args.device, args.ray)
    if args.json:
        print(json.dumps({"stage": trained.stage, "folder": str(trained.folder), "metrics": trained.metrics}))
    else:
        print(f"{trained.stage}: {', '.join(f'{k} {v:.4g}' for k, v in trained.metrics.items())} -> {trained.folder}")


def _estimate(args: argparse.Namespace) -> None:
    from duologue.training.recipes import estimate

    cost = estimate(args.stage, args.recipe, args.set, args.device)
    if args.json:
        print(json.dumps(asdict(cost)))
        return
    print(f"parameters     {cost.num_parameters / 1e6:.2f} million, {cost.num_trained / 1e6:.2f} million trained")
    print(f"memory         {cost.weights_gb:.2f} GB of weights, {cost.optimizer_gb:.2f} GB of gradients and optimizer")
    print(f"               {cost.peak_gb:.2f} GB at the highest")
    print(f"steps          {cost.num_steps} of {cost.step_s:.3g} s")
    print(f"time           {cost.hours:.2f} hours, without evaluations")


def _plot(args: argparse.Namespace) -> None:
    from duologue.training.curves import plot

    picture = plot(args.folder, args.output)
    print(json.dumps({"picture": str(picture)}) if args.json else picture)


def _runs(args: argparse.Namespace) -> None:
    from duologue.training.curves import plot_runs
    from duologue.training.runs import changed_settings, read_run, table

    runs = [read_run(folder) for folder in args.folders]
    if args.output is not None:
        plot_runs(args.folders, args.output)
    if args.json:
        listed = [{**asdict(run), "folder": str(run.folder)} for run in runs]
        print(json.dumps({"runs": listed, "changed": changed_settings(runs)}))
    else:
        print(table(runs))
