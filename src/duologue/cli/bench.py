"""`duologue bench NAME`: runs the repository's benchmarks, which are not part of the installed package."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from duologue.cli.parser import add_command, add_group

EXAMPLES = ("duologue bench latency", "duologue bench sessions --sessions 4 --json")
CHECKOUT = Path(__file__).parents[3]


def add(commands: Any) -> None:
    """Adds `bench`, with its benchmarks if this is a checkout of the repository."""
    text = "measure this machine"
    if not (CHECKOUT / "benchmarks" / "commands.py").is_file():
        bench = add_command(commands, "bench", _refuse, text, examples=EXAMPLES)
        bench.add_argument("arguments", nargs=argparse.REMAINDER, help="see the repository")
        return
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    names = add_group(commands, "bench", text, "benches", "NAME", EXAMPLES)
    importlib.import_module("benchmarks.commands").add(names)


def _refuse(args: argparse.Namespace) -> None:
    raise ValueError(
        "duologue bench needs a checkout of the repository with `pip install -e .`: the benchmarks are not installed"
    )
