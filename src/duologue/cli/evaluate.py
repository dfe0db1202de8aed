"""`duologue evaluate`: evaluates a chatbot on a held-out test set or a public benchmark."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.cli.benchmarks import RECOGNIZER_HELP, add_benchmarks, compare_runs
from duologue.cli.conversation import add_conversation
from duologue.cli.parser import Parser, add_command, add_group, positive, warn_if_untrained
from duologue.machine import version_of

if TYPE_CHECKING:
    from duologue.evaluation.conversations import ScoredExchange
    from duologue.evaluation.report import Report
    from duologue.evaluation.testset import TestSet
    from duologue.models import Card

    Result = tuple[Report, Sequence[ScoredExchange]]  # and what the page of players shows

TEST_DATA = "runs/pocket/corpus/test"
EXAMPLES = (
    "duologue evaluate pocket -o report",
    "duologue evaluate voicebench --data FOLDER --limit 100",
    "duologue evaluate --compare runs/a runs/b",
)
POCKET_EXAMPLES = ("duologue evaluate pocket -o report", "duologue evaluate pocket --limit 20 --json")
VOICE_EXAMPLES = (
    "duologue evaluate voice --model runs/voice/final/model --before pocket --data runs/my-voice/corpus -o report",
)
RESULTS = "report"  # report.json, report.png, report.html


def add(commands: Any) -> None:
    text = "evaluate a chatbot on a test set or a public benchmark, or compare two runs"
    suites = add_group(commands, "evaluate", text, "suites", "SUITE", EXAMPLES)
    evaluate: Parser = commands.choices["evaluate"]
    evaluate.set_defaults(run=compare_runs)
    evaluate.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="folders of two runs: is B better, item by item?"
    )

    pocket = _add(suites, "pocket", _pocket, "the whole chatbot and its parts")
    pocket.add_argument("--limit", type=positive, metavar="N", help="evaluate only N dialogues and variants")
    pocket.add_argument(
        "--single-questions",
        type=positive,
        metavar="N",
        help="single questions answered in writing (default: as many as dialogues)",
    )
    pocket.add_argument(
        "--players", type=positive, default=60, metavar="N", help="questions at most on the page (default: 60)"
    )
    add_benchmarks(suites)
    add_conversation(suites)
    _add_voice(suites)


def _add_voice(suites: Any) -> None:
    text = "a voice beside recordings of its speaker"
    voice = add_command(suites, "voice", _voice, text, model=True, examples=VOICE_EXAMPLES)
    voice.add_argument("--before", metavar="MODEL", help="model without the voice, to compare")
    voice.add_argument("--data", type=Path, required=True, help="audio corpus; its validation clips are spoken")
    voice.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="of the report and its page")
    voice.add_argument("--recognizer", type=Path, metavar="FOLDER", help=RECOGNIZER_HELP)
    voice.add_argument(
        "--speaker-model", type=Path, metavar="FILE", help="ONNX file of a speaker embedder, for likeness"
    )
    voice.add_argument("--limit", type=positive, default=20, metavar="N", help="clips at most (default: 20)")


def _add(suites: Any, name: str, evaluate: Callable[[argparse.Namespace, TestSet], Result], text: str) -> Parser:
    suite = add_command(suites, name, _evaluate, text, model=True, examples=POCKET_EXAMPLES)
    suite.set_defaults(suite=name, evaluate=evaluate)
    suite.add_argument(
        "--data", type=Path, default=Path(TEST_DATA), help=f"folder of the test set (default: {TEST_DATA})"
    )
    suite.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="write report.json, report.png and report.html there"
    )
    suite.add_argument(
        "--recognizer",
        type=Path,
        metavar="FOLDER",
        help=RECOGNIZER_HELP,
    )
    return suite


def _evaluate(args: argparse.Namespace) -> None:
    from duologue.evaluation.page import write_page
    from duologue.evaluation.report import format_table
    from duologue.evaluation.testset import load_test_set

    report, shown = args.evaluate(args, load_test_set(args.data))
    written = report.save(args.output, RESULTS) if args.output is not None else []
    if args.output is not None and shown:
        written.append(write_page(args.output, report, shown))
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        print(format_table(report))
        for path in written:
            print(f"-> {path}")


def _pocket(args: argparse.Namespace, test_set: TestSet) -> Result:
    from duologue.conversation.chatbot import load, model_folder
    from duologue.evaluation.bundled import NUM_VARIANTS
    from duologue.evaluation.pocket import evaluate_pocket
    from duologue.evaluation.recognition import open_recognizer

    singles = test_set.limited(args.single_questions or args.limit)
    test_set = test_set.limited(args.limit)
    recognizer, why_not = open_recognizer(args.recognizer)
    folder = model_folder(args.model)
    bot = load(folder, args.device)
    warn_if_untrained(bot.models.card)
    settings = {"num_dialogues": len(test_set.dialogues), "version": version_of("duologue")}
    evaluated = evaluate_pocket(
        bot,
        test_set,
        singles,
        recognizer,
        why_not,
        model=_about(folder, bot.models.card, ("tokenizer", "vocabulary", "language", "decoder")),
        settings=settings,
        num_players=args.players,
        num_variants=min(NUM_VARIANTS, args.limit or NUM_VARIANTS),
    )
    return evaluated.report, evaluated.shown


def _voice(args: argparse.Namespace) -> None:
    from duologue.evaluation.page import write_rows
    from duologue.evaluation.recognition import open_recognizer
    from duologue.evaluation.report import format_table
    from duologue.evaluation.voices import VoiceJudges, evaluate_voice

    judges = VoiceJudges.open(*open_recognizer(args.recognizer), args.speaker_model)
    report, shown = evaluate_voice(args.model, args.before, args.data, judges, args.limit, args.device)
    written = [*report.save(args.output, RESULTS), write_rows(args.output, report, shown, len(shown))]
    if args.json:
        print(json.dumps(report.to_json()))
        return
    print(format_table(report))
    for path in written:
        print(f"-> {path}")


def _about(folder: Path, card: Card, parts: tuple[str, ...]) -> dict[str, Any]:
    from duologue.checkpoint import file_hash

    return {"name": card.name, "trained": card.trained, "hashes": {part: file_hash(folder / part) for part in parts}}
