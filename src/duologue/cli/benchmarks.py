"""The benchmarks of `duologue evaluate`, and the comparison of two runs."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.cli.parser import KEY_VARIABLE, Parser, add_command, positive, warn_if_untrained

if TYPE_CHECKING:
    from duologue.evaluation.asking import Asker
    from duologue.evaluation.judge import ChatJudge
    from duologue.evaluation.report import Report
    from duologue.evaluation.suite import Listener, SuiteSettings

TITLES = {
    "voicebench": "VoiceBench: instructions, facts, choices, safety",
    "openaudiobench": "OpenAudioBench: open questions, facts, reasoning",
    "spoken-qa": "WebQ, LlamaQ and TriviaQA by the paper's rule",
    "urobench": "URO-Bench, tracks basic and pro",
    "big-bench-audio": "Big Bench Audio: reasoning with closed answers",
    "seed-tts-eval": "seed-tts-eval: texts read aloud",
}
RECOGNIZER_HELP = "CTranslate2 folder of a Whisper model (default: whisper-base-ct2 in runs/pocket/parts or runs)"
JUDGE_MODEL = "gpt-4o-mini"  # of most benchmarks


def add_benchmarks(suites: Any) -> None:
    for name, text in TITLES.items():
        command = f"duologue evaluate {name} --data {name}"
        lines = (f"{command} --limit 100", f"{command} --resume")
        suite = add_command(suites, name, _evaluate, text, model=True, examples=lines)
        suite.set_defaults(suite=name)
        suite.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of the benchmark's data")
        suite.add_argument("--subset", action="append", default=[], metavar="NAME", help="only this one; repeatable")
        _add_asking(suite, f"runs/evaluate/{name}")

    text = "the tables of the GLM-4-Voice paper"
    examples = ("duologue evaluate paper --data data --model glm-4-voice-9b --device cuda",)
    paper = add_command(suites, "paper", _paper, text, model=True, examples=examples)
    paper.set_defaults(suite="paper", subset=[])
    paper.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of the data sets")
    _add_asking(paper, "runs/evaluate/paper")

    text = "Full-Duplex-Bench v1.0 and v1.5 in real time"
    examples = ("duologue evaluate full-duplex-bench --data data --server http://127.0.0.1:8000",)
    duplex = add_command(suites, "full-duplex-bench", _duplex, text, model=True, examples=examples)
    duplex.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder with v1_0 and v1_5")
    duplex.add_argument("--subset", action="append", default=[], metavar="TASK", help="only this one, VERSION/TASK")
    _add_running(duplex, "runs/evaluate/full-duplex-bench", 1)


def _add_running(suite: Parser, output: str, at_once: int) -> None:
    """The arguments of everything that talks to a model."""
    suite.set_defaults(players=60)
    suite.add_argument(
        "-o", "--output", type=Path, default=Path(output), metavar="FOLDER", help=f"results (default: {output})"
    )
    suite.add_argument(
        "--server", metavar="URL", help="a server of OpenAI's Realtime protocol; --model then names its model"
    )
    suite.add_argument("--limit", type=positive, metavar="N", help="ask only N questions, spread over the subsets")
    suite.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    suite.add_argument(
        "--at-once", type=positive, default=at_once, metavar="N", help=f"conversations at a time (default: {at_once})"
    )
    add_recognizer(suite)


def add_recognizer(suite: Parser) -> None:
    suite.set_defaults(utmos=None, speaker_model=None)
    suite.add_argument("--recognizer", type=Path, metavar="FOLDER", help=RECOGNIZER_HELP)
    suite.add_argument(
        "--chinese-recognizer", default="", metavar="MODEL", help="FunASR model for Chinese, such as paraformer-zh"
    )


def _add_asking(suite: Parser, output: str) -> None:
    """The arguments of everything that asks question by question."""
    _add_running(suite, output, at_once=4)
    suite.add_argument(
        "--utmos", type=Path, metavar="FILE", help="predictor of mean opinion scores: TorchScript or ONNX"
    )
    suite.add_argument(
        "--speaker-model",
        type=Path,
        metavar="FILE",
        help="ONNX embedder of voices, compared with seed-tts-eval's prompts",
    )
    suite.add_argument("--instructions", default="", metavar="TEXT", help="for the session of --server")
    suite.add_argument("--seed", type=int, default=0, help="seed of every reply of a model here (default: 0)")
    suite.add_argument(
        "--any-language", action="store_true", help="let a model of several languages choose that of its answer"
    )
    suite.add_argument("--players", type=positive, default=60, metavar="N", help="questions on the page (default: 60)")
    suite.add_argument("--judge", metavar="URL", help="base URL of a chat endpoint, such as http://host/v1")
    suite.add_argument("--judge-model", default=JUDGE_MODEL, metavar="NAME", help=f"default: {JUDGE_MODEL}")


def settings_of(args: argparse.Namespace) -> SuiteSettings:
    from duologue.evaluation.suite import SuiteSettings

    return SuiteSettings(
        args.data, args.output, args.limit, tuple(args.subset), args.resume, args.at_once, args.players
    )


def asker_of(args: argparse.Namespace) -> Asker:
    """The model or server that is asked."""
    from duologue.evaluation.asking import ChatbotAsker, ServerAsker

    if args.server:
        return ServerAsker(args.server, args.model, os.environ.get(KEY_VARIABLE, ""), args.instructions)
    if args.instructions:
        raise ValueError("--instructions goes to a server: give --server URL")
    from duologue.checkpoint import file_hash
    from duologue.conversation.chatbot import load, model_folder

    folder = model_folder(args.model)
    bot = load(folder, args.device)
    card = bot.models.card
    warn_if_untrained(card)
    parts = ("tokenizer", "vocabulary", "language", "decoder")
    hashes = {part: file_hash(folder / part) for part in parts if (folder / part).exists()}
    model = {"name": card.name, "trained": card.trained, "hashes": hashes}
    return ChatbotAsker(bot, model, args.seed, not args.any_language)


def listener_of(args: argparse.Namespace) -> Listener:
    """The recognizer of the replies, or why there is none."""
    from duologue.evaluation.recognition import open_recognizer
    from duologue.evaluation.sound_quality import SpeakerEmbedder, UtmosPredictor
    from duologue.evaluation.suite import Listener

    recognizer, why_not = open_recognizer(args.recognizer, args.chinese_recognizer)
    utmos = UtmosPredictor(args.utmos) if args.utmos else None
    speakers = SpeakerEmbedder(args.speaker_model) if args.speaker_model else None
    return Listener(recognizer, recognizer.name if recognizer else "", why_not, utmos, speakers)


def judge_of(args: argparse.Namespace) -> ChatJudge | None:
    from duologue.evaluation.judge import KEY_VARIABLE, ChatJudge, JudgeSettings

    if not args.judge:
        return None
    settings = JudgeSettings(args.judge, args.judge_model)
    return ChatJudge(settings, args.output / "judge.jsonl", os.environ.get(KEY_VARIABLE, ""))


def compare_runs(args: argparse.Namespace) -> None:
    """`duologue evaluate --compare A B`."""
    from duologue.evaluation.compare import compare, format_comparison, to_rows

    if args.compare is None:
        args.parser.print_help()
        return
    compared = compare(*args.compare)
    print(json.dumps(to_rows(compared)) if args.json else format_comparison(compared))


def _evaluate(args: argparse.Namespace) -> None:
    from duologue.evaluation.benchmarks.table import BENCHMARKS
    from duologue.evaluation.suite import choose, run_benchmark

    benchmark, settings = BENCHMARKS[args.suite], settings_of(args)
    choose(benchmark, settings)  # bad data is refused before a model is loaded
    _print(args, run_benchmark(benchmark, settings, asker_of(args), listener_of(args), judge_of(args)))


def _paper(args: argparse.Namespace) -> None:
    from duologue.evaluation.asking import ChatbotAsker
    from duologue.evaluation.paper import run_paper

    asker = asker_of(args)
    models = asker.bot.models if isinstance(asker, ChatbotAsker) else None
    _print(args, run_paper(settings_of(args), asker, models, listener_of(args), judge_of(args)))


def _duplex(args: argparse.Namespace) -> None:
    from duologue.client.process import start_server
    from duologue.evaluation.benchmarks.fullduplexbench import load
    from duologue.evaluation.duplex import run_duplex

    load(args.data)  # bad data is refused before a server is started
    settings, listener, key = settings_of(args), listener_of(args), os.environ.get(KEY_VARIABLE, "")
    if args.server:
        _print(args, run_duplex(settings, args.server, args.model, key, listener))
        return
    with start_server(args.model, ("--device", args.device)) as server:
        _print(args, run_duplex(settings, server.url, args.model, "", listener))


def _print(args: argparse.Namespace, report: Report) -> None:
    from duologue.evaluation.report import format_table
    from duologue.evaluation.suite import NAME

    if args.json:
        print(json.dumps(report.to_json()))
    else:
        print(format_table(report))
        for path in sorted(args.output.glob(f"{NAME}.*")):
            print(f"-> {path}")
