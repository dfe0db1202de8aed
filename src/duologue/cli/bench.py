"""`duologue bench NAME`: what the stages cost on this machine, as a table, a picture and a record."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.cli.parser import KEY_VARIABLE, Parser, add_command, add_precision, positive, say_if_untrained

if TYPE_CHECKING:
    from duologue.chatbot import Chatbot


def add(commands: Any) -> None:
    """Adds `bench` and its benches."""
    text = "measure this machine"
    bench: Parser = commands.add_parser("bench", help=text, description=text[0].upper() + text[1:] + ".")
    names = bench.add_subparsers(title="benches", metavar="NAME", required=True, parser_class=Parser)

    latency = _add(names, "latency", _latency, "time to first audio, stage by stage")
    add_precision(latency)
    latency.add_argument("--question", type=Path, help="a sound file (default: the one of the package)")
    _add_repetitions(latency, 10)

    server = _add(names, "server", _server, "clients that talk with a real server, and clients that come and go")
    server.add_argument("--server", metavar="URL", help="a running one (default: start one for the bench)")
    server.add_argument("--pid", type=positive, help="its process, for --cycles with --server")
    server.add_argument("--clients", type=int, default=8, metavar="N", help="(default: 8; 0 for none)")
    server.add_argument("--turns", type=positive, default=3, metavar="N", help="questions of each (default: 3)")
    server.add_argument("--cycles", type=int, default=0, metavar="N", help="connections that come and go")
    server.add_argument("--max-tokens", type=positive, metavar="N", help="of an answer")


def _latency(args: argparse.Namespace) -> None:
    from duologue.audio import load_audio
    from duologue.bench.latency import measure_latency
    from duologue.chatbot import model_folder

    question = args.question if args.question is not None else model_folder() / "question.wav"
    wav, sample_rate = load_audio(question)  # before the models: what is wrong with a file is said at once
    bot = _load(args)
    _run(args, _model(bot), lambda: measure_latency(bot, wav, sample_rate, args.repetitions, args.warm_up))


def _server(args: argparse.Namespace) -> None:
    import os

    from duologue.bench.server import measure_server
    from duologue.client.process import start_server

    with contextlib.ExitStack() as stack:
        url, pid, key = args.server, args.pid, os.environ.get(KEY_VARIABLE, "")
        if url is None:
            many = ("--max-sessions", str(args.clients + 8), "--max-sessions-per-key", str(args.clients + 8))
            server = stack.enter_context(start_server(args.model, ("--device", args.device, *many)))
            url, pid, key = server.url, server.pid, ""
        counts = (args.clients, args.turns, args.cycles, args.max_tokens)
        _run(args, {"name": args.model, "url": args.server}, lambda: measure_server(url, pid, key, *counts))


def _add(names: Any, name: str, run: Any, text: str, model: bool = True) -> Parser:
    parser = add_command(names, name, run, text, model=model)
    parser.set_defaults(bench=name)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg, ...)")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help=f"write the record there, as {name}.json")
    return parser


def _add_repetitions(parser: Parser, default: int) -> None:
    parser.add_argument("--repetitions", type=positive, default=default, metavar="N", help=f"(default: {default})")
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="repetitions that are not counted")


def _load(args: argparse.Namespace) -> Chatbot:
    from duologue.chatbot import load

    bot = load(args.model, args.device, args.dtype, args.quantize)
    say_if_untrained(bot.models.card)
    return bot


def _model(bot: Chatbot) -> dict[str, Any]:
    return {"name": bot.models.card.name, "trained": bot.models.card.trained}


def _run(args: argparse.Namespace, model: dict[str, Any], work: Callable[[], Any], name: str = "") -> None:
    """Runs a bench and says what came out of it; the last line of `--json` is the record."""
    from duologue.bench import harness, plots

    if args.plot is not None:
        import matplotlib  # noqa: F401  (that it is missing is said before the work)
    record = harness.run(name or args.bench, shlex.join(["duologue", *args.argv]), model, work)
    written = [record.save(args.output)] if args.output is not None else []
    if args.plot is not None:
        plots.save(record.result, args.plot)
        written.append(args.plot)
    if args.json:
        print(json.dumps(record.to_json()))
        return
    print(record.result.table())
    if record.result.checks:
        print(harness.format_checks(record.result.checks))
    on = record.machine
    print(f"peak memory {record.peak_memory_mb:.0f} MB, {record.duration_s:.0f} s")
    print(f"{on['processor']}, {on['cores']} cores, {on['threads']} threads, torch {on['torch']}")
    for path in written:
        print(f"-> {path}")
