"""`duologue evaluate`: evaluates a chatbot on a held-out test set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.cli.parser import Parser, add_command, positive, warn_if_untrained
from duologue.machine import version_of

if TYPE_CHECKING:
    from duologue.evaluation.report import Report
    from duologue.evaluation.testset import TestSet
    from duologue.models import Card

TEST_DATA = "runs/pocket/corpus/test"


def add(commands: Any) -> None:
    text = "evaluate a chatbot on a held-out test set"
    evaluate: Parser = commands.add_parser("evaluate", help=text, description=text[0].upper() + text[1:] + ".")
    suites = evaluate.add_subparsers(title="suites", metavar="SUITE", required=True, parser_class=Parser)

    pocket = _add(suites, "pocket", _pocket, "the whole chatbot and its parts")
    pocket.add_argument(
        "--recognizer", type=Path, help="the tokenizer's recognition head (default: recognizer/ in the model)"
    )
    pocket.add_argument("--limit", type=positive, metavar="N", help="evaluate only N dialogues")


def _add(suites: Any, name: str, evaluate: Callable[[argparse.Namespace, TestSet], Report], text: str) -> Parser:
    suite = add_command(suites, name, _evaluate, text, model=True)
    suite.set_defaults(suite=name, evaluate=evaluate)
    suite.add_argument(
        "--data", type=Path, default=Path(TEST_DATA), help=f"folder of the test set (default: {TEST_DATA})"
    )
    suite.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="folder for the results, as JSON and plots")
    return suite


def _evaluate(args: argparse.Namespace) -> None:
    from duologue.evaluation.report import format_table
    from duologue.evaluation.testset import load_test_set

    report = args.evaluate(args, load_test_set(args.data))
    written = report.save(args.output, args.suite) if args.output is not None else []
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        print(format_table(report))
        for path in written:
            print(f"-> {path}")


def _pocket(args: argparse.Namespace, test_set: TestSet) -> Report:
    from duologue.conversation.chatbot import load, model_folder
    from duologue.evaluation.pocket import evaluate_pocket
    from duologue.models import read_recognizer

    test_set = test_set.limited(args.limit)
    folder = model_folder(args.model)
    head = args.recognizer if args.recognizer is not None else folder / "recognizer"
    recognizer = None
    if args.recognizer is not None or head.is_dir():
        recognizer = read_recognizer(head).to(args.device)
    bot = load(folder, args.device)
    warn_if_untrained(bot.models.card)
    model = _about(folder, bot.models.card, ("tokenizer", "vocabulary", "language", "decoder"))
    settings = {"num_dialogues": len(test_set.dialogues), "version": version_of("duologue")}
    return evaluate_pocket(bot, test_set, recognizer, model=model, settings=settings)


def _about(folder: Path, card: Card, parts: tuple[str, ...]) -> dict[str, Any]:
    from duologue.checkpoint import file_hash

    return {"name": card.name, "trained": card.trained, "hashes": {part: file_hash(folder / part) for part in parts}}
