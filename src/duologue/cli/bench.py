"""`duologue bench NAME`: what the stages cost on this machine, as a table, a picture and a record."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.cli.parser import (
    DTYPES,
    KEY_VARIABLE,
    Parser,
    add_command,
    add_device,
    add_precision,
    positive,
    say_if_untrained,
)

if TYPE_CHECKING:
    from duologue.conversation.chatbot import Chatbot
    from duologue.models import EngineName

PRESETS = ("glm-4-voice-9b",)
ENGINES = ("plain", "continuous")


def add(commands: Any) -> None:
    """Adds `bench` and its benches."""
    text = "measure this machine"
    bench: Parser = commands.add_parser("bench", help=text, description=text[0].upper() + text[1:] + ".")
    names = bench.add_subparsers(title="benches", metavar="NAME", required=True, parser_class=Parser)

    latency = _add(names, "latency", _latency, "time to first audio, stage by stage")
    add_precision(latency)
    latency.add_argument("--question", type=Path, help="a sound file (default: the one of the package)")
    _add_repetitions(latency, 10)

    tokenizer = _add(names, "tokenizer", _tokenizer, "listening in small chunks against one offline pass")
    _add_preset(tokenizer)
    tokenizer.add_argument("--seconds", type=_seconds, default=30.0, metavar="S", help="of speech (default: 30)")
    _add_repetitions(tokenizer, 5)

    decoder = _add(names, "decoder", _decoder, "cost of block k of a long reply, against decoding all again")
    _add_preset(decoder)
    decoder.add_argument("--seconds", type=_seconds, default=60.0, metavar="S", help="of the reply (default: 60)")
    decoder.add_argument("--replies", type=positive, default=2, metavar="N", help="in each block size (default: 2)")
    decoder.add_argument(
        "--repetitions", type=positive, metavar="N", help="of the second and the last block (default: 15; released: 3)"
    )
    decoder.add_argument("--window", type=int, metavar="N", help="frames of the past that a released decoder sees")

    solvers = _add(names, "solvers", _solvers, "solvers of the flow: distance to its exact solution, and cost")
    solvers.add_argument(
        "--steps", type=positive, nargs="+", default=[1, 2, 3, 4, 6, 10], metavar="N", help="(default: 1 2 3 4 6 10)"
    )
    solvers.add_argument(
        "--sway", type=float, nargs="+", default=[-1.0, -0.5, 0.0], metavar="X", help="schedules (default: -1 -0.5 0)"
    )
    solvers.add_argument("--guidance", type=float, metavar="X", help="(default: the model's)")
    solvers.add_argument("--repetitions", type=positive, default=5, metavar="N", help="of the block (default: 5)")

    sessions = _add(names, "sessions", _sessions, "live conversations at once, in real time, against one alone")
    add_precision(sessions)
    sessions.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help=f"(default: {ENGINES[0]})")
    sessions.add_argument(
        "--sessions",
        type=positive,
        nargs="+",
        default=[8],
        metavar="N",
        help="how many, one run each; the last is judged, one alone comes before (default: 8)",
    )
    sessions.add_argument("--seconds", type=_seconds, default=45.0, metavar="S", help="of the last run (default: 45)")
    sessions.add_argument("--seed", type=int, default=0, help="of pauses, questions and sampling")

    engine = _add(names, "engine", _engine, "the plain engine against continuous batching", model=False)
    engine.add_argument("--model", help="a preset or a model folder (default: random weights of pocket's size)")
    add_device(engine)
    engine.add_argument("--dtype", choices=DTYPES, help="of a --model (default: bfloat16 if released)")
    engine.add_argument(
        "--requests", type=positive, nargs="+", default=[1, 4, 8, 16], metavar="N", help="at once (default: 1 4 8 16)"
    )
    engine.add_argument("--prompt", type=positive, default=200, metavar="N", help="ids (default: 200)")
    engine.add_argument("--reply", type=positive, default=64, metavar="N", help="ids (default: 64)")
    engine.add_argument("--repetitions", type=positive, default=3, metavar="N", help="(default: 3)")

    server = _add(names, "server", _server, "clients that talk with a real server, and clients that come and go")
    server.add_argument("--server", metavar="URL", help="a running one (default: start one for the bench)")
    server.add_argument("--pid", type=positive, help="its process, for --cycles with --server")
    server.add_argument("--clients", type=int, default=8, metavar="N", help="(default: 8; 0 for none)")
    server.add_argument("--turns", type=positive, default=3, metavar="N", help="questions of each (default: 3)")
    server.add_argument("--cycles", type=int, default=0, metavar="N", help="connections that come and go")
    server.add_argument("--max-tokens", type=positive, metavar="N", help="of an answer")
    server.add_argument(
        "--spread", type=_seconds, default=4.0, metavar="S", help="time over which the clients begin (default: 4)"
    )


def _latency(args: argparse.Namespace) -> None:
    from duologue.audio import load_audio
    from duologue.bench.latency import measure_latency
    from duologue.conversation.chatbot import model_folder

    question = args.question if args.question is not None else model_folder() / "question.wav"
    wav, sample_rate = load_audio(question)  # before the models: what is wrong with a file is said at once
    bot = _load(args)
    _run(args, _model(bot), lambda: measure_latency(bot, wav, sample_rate, args.repetitions, args.warm_up))


def _tokenizer(args: argparse.Namespace) -> None:
    from duologue.bench.tokenizer import measure_tokenizer, random_tokenizer
    from duologue.conversation.chatbot import model_folder
    from duologue.models import Card, load_tokenizer

    name = args.bench
    if args.preset is not None:
        tokenizer, model = random_tokenizer(args.preset).to(args.device), {"name": args.preset, "trained": False}
        name = f"{name}-{args.preset}"
    else:
        folder = model_folder(args.model)
        card = Card.load(folder)
        tokenizer, model = load_tokenizer(folder, args.device), {"name": card.name, "trained": card.trained}
    counts = args.seconds, args.repetitions, args.warm_up
    _run(args, model, lambda: measure_tokenizer(tokenizer, *counts), name)


def _decoder(args: argparse.Namespace) -> None:
    from duologue.bench.decoder import measure_decoder
    from duologue.conversation.chatbot import model_folder
    from duologue.decoder.released import ReleasedDecoder
    from duologue.models import Card, codebook_size, load_decoder

    if args.preset is not None:
        from duologue.bench.tokenizer import RANDOM
        from duologue.released import PRESETS

        sizes = PRESETS[RANDOM[args.preset]]()
        _released_decoder(args, {"name": args.preset, "trained": False}, sizes.flow, sizes.vocoder)
        return
    folder = model_folder(args.model)
    card = Card.load(folder)
    decoder = load_decoder(folder, args.device)
    model = {"name": card.name, "trained": card.trained}
    if isinstance(decoder, ReleasedDecoder):
        _released_decoder(args, model, decoder.flow.config, decoder.vocoder.network.config)
        return
    solver = card.num_steps, card.guidance_scale
    counts = args.seconds, args.repetitions or 15, args.replies
    _run(args, model, lambda: measure_decoder(decoder, codebook_size(decoder), *counts, *solver))


def _released_decoder(args: argparse.Namespace, model: dict[str, Any], flow: Any, vocoder: Any) -> None:
    """The cost is that of any weights, so only the sizes count."""
    from duologue.bench.released_decoder import measure_released_decoder

    more = {"window_frames": args.window, "repetitions": args.repetitions or 3, "device": args.device}
    _run(
        args,
        model,
        lambda: measure_released_decoder(flow, vocoder, args.seconds, **more),
        f"{args.bench}-{model['name']}",
    )


def _solvers(args: argparse.Namespace) -> None:
    from duologue.bench.solvers import measure_solvers, question_tokens
    from duologue.conversation.chatbot import model_folder
    from duologue.decoder.decoder import SpeechDecoder
    from duologue.models import Card, load_decoder, load_tokenizer

    folder = model_folder(args.model)
    card = Card.load(folder)
    decoder = load_decoder(folder, args.device)
    if not isinstance(decoder, SpeechDecoder):
        raise ValueError(f"{folder} has a released decoder, whose solver is Euler's; choose a model with our own")
    tokens = question_tokens(load_tokenizer(folder, args.device))
    scale = card.guidance_scale if args.guidance is None else args.guidance
    _run(
        args,
        {"name": card.name, "trained": card.trained},
        lambda: measure_solvers(
            decoder.flow, tokens, args.steps, args.sway, guidance_scale=scale, repetitions=args.repetitions
        ),
    )


def _sessions(args: argparse.Namespace) -> None:
    from duologue.bench.sessions import measure_sessions

    bot = _load(args, args.engine)
    counts = args.sessions if args.sessions[0] == 1 else [1, *args.sessions]
    model = {**_model(bot), "engine": args.engine}
    _run(args, model, lambda: measure_sessions(bot, counts, args.seconds, args.seed))


def _engine(args: argparse.Namespace) -> None:
    from duologue.bench.engine import measure_engine, random_language, stored_language
    from duologue.conversation.chatbot import model_folder
    from duologue.models import Card
    from duologue.vocabulary import Vocabulary

    if args.model is None:
        if args.dtype is not None:
            raise ValueError("--dtype is of a stored model: give it together with --model")
        vocabulary = Vocabulary.load(model_folder() / "vocabulary")
        make_model, model = random_language(vocabulary, args.device), {"name": "pocket's size", "trained": False}
    else:
        folder = model_folder(args.model)
        card = Card.load(folder)
        make_model, vocabulary = stored_language(folder, args.device, args.dtype)
        model = {"name": card.name, "trained": card.trained}
    sizes = args.requests, args.prompt, args.reply, args.repetitions
    _run(args, model, lambda: measure_engine(make_model, vocabulary, *sizes))


def _server(args: argparse.Namespace) -> None:
    import os

    from duologue.bench.server import measure_server
    from duologue.client.process import start_server

    with contextlib.ExitStack() as stack:
        url, pid, key = args.server, args.pid, os.environ.get(KEY_VARIABLE, "")
        if url is None:
            room = str(args.clients + 32)  # a busy server takes a while to notice those that left without a word
            many = ("--sessions", room, "--sessions-per-key", room)
            server = stack.enter_context(start_server(args.model, ("--device", args.device, *many)))
            url, pid, key = server.url, server.pid, ""
        counts = (args.clients, args.turns, args.cycles, args.max_tokens, args.spread)
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


def _add_preset(parser: Parser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="the published size with random weights, in place of a model")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _load(args: argparse.Namespace, engine: EngineName = "plain") -> Chatbot:
    from duologue.conversation.chatbot import load

    bot = load(args.model, args.device, args.dtype, args.quantize, engine, args.decoder_dtype)
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
