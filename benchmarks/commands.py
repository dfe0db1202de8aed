"""The benches of `duologue bench`: name, description and options of each as data, and the function that runs it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
    warn_if_untrained,
)
from duologue.config import write_json

if TYPE_CHECKING:
    from duologue.conversation.chatbot import Chatbot

PRESETS = ("glm-4-voice-9b",)


@dataclass(frozen=True)
class Option:
    """One option of a bench.

    Attributes:
        help: its text; the default is added where there is one.
        many: takes one value or several.
        choices: the only values, if not all are possible.
    """

    flag: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    metavar: str = "N"
    many: bool = False
    choices: tuple[str, ...] = ()

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        shown = " ".join(f"{value:g}" for value in self.default) if self.many else self.default
        text = self.help if self.default is None else f"{self.help} (default: {shown})".strip()
        more: dict[str, Any] = {"choices": self.choices} if self.choices else {"metavar": self.metavar}
        more |= {"nargs": "+"} if self.many else {}
        parser.add_argument(self.flag, type=self.kind, default=self.default, help=text, **more)


@dataclass(frozen=True)
class Bench:
    """One bench.

    Attributes:
        precision: whether it takes the options of `add_precision`.
        random_weights: whether it does without a model: random weights of pocket's size are then the default.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace], None]
    options: tuple[Option, ...]
    precision: bool = False
    random_weights: bool = False


def seconds(text: str) -> float:
    """A number of seconds above 0. Raises argparse.ArgumentTypeError for any other text."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def add(names: Any) -> None:
    """Adds a parser for each bench."""
    for bench in BENCHES:
        parser: Parser = add_command(
            names,
            bench.name,
            bench.run,
            bench.help,
            model=not bench.random_weights,
            examples=(f"duologue bench {bench.name}", f"duologue bench {bench.name} --json -o results"),
        )
        parser.set_defaults(bench=bench.name)
        if bench.random_weights:
            parser.add_argument("--model", help="a preset or a model folder (default: random weights of pocket's size)")
            add_device(parser)
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg, ...)")
        parser.add_argument(
            "-o", "--output", type=Path, metavar="FOLDER", help=f"write the record there, as {bench.name}.json"
        )
        if bench.precision:
            add_precision(parser)
        for option in bench.options:
            option.add_to(parser)


def _latency(args: argparse.Namespace) -> None:
    from benchmarks.latency import measure_latency
    from duologue.conversation.chatbot import model_folder
    from duologue.sound_files import load_audio

    question = args.question if args.question is not None else model_folder() / "question.wav"
    wav, sample_rate = load_audio(question)  # before the models: what is wrong with a file is said at once
    bot = _load(args)
    _run(args, _model(bot), lambda: measure_latency(bot, wav, sample_rate, args.repetitions, args.warm_up))


def _tokenizer(args: argparse.Namespace) -> None:
    from benchmarks.tokenizer import measure_tokenizer, random_tokenizer
    from duologue.conversation.chatbot import model_folder
    from duologue.models import open_folder

    name = args.bench
    if args.preset is not None:
        tokenizer, model = random_tokenizer(args.preset).to(args.device), {"name": args.preset, "trained": False}
        name = f"{name}-{args.preset}"
    else:
        folder = open_folder(model_folder(args.model))
        tokenizer = folder.load_tokenizer(args.device)
        model = {"name": folder.card.name, "trained": folder.card.trained}
    counts = args.seconds, args.repetitions, args.warm_up
    _run(args, model, lambda: measure_tokenizer(tokenizer, *counts), name)


def _decoder(args: argparse.Namespace) -> None:
    from benchmarks.decoder import measure_decoder
    from duologue.conversation.chatbot import model_folder
    from duologue.models import open_folder
    from duologue.released.decoder.decoder import ReleasedDecoder

    if args.preset is not None:
        from benchmarks.tokenizer import RANDOM
        from duologue.released.random_weights import PRESETS

        sizes = PRESETS[RANDOM[args.preset]]()
        _released_decoder(args, {"name": args.preset, "trained": False}, sizes.flow, sizes.vocoder)
        return
    folder = open_folder(model_folder(args.model))
    card, decoder = folder.card, folder.load_decoder(args.device)
    model = {"name": card.name, "trained": card.trained}
    if isinstance(decoder, ReleasedDecoder):
        _released_decoder(args, model, decoder.flow.config, decoder.vocoder.network.config)
        return
    solver = card.num_steps, card.guidance_scale
    counts = args.seconds, args.repetitions or 15, args.replies
    _run(args, model, lambda: measure_decoder(decoder, decoder.codebook_size, *counts, *solver))


def _released_decoder(args: argparse.Namespace, model: dict[str, Any], flow: Any, vocoder: Any) -> None:
    """The cost is that of any weights, so only the sizes count."""
    from benchmarks.released_decoder import measure_released_decoder

    more = {"window_frames": args.window, "repetitions": args.repetitions or 3, "device": args.device}
    _run(
        args,
        model,
        lambda: measure_released_decoder(flow, vocoder, args.seconds, **more),
        f"{args.bench}-{model['name']}",
    )


def _sessions(args: argparse.Namespace) -> None:
    from benchmarks.sessions import measure_sessions
    from benchmarks.speech import questions

    bot = _load(args)
    counts = args.sessions if args.sessions[0] == 1 else [1, *args.sessions]
    asked = questions(args.questions)
    _run(args, _model(bot), lambda: measure_sessions(bot, counts, args.seconds, args.seed, asked))


def _talk(args: argparse.Namespace) -> None:
    from benchmarks.talk import measure_talk

    bot = _load(args)
    _run(args, _model(bot), lambda: measure_talk(bot, args.minutes, args.replies, args.ahead, args.seed))


def _engine(args: argparse.Namespace) -> None:
    from benchmarks.engine import measure_engine, random_language, stored_language
    from duologue.conversation.chatbot import model_folder
    from duologue.models import Card
    from duologue.vocabulary import Vocabulary

    if args.model is None:
        if args.dtype is not None:
            raise ValueError("--dtype is of a stored model: give it together with --model")
        vocabulary = Vocabulary.load(model_folder() / "vocabulary")
        language, model = random_language(vocabulary, args.device), {"name": "pocket's size", "trained": False}
    else:
        folder = model_folder(args.model)
        card = Card.load(folder)
        language, vocabulary = stored_language(folder, args.device, args.dtype)
        model = {"name": card.name, "trained": card.trained}
    sizes = args.requests, args.prompt, args.reply, args.repetitions
    _run(args, model, lambda: measure_engine(language, vocabulary, *sizes))


def _gguf(args: argparse.Namespace) -> None:
    from benchmarks.gguf import measure_gguf
    from duologue.conversation.chatbot import model_folder
    from duologue.models import open_folder

    if args.gguf is None:
        raise ValueError("bench gguf needs a file: duologue convert FOLDER -o x.gguf --gguf q4_0, then --gguf x.gguf")
    folder = open_folder(model_folder(args.model))
    model = {"name": folder.card.name, "trained": folder.card.trained, "file": args.gguf.name}
    _run(args, model, lambda: measure_gguf(args.gguf, folder.vocabulary, args.prompt, args.repetitions))


def _server(args: argparse.Namespace) -> None:
    from benchmarks.server import measure_server
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


def _soak(args: argparse.Namespace) -> None:
    from benchmarks.soak import measure_soak
    from duologue.client.process import start_server

    with start_server(args.model, ("--device", args.device)) as server:
        counts = args.minutes, args.clients, args.pause, args.sample, args.seed
        _run(args, {"name": args.model}, lambda: measure_soak(server.url, server.pid, "", *counts))


def _scale(args: argparse.Namespace) -> None:
    from benchmarks.scale import measure_scale

    counts = args.replicas, args.conversations, args.seconds, args.max_tokens, args.rounds
    _run(args, {"name": args.model}, lambda: measure_scale(args.model, args.device, *counts))


def _load(args: argparse.Namespace) -> Chatbot:
    print(f"duologue: loading {args.model}", file=sys.stderr, flush=True)
    from duologue.conversation.chatbot import load

    bot = load(args.model, args.device, args.dtype, args.quantize, decoder_dtype=args.decoder_dtype)
    warn_if_untrained(bot.models.card)
    return bot


def _model(bot: Chatbot) -> dict[str, Any]:
    return {"name": bot.models.card.name, "trained": bot.models.card.trained}


def _run(args: argparse.Namespace, model: dict[str, Any], work: Callable[[], Any], name: str = "") -> None:
    """Runs a bench and prints its rows; the last line of `--json` is the record."""
    from benchmarks import harness, plots
    from duologue.evaluation.report import format_table

    if args.plot is not None:
        import matplotlib  # noqa: F401  (that it is missing is said before the work)
    report = harness.run(name or args.bench, shlex.join(["duologue", *args.argv]), model, work)
    written = []
    if args.output is not None:
        written.append(args.output / f"{report.suite}.json")
        write_json(written[0], report.to_json())
    if args.plot is not None:
        plots.save(report.result, args.plot)
        written.append(args.plot)
    if args.json:
        print(json.dumps(report.to_json()))
        return
    print(format_table(report))
    on = report.machine
    print(f"peak memory {report.peak_memory_mb:.0f} MB, {report.duration_s:.0f} s")
    print(f"{on['processor']}, {on['cores']} cores, {on['threads']} threads, torch {on['torch']}")
    for path in written:
        print(f"-> {path}")


_WARM_UP = Option("--warm-up", int, 2, "repetitions that are not counted")
_PRESET = Option("--preset", str, None, "the published size with random weights, in place of a model", choices=PRESETS)

BENCHES = (
    Bench(
        "latency",
        "time to first audio, stage by stage",
        _latency,
        (
            Option("--question", Path, None, "a sound file (default: the one of the package)", "QUESTION"),
            Option("--repetitions", positive, 10, ""),
            _WARM_UP,
        ),
        precision=True,
    ),
    Bench(
        "tokenizer",
        "listening in small chunks against one offline pass",
        _tokenizer,
        (
            _PRESET,
            Option("--seconds", seconds, 30.0, "of speech", "S"),
            Option("--repetitions", positive, 5, ""),
            _WARM_UP,
        ),
    ),
    Bench(
        "decoder",
        "cost of block k of a long reply, against decoding all again",
        _decoder,
        (
            _PRESET,
            Option("--seconds", seconds, 60.0, "of the reply", "S"),
            Option("--replies", positive, 2, "in each block size"),
            Option("--repetitions", positive, None, "of the second and the last block (default: 15; released: 3)"),
            Option("--window", int, None, "frames of the past that a released decoder sees"),
        ),
    ),
    Bench(
        "sessions",
        "live conversations at once, in real time, against one alone",
        _sessions,
        (
            Option(
                "--sessions",
                positive,
                (8,),
                "how many, one run each; the last is judged, one alone comes before",
                many=True,
            ),
            Option("--seconds", seconds, 45.0, "of the last run", "S"),
            Option("--questions", Path, None, "recordings to ask (default: those of the package)", "FOLDER"),
            Option("--seed", int, 0, "of pauses, questions and sampling"),
        ),
        precision=True,
    ),
    Bench(
        "talk",
        "an hour in one conversation, simulated, and ids of interrupted replies that were never heard",
        _talk,
        (
            Option("--minutes", seconds, 60.0, "of the conversation", "M"),
            Option("--replies", positive, 30, "with interruptions, in real time, for each limit"),
            Option("--ahead", seconds, (8.0, 2.0), "limits in seconds, beside none", "S", many=True),
            Option("--seed", int, 0, "of questions, interruptions and sampling"),
        ),
        precision=True,
    ),
    Bench(
        "engine",
        "replies at once against one alone",
        _engine,
        (
            Option("--dtype", str, None, "of a --model (default: bfloat16 if released)", choices=DTYPES),
            Option("--requests", positive, (1, 4, 8, 16), "at once", many=True),
            Option("--prompt", positive, 200, "ids of a prompt"),
            Option("--reply", positive, 64, "ids of a reply"),
            Option("--repetitions", positive, 3, ""),
        ),
        random_weights=True,
    ),
    Bench(
        "gguf",
        "steps of a GGUF file in llama.cpp, against the memory bandwidth",
        _gguf,
        (
            Option("--gguf", Path, None, "of the language model of --model", "FILE"),
            Option("--prompt", positive, 64, "ids of a prompt"),
            Option("--repetitions", positive, 3, ""),
        ),
    ),
    Bench(
        "server",
        "clients that talk with a real server, and clients that come and go",
        _server,
        (
            Option("--server", str, None, "a running one (default: start one for the bench)", "URL"),
            Option("--pid", positive, None, "its process, for --cycles with --server"),
            Option("--clients", int, 8, "that talk; 0 for none"),
            Option("--turns", positive, 3, "questions of each"),
            Option("--cycles", int, 0, "connections that come and go"),
            Option("--max-tokens", positive, None, "of an answer"),
            Option("--spread", seconds, 4.0, "time over which the clients begin", "S"),
        ),
    ),
    Bench(
        "soak",
        "a few clients for an hour: memory, tasks and descriptors of the server over time",
        _soak,
        (
            Option("--minutes", seconds, 60.0, "after a warm-up of a sixth of them", "M"),
            Option("--clients", positive, 2, "that visit one after another"),
            Option("--pause", seconds, 10.0, "mean pause between two visits of a client", "S"),
            Option("--sample", seconds, 10.0, "interval of the samples", "S"),
            Option("--seed", int, 0, "of the order of the visits"),
        ),
    ),
    Bench(
        "scale",
        "conversations over the cells of `duologue scale`, one of which is killed",
        _scale,
        (
            Option("--replicas", positive, 2, "cells"),
            Option("--conversations", positive, 16, "at once"),
            Option("--seconds", seconds, 10.0, "of sound alone, without and with Ray", "S"),
            Option("--max-tokens", positive, 60, "of an answer"),
            Option("--rounds", positive, 2, "answers of each client before the kill, and after it"),
        ),
    ),
)
