"""`duologue evaluate`: a chatbot on a held-out test set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from duologue.cli.parser import add_command, positive, say_if_untrained
from duologue.machine import version_of

TEST_DATA = "runs/pocket/corpus/test"


def add(commands: Any) -> None:
    """Adds `evaluate`."""
    evaluate = add_command(commands, "evaluate", _evaluate, "judge a chatbot on a held-out test set", model=True)
    evaluate.add_argument("suite", choices=("pocket",), metavar="SUITE", help="pocket")
    evaluate.add_argument(
        "--data", type=Path, default=Path(TEST_DATA), help=f"folder of the test set (default: {TEST_DATA})"
    )
    evaluate.add_argument(
        "--recognizer", type=Path, help="the tokenizer's recognition head (default: recognizer/ in the model)"
    )
    evaluate.add_argument("--limit", type=positive, metavar="N", help="only N dialogues, for a quick look")
    evaluate.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="write the results there, as JSON and picture"
    )


def _evaluate(args: argparse.Namespace) -> None:
    from duologue.chatbot import load, model_folder
    from duologue.checkpoint import file_hash, load_component
    from duologue.evaluation.pocket import evaluate_pocket
    from duologue.evaluation.report import format_table
    from duologue.evaluation.testset import load_test_set
    from duologue.tokenizer.recognizer import Recognizer, RecognizerConfig

    test_set = load_test_set(args.data).limited(args.limit)
    folder = model_folder(args.model)
    head = args.recognizer if args.recognizer is not None else folder / "recognizer"
    recognizer = None
    if args.recognizer is not None or head.is_dir():
        recognizer = load_component(head, Recognizer, RecognizerConfig).to(args.device)
    bot = load(folder, args.device)
    say_if_untrained(bot.models.card)
    parts = ("tokenizer", "vocabulary", "language", "decoder")
    model = {
        "name": bot.models.card.name,
        "trained": bot.models.card.trained,
        "hashes": {part: file_hash(folder / part) for part in parts},
    }
    settings = {"num_dialogues": len(test_set.dialogues), "version": version_of("duologue")}
    report = evaluate_pocket(bot, test_set, recognizer, model=model, settings=settings)
    written = report.save(args.output, args.suite) if args.output is not None else []
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        print(format_table(report))
        for path in written:
            print(f"-> {path}")
