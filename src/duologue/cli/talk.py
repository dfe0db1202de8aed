"""`duologue talk`: a spoken conversation in the terminal or between audio files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.cli.parser import (
    FAILED,
    KEY_VARIABLE,
    add_command,
    add_text_model,
    checked_output,
    positive,
    text_model_options,
)

if TYPE_CHECKING:
    from duologue.client.conversation import TalkSummary


EXAMPLES = (
    "duologue talk",
    "duologue talk --server http://127.0.0.1:8000",
    "duologue talk --input question.wav --output answers.wav",
)


def add(commands: Any) -> None:
    text = "talk with a chatbot through microphone and loudspeaker"
    talk = add_command(commands, "talk", _talk, text, model=True, examples=EXAMPLES)
    talk.add_argument(
        "--server",
        metavar="URL",
        help=f"URL of a running server, such as http://127.0.0.1:8000; {KEY_VARIABLE} holds its key "
        "(default: start one for this conversation)",
    )
    add_text_model(talk)
    talk.add_argument("--input", type=Path, metavar="AUDIO", help="an audio file instead of the microphone")
    talk.add_argument("--output", type=Path, metavar="AUDIO", help="an audio file instead of the loudspeaker")
    talk.add_argument("--voice", default="", help="voice of the answers")
    talk.add_argument("--instructions", default="", metavar="TEXT", help="system instructions")
    talk.add_argument("--manual", action="store_true", help="end the turn with the input file, not at a pause")
    talk.add_argument("--silence", type=positive, metavar="MS", help="pause that ends a turn")
    talk.add_argument("--max-tokens", type=positive, metavar="N", help="maximum tokens of an answer")
    talk.add_argument(
        "--no-barge-in",
        action="store_true",
        help="do not listen while an answer plays (prevents echo)",
    )
    talk.add_argument(
        "--no-echo-cancellation",
        action="store_true",
        help="leave the microphone as it is, for instance with headphones",
    )


def _talk(args: argparse.Namespace) -> int:
    if args.manual and args.input is None:
        raise ValueError("--manual needs --input, whose end is the end of the turn")
    options = text_model_options(args)
    if options and args.server is not None:
        raise ValueError("a running server has its own text model: give --text-model to `duologue serve`")
    if args.output is not None:
        checked_output(args.output)
    import asyncio

    from duologue.client.conversation import TalkSettings
    from duologue.client.process import start_server
    from duologue.talk.terminal import AudioEndpoints, converse

    endpoints = AudioEndpoints(args.input, args.output, not args.no_echo_cancellation)
    endpoints.check()  # before a model is loaded
    settings = TalkSettings(
        voice=args.voice,
        instructions=args.instructions,
        manual=args.manual,
        barge_in=not args.no_barge_in,
        silence_ms=args.silence,
        max_tokens=args.max_tokens,
    )
    with contextlib.ExitStack() as stack:
        server = args.server
        if server is None:
            print("duologue: starting a server for this conversation", file=sys.stderr)
            arguments = ["--device", args.device, *(word for option in options.items() for word in option)]
            server = stack.enter_context(start_server(args.model, arguments)).url
        key = os.environ.get(KEY_VARIABLE, "") if args.server is not None else ""
        # A private server that died does not come back.
        reconnect = args.server is not None
        summary = asyncio.run(converse(server, args.model, key, endpoints, settings, args.json, reconnect))
    print(json.dumps(summary.to_json()) if args.json else _format(summary))
    if summary.ended_by:
        print(f"duologue: {summary.ended_by}", file=sys.stderr)
        return FAILED
    return 0


def _format(summary: TalkSummary) -> str:
    waits = [f"{each.first_audio_ms / 1000:.2f}" for each in summary.exchanges if each.first_audio_ms is not None]
    gaps = f"{summary.num_gaps} gaps ({summary.gap_ms:.0f} ms)" if summary.num_gaps else "no gaps"
    line = f"turns: {len(summary.exchanges)}, seconds to first audio: {' '.join(waits) or 'none'}, {gaps}"
    return f"{line} -> {summary.output}" if summary.output else line
