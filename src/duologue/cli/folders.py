"""`duologue convert`, `init-random` and `doctor`: model folders, and what this machine can do with them."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from duologue.cli.parser import DTYPES, FAILED, add_command

RANDOM_PRESETS = ("tiny", "9b")


def add(commands: Any) -> None:
    """Adds `convert`, `init-random` and `doctor`."""
    convert = add_command(commands, "convert", _convert, "a released language model -> a folder for plain transformers")
    convert.add_argument("folder", type=Path, help="the language model's folder, or that of the whole released set")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a new folder")
    convert.add_argument("--dtype", choices=DTYPES, help="of the new weights (default: that of the old ones)")

    random = add_command(
        commands, "init-random", _init_random, "write a released set with random weights, for load tests"
    )
    random.add_argument("preset", choices=RANDOM_PRESETS, metavar="PRESET", help="tiny, or 9b: the published sizes")
    random.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    random.add_argument("--seed", type=int, default=0)

    doctor = add_command(commands, "doctor", _doctor, "what this machine can run, what is missing, and what mends it")
    doctor.add_argument("--model", default="pocket", help="a preset or a model folder (default: pocket)")


def _convert(args: argparse.Namespace) -> None:
    from duologue.released.convert import convert
    from duologue.released.folder import ReleasedFolder

    released = ReleasedFolder.find(args.folder)
    folder = args.folder if released is None else released.language_path
    convert(folder, args.output, args.dtype, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({"folder": str(args.output)}))
    else:
        print(f"{folder} -> {args.output}")


def _init_random(args: argparse.Namespace) -> None:
    from duologue.released.random_weights import init_random

    init_random(args.preset, args.output, args.seed, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({"folder": str(args.output), "preset": args.preset}))
    else:
        print(f"{args.preset}, random weights: what it says means nothing -> {args.output}")


def _doctor(args: argparse.Namespace) -> int:
    from duologue.doctor import State, examine, format_checks

    checks = examine(args.model)
    print(json.dumps([asdict(check) for check in checks]) if args.json else format_checks(checks))
    return FAILED if any(check.state is State.BROKEN for check in checks) else 0
