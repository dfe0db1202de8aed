"""`duologue train` and `duologue plot`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from duologue.cli.parser import add_command, add_device
from duologue.training.recipes import STAGES

TRAIN_EXAMPLES = (
    "duologue train tokenizer --recipe recipes/pocket/tokenizer.yaml",
    "duologue train chat --recipe recipes/pocket/chat.yaml --set loop.num_steps=20",
)
PLOT_EXAMPLES = ("duologue plot runs/tokenizer",)


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
    add_device(train)

    plot = add_command(commands, "plot", _plot, "plot the curves of a training run", examples=PLOT_EXAMPLES)
    plot.add_argument("folder", type=Path, help="folder of the run")
    plot.add_argument("-o", "--output", type=Path, help="the plot (default: curves.png in the folder)")


def _train(args: argparse.Namespace) -> None:
    from duologue.training.recipes import train

    trained = train(args.stage, args.recipe, args.out, args.set, args.device, args.ray)
    if args.json:
        print(json.dumps({"stage": trained.stage, "folder": str(trained.folder), "metrics": trained.metrics}))
    else:
        print(f"{trained.stage}: {', '.join(f'{k} {v:.4g}' for k, v in trained.metrics.items())} -> {trained.folder}")


def _plot(args: argparse.Namespace) -> None:
    from duologue.training.curves import plot

    picture = plot(args.folder, args.output)
    print(json.dumps({"picture": str(picture)}) if args.json else picture)
