"""`duologue bench`: measures of this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from duologue.cli.parser import add_command, add_precision, positive, say_if_untrained


def add(commands: Any) -> None:
    """Adds `bench`."""
    bench = add_command(commands, "bench", _bench, "measure this machine", model=True)
    bench.add_argument(
        "name", choices=("latency",), metavar="NAME", help="latency: time to first audio, stage by stage"
    )
    add_precision(bench)
    bench.add_argument("--question", type=Path, help="a sound file (default: the one of the package)")
    bench.add_argument("--repetitions", type=positive, default=10)
    bench.add_argument("--warm-up", type=int, default=2, help="repetitions that are not counted")


def _bench(args: argparse.Namespace) -> None:
    from duologue.audio import load_audio
    from duologue.chatbot import load, model_folder
    from duologue.evaluation.latency import format_latency, measure_latency

    question = args.question if args.question is not None else model_folder() / "question.wav"
    wav, sample_rate = load_audio(question)
    bot = load(args.model, args.device, args.dtype, args.quantize)
    latency = measure_latency(bot, wav, sample_rate, args.repetitions, args.warm_up)
    say_if_untrained(bot.models.card)
    if not args.json:
        print(format_latency(latency))
    else:
        print(json.dumps(latency.to_json()))
