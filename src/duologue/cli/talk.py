"""`duologue talk`: a spoken conversation in the terminal, or from one sound file into another."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.cli.parser import FAILED, KEY_VARIABLE, add_command, checked_output, positive

if TYPE_CHECKING:
    from duologue.client.conversation import Summary


def add(commands: Any) -> None:
    """Adds `talk`."""
    talk = add_command(commands, "talk", _talk, "talk with a chatbot through microphone and loudspeaker", model=True)
    talk.add_argument(
        "--server",
        metavar="URL",
        help=f"a running server, like http://127.0.0.1:8000; its key stands in {KEY_VARIABLE} "
        "(default: start one here, for this conversation)",
    )
    talk.add_argument("--input", type=Path, metavar="SOUND", help="a sound file in place of the microphone")
    talk.add_argument("--output", type=Path, metavar="SOUND", help="a sound file in place of the loudspeaker")
    talk.add_argument("--voice", default="", help="of the answers")
    talk.add_argument("--instructions", default="", metavar="TEXT", help="what the chatbot is told beforehand")
    talk.add_argument("--manual", action="store_true", help="the turn ends with the input file, not at a pause")
    talk.add_argument("--silence", type=positive, metavar="MS", help="pause that ends a turn")
    talk.add_argument("--max-tokens", type=positive, metavar="N", help="the longest answer")
    talk.add_argument(
        "--no-barge-in",
        action="store_true",
        help="do not listen while an answer plays: for loudspeakers that the microphone hears",
    )


def _talk(args: argparse.Namespace) -> int:
    if args.manual and args.input is None:
        raise ValueError("--manual ends the turn with the file of --input, and none is given")
    if args.output is not None:
        checked_output(args.output)
    import asyncio

    from duologue.client.conversation import TalkSettings
    from duologue.client.process import start_server
    from duologue.talk.terminal import Ends, converse

    ends = Ends(args.input, args.output)
    ends.check()  # said at once, not after a model was loaded
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
            server = stack.enter_context(start_server(args.model, ("--device", args.device))).url
        key = os.environ.get(KEY_VARIABLE, "") if args.server is not None else ""
        summary = asyncio.run(converse(server, args.model, key, ends, settings, args.json))
    print(json.dumps(summary.to_json()) if args.json else _format(summary))
    if summary.ended_by:
        print(f"duologue: {summary.ended_by}", file=sys.stderr)
        return FAILED
    return 0


def _format(summary: Summary) -> str:
    waits = [f"{each.first_audio_ms / 1000:.2f}" for each in summary.exchanges if each.first_audio_ms is not None]
    gaps = f"{summary.num_gaps} gaps ({summary.gap_ms:.0f} ms)" if summary.num_gaps else "no gaps"
    line = f"turns: {len(summary.exchanges)}, seconds to the first sound: {' '.join(waits) or 'none'}, {gaps}"
    return f"{line} -> {summary.output}" if summary.output else line
