"""`duologue bench NAME`: runs the repository's benchmarks, which are not part of the installed package."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from duologue.cli.parser import Parser

CHECKOUT = Path(__file__).parents[3]


def add(commands: Any) -> None:
    """Adds `bench`, with its benchmarks if this is a checkout of the repository."""
    text = "measure this machine"
    bench: Parser = commands.add_parser("bench", help=text, description=text[0].upper() + text[1:] + ".")
    if not (CHECKOUT / "benchmarks" / "commands.py").is_file():
        bench.add_argument("arguments", nargs=argparse.REMAINDER, help="see the repository")
        bench.set_defaults(run=_refuse)
        return
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    names = bench.add_subparsers(title="benches", metavar="NAME", required=True, parser_class=Parser)
    importlib.import_module("benchmarks.commands").add(names)


def _refuse(args: argparse.Namespace) -> None:
    raise ValueError(
        "duologue bench needs a checkout of the repository with `pip install -e .`: the benchmarks are not installed"
    )
