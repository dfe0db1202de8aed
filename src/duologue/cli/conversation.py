"""`duologue evaluate conversation`: interruptions, false ones, pauses, and a long talk, by simulated or real calls."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

from duologue.cli.benchmarks import add_recognizer, listener_of
from duologue.cli.parser import KEY_VARIABLE, add_command, positive, warn_if_untrained

NAME, OUTPUT = "conversation", "runs/evaluate/conversation"
EXAMPLES = (
    "duologue evaluate conversation",
    "duologue evaluate conversation --limit 2 --minutes 0 --json",
    "duologue evaluate conversation --server http://127.0.0.1:8000 --minutes 5",
)


def add_conversation(suites: Any) -> None:
    text = "interruptions, sounds that must not interrupt, pauses, and an hour's talk"
    suite = add_command(suites, NAME, _evaluate, text, model=True, examples=EXAMPLES)
    suite.add_argument(
        "-o", "--output", type=Path, default=Path(OUTPUT), metavar="FOLDER", help=f"results (default: {OUTPUT})"
    )
    suite.add_argument(
        "--server", metavar="URL", help="a server of OpenAI's Realtime protocol, in real time; --model names its model"
    )
    suite.add_argument("--limit", type=positive, metavar="N", help="use only N of the bundled questions")
    suite.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        metavar="M",
        help="length of the long talk; 0 leaves it out (default: 60)",
    )
    suite.add_argument("--players", type=positive, default=60, metavar="N", help="trials on the page (default: 60)")
    add_recognizer(suite)


def _evaluate(args: argparse.Namespace) -> None:
    from duologue.evaluation.conversation_suite import ConversationSettings
    from duologue.evaluation.report import format_table
    from duologue.evaluation.suite import NAME as RESULTS

    if not args.minutes >= 0:
        raise ValueError(f"--minutes must be 0 or more, got {args.minutes:g}")
    settings = ConversationSettings(args.output, args.limit, args.minutes, args.players)
    report = _by_server(args, settings) if args.server else _in_process(args, settings)
    if args.json:
        print(json.dumps(report.to_json()))
        return
    print(format_table(report))
    for path in sorted(args.output.glob(f"{RESULTS}.*")):
        print(f"-> {path}")


def _by_server(args: argparse.Namespace, settings: Any) -> Any:
    from duologue.client.connection import open_connection, realtime_url
    from duologue.evaluation.conversation_suite import run_conversations

    key, listener = os.environ.get(KEY_VARIABLE, ""), listener_of(args)
    about = {"name": args.model, "server": realtime_url(args.server, args.model)}
    work = run_conversations(settings, lambda: open_connection(args.server, args.model, key), about, False, listener)
    return asyncio.run(work)


def _in_process(args: argparse.Namespace, settings: Any) -> Any:
    from duologue.checkpoint import file_hash
    from duologue.conversation.chatbot import load, model_folder
    from duologue.evaluation.conversation_suite import run_conversations
    from duologue.evaluation.simulated_time import run_simulated
    from duologue.language.engine import PlainEngine
    from duologue.serving.in_process import connect_in_process
    from duologue.serving.settings import Settings

    folder, listener = model_folder(args.model), listener_of(args)
    bot = load(folder, args.device)
    engine, worker = bot.models.engine, bot.worker
    if not isinstance(engine, PlainEngine):
        raise ValueError("simulated time needs the plain engine: start a server of the model and name it with --server")
    warn_if_untrained(bot.models.card)
    parts = ("tokenizer", "vocabulary", "language", "decoder")
    hashes = {part: file_hash(folder / part) for part in parts if (folder / part).exists()}
    about = {"name": bot.models.card.name, "trained": bot.models.card.trained, "hashes": hashes}
    server = Settings(resume_s=0.0, session_s=60.0 * args.minutes + 3600.0)
    work = run_conversations(settings, lambda: connect_in_process(bot, server), about, True, listener)
    return run_simulated(work, lambda: engine.busy or worker.busy)
