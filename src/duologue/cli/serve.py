"""`duologue serve`: the real-time server and its web page."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from duologue.cli.parser import (
    add_command,
    add_precision,
    add_text_model,
    positive,
    text_model_options,
    warn_if_untrained,
)

KEYS_VARIABLE = "DUOLOGUE_API_KEYS"


EXAMPLES = (
    "duologue serve",
    "duologue serve --host 0.0.0.0 --keys keys.txt",
    "duologue serve --origin https://talk.example.org",
)


def add(commands: Any) -> None:
    serve = add_command(commands, "serve", _serve, "real-time server and web page", model=True, examples=EXAMPLES)
    add_settings(serve)
    add_text_model(serve)


def add_settings(serve: argparse.ArgumentParser) -> None:
    """Adds the arguments of the settings and the engine."""
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    serve.add_argument("--port", type=_port, default=8000, help="0 picks a free port (default: 8000)")
    serve.add_argument(
        "--keys", type=Path, metavar="FILE", help=f"API keys, one a line; or set {KEYS_VARIABLE} (with commas)"
    )
    serve.add_argument(
        "--origin", action="append", default=[], metavar="URL", help="origin of another server's page that may connect"
    )
    serve.add_argument(
        "--record",
        dest="record_folder",
        type=Path,
        metavar="FOLDER",
        help="record audio and text of every conversation",
    )
    serve.add_argument(
        "--sessions", dest="max_sessions", type=positive, metavar="N", help="maximum concurrent conversations"
    )
    serve.add_argument(
        "--cached-tokens", type=positive, metavar="N", help="maximum ids in the language model's KV caches"
    )
    serve.add_argument(
        "--sessions-per-key", dest="max_sessions_per_key", type=positive, metavar="N", help="maximum per API key"
    )
    serve.add_argument("--idle-s", type=_seconds, metavar="S", help="close idle conversations after S seconds")
    serve.add_argument("--session-s", type=_seconds, metavar="S", help="maximum duration of a conversation")
    serve.add_argument("--resume-s", type=_seconds, metavar="S", help="keep dropped conversations for S seconds")
    serve.add_argument(
        "--store", metavar="PLACE", help="folder or Redis URL: other servers and a restarted one resume conversations"
    )
    serve.add_argument("--store-s", type=_seconds, metavar="S", help="keep stored conversations for S seconds")
    serve.add_argument("--stall-s", type=_seconds, metavar="S", help="drop clients that read nothing for S seconds")
    serve.add_argument(
        "--ahead-s", type=_seconds, metavar="S", help="generate a reply at most S seconds ahead of its playback"
    )
    serve.add_argument("--drain-s", type=_seconds, metavar="S", help="let answers finish for S seconds after SIGTERM")
    serve.add_argument(
        "--digits",
        dest="write_out_numbers",
        action="store_const",
        const=False,
        help="let the model read digits in /v1/audio/speech; by default numbers become English words",
    )
    serve.add_argument("--until-stdin-ends", action="store_true", help="stop when standard input is closed")
    serve.add_argument("--verbose", action="store_true", help="log connections, never their content")
    add_precision(serve)
    serve.add_argument(
        "--engine",
        default="plain",
        metavar="NAME",
        help="plain, graphs for captured steps on CUDA, or vllm for a vLLM server (default: plain)",
    )
    serve.add_argument("--engine-url", metavar="URL", help="address of the vLLM server, such as http://127.0.0.1:8001")


def _serve(args: argparse.Namespace) -> None:
    from duologue.serving.server import Server, listen, url_of, warm_up
    from duologue.serving.settings import Settings

    text_model_options(args)  # refuses a talker alone
    settings = Settings(**given_settings(args))
    if args.until_stdin_ends:
        stop_when_stdin_ends()
    if settings.record_folder is not None:
        settings.record_folder.mkdir(parents=True, exist_ok=True)
        if not os.access(settings.record_folder, os.W_OK):
            raise ValueError(f"{settings.record_folder} is not writable; recordings need a writable folder")
    listening = listen(settings)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    from duologue.conversation.chatbot import load
    from duologue.serving.app import create_app

    language = settings.max_sessions, args.cached_tokens, args.engine_url, args.gguf
    precision = args.device, args.dtype, args.quantize, args.engine, args.decoder_dtype
    bot = load(
        args.model,
        *precision,
        *language,
        text_model=args.text_model,
        text_model_name=args.text_model_name,
        talker=args.talker,
    )
    warn_if_untrained(bot.models.card)
    warm_up(bot)

    def announce() -> None:
        url, card = url_of(listening), bot.models.card
        if args.json:
            ready = {"url": url, "model": card.name, "trained": card.trained, "pid": os.getpid()}
            print(json.dumps({**ready, "keys": len(settings.api_keys)}), flush=True)
            return
        keys = f", {len(settings.api_keys)} API keys" if settings.api_keys else ""
        print(f"{card.name} is ready ({args.device}{keys}): open {url} and talk. Ctrl+C stops it.", flush=True)

    Server(create_app(bot, settings), on_ready=announce).run([listening])


def stop_when_stdin_ends() -> None:
    """Sends SIGTERM to this process when its standard input is closed."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the command line and environment as fields of Settings."""
    limits = ("max_sessions", "max_sessions_per_key", "idle_s", "session_s", "resume_s", "stall_s", "ahead_s")
    names = (*limits, "store", "store_s", "drain_s", "record_folder", "write_out_numbers")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    keys = read_keys(args.keys)
    return {"host": args.host, "port": args.port, "api_keys": keys, "allowed_origins": tuple(args.origin), **given}


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Reads API keys from a file and the environment. Other users could read keys on the command line."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        if not file.is_file():
            raise ValueError(f"{file} does not exist")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not a text file of API keys") from None
        keys += [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(line for line in keys):
            raise ValueError(f"{file} holds no API key")
        if os.name == "posix" and file.stat().st_mode & 0o077:
            print(f"duologue: other users can read {file}: chmod 600 {file}", file=sys.stderr)
    return tuple(dict.fromkeys(key for key in keys if key))


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
