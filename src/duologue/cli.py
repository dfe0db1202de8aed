"""The command line: `duologue COMMAND --help`.

Bad input ends in one sentence on stderr and exit code 2, never in a traceback. Everything heavy is imported by the
command that needs it, so that `--help` is there at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from duologue.training.recipes import STAGES

if TYPE_CHECKING:
    from duologue.events import Event, Timings
    from duologue.language.sampling import Sampling
    from duologue.models import Card
    from duologue.session import Reply

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
TEST_DATA = "runs/pocket/corpus/test"
DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("int8", "int4")
RANDOM_PRESETS = ("tiny", "9b")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failed run, 2 for bad input."""
    # Threads that spin while they wait for each other crawl on a busy machine. Has to be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        args = _parser().parse_args(argv)
        if "device" in args:
            args.device = _checked_device(args.device)
        return int(args.run(args) or 0)
    except ValueError as error:
        return _fail(str(error), BAD_INPUT)
    except ImportError as error:
        return _fail(f'{error.name or error} is not installed: pip install "duologue[train,eval]"', BAD_INPUT)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED)
    except RuntimeError as error:
        if type(error).__name__ == "NonFiniteLoss":
            return _fail(str(error), FAILED)
        raise


def _chat(args: argparse.Namespace) -> None:
    """Asks one question after the other in one conversation and prints the answers while they come."""
    if not args.questions and not args.text:
        raise ValueError("there is no question: give a sound file, or --text")
    from duologue.audio import load_audio, save_audio
    from duologue.chatbot import load

    outputs = _numbered(args.output, len(args.questions) + len(args.text))
    heard = [
        load_audio(path) for path in args.questions
    ]  # before the models: what is wrong with a file is said at once
    bot = load(args.model, args.device, args.dtype, args.quantize)
    _say_if_untrained(bot.models.card)
    session = bot.session(voice=args.voice, sampling=_sampling(args, bot.models.card))
    turns = []
    questions: list[str | Path] = [*args.questions, *args.text]
    for index, (question, output) in enumerate(zip(questions, outputs, strict=True)):
        if index < len(heard):
            wav, sample_rate = heard[index]
            session.feed(wav, sample_rate)
        else:
            session.write(str(question))
        transcript = None if args.json else _Transcript(f"you: {question}\n{bot.models.card.name}: ")
        reply = session.reply_now(text_only=args.text_only, on_event=transcript)
        written = output if output is not None and reply.audio.size else None
        if written is not None:
            save_audio(written, reply.audio, reply.sample_rate)
        if not args.json:
            print(f"\n{_times(reply.timings)}{f' -> {written}' if written else ''}")
        turns.append({"question": str(question), **_reply_json(reply, written)})
    if args.json:
        print(json.dumps({"model": bot.models.card.name, "trained": bot.models.card.trained, "turns": turns}))


def _tokenize(args: argparse.Namespace) -> None:
    import torch

    from duologue import rates
    from duologue.audio import load_audio, resample
    from duologue.chatbot import model_folder
    from duologue.checkpoint import file_hash
    from duologue.config import write_json
    from duologue.layers import Padded
    from duologue.models import load_tokenizer, tokenizer_folder

    wav, sample_rate = load_audio(args.audio)
    folder = model_folder(args.model)
    tokenizer = load_tokenizer(folder, args.device)
    heard = torch.from_numpy(resample(wav, sample_rate, rates.LISTEN_SAMPLE_RATE))[None].to(args.device)
    with torch.inference_mode():
        tokens = tokenizer(Padded.full(heard)).rows()[0].tolist()
    result = {
        "kind": "SpeechTokens",
        "version": 1,
        "tokenizer": file_hash(tokenizer_folder(folder)),
        "codebook_size": tokenizer.config.quantizer.codebook_size,
        "token_rate": rates.TOKEN_RATE,
        "audio_s": len(wav) / sample_rate,
        "tokens": tokens,
    }
    if args.output:
        write_json(args.output, result)
    if args.json:
        print(json.dumps(result))
    elif not args.output:
        print(*tokens)


def _synthesize(args: argparse.Namespace) -> None:
    import torch

    from duologue import rates
    from duologue.audio import save_audio
    from duologue.chatbot import model_folder
    from duologue.checkpoint import file_hash
    from duologue.layers import Padded
    from duologue.models import Card, load_decoder, tokenizer_folder

    output = _checked(args.output)
    tokens, tokenizer = _read_tokens(args.tokens)
    folder = model_folder(args.model)
    card = Card.load(folder)
    if tokenizer is not None and tokenizer != (own := file_hash(tokenizer_folder(folder))):
        raise ValueError(
            f"{args.tokens} was made with another tokenizer than that of {card.name} "
            f"({tokenizer[:12]} and {own[:12]}): its tokens mean something else there"
        )
    decoder = load_decoder(folder, args.device)
    _say_if_untrained(card)
    with torch.inference_mode():
        state = decoder.init_state(1, card.num_steps, card.guidance_scale, args.seed)
        wav = decoder(Padded.full(torch.tensor([tokens], device=args.device)), state).rows()[0]
    samples = wav.clamp(-1.0, 1.0).float().cpu().numpy()
    save_audio(output, samples, rates.SPEAK_SAMPLE_RATE)
    seconds = len(samples) / rates.SPEAK_SAMPLE_RATE
    if args.json:
        result = {"audio": str(output), "audio_s": seconds, "sample_rate": rates.SPEAK_SAMPLE_RATE}
        print(json.dumps({**result, "num_tokens": len(tokens)}))
    else:
        print(f"{len(tokens)} tokens, {seconds:.2f} s -> {output}")


def _train(args: argparse.Namespace) -> None:
    from duologue.training.recipes import train

    trained = train(args.stage, args.recipe, args.out, args.set, args.device)
    if args.json:
        print(json.dumps({"stage": trained.stage, "folder": str(trained.folder), "metrics": trained.metrics}))
    else:
        print(f"{trained.stage}: {', '.join(f'{k} {v:.4g}' for k, v in trained.metrics.items())} -> {trained.folder}")


def _plot(args: argparse.Namespace) -> None:
    from duologue.training.curves import plot

    picture = plot(args.folder, args.output)
    print(json.dumps({"picture": str(picture)}) if args.json else picture)


def _evaluate(args: argparse.Namespace) -> None:
    from duologue.chatbot import load, model_folder
    from duologue.checkpoint import file_hash, load_component
    from duologue.evaluation.pocket import evaluate_pocket
    from duologue.evaluation.report import format_table
    from duologue.evaluation.testset import load_test_set
    from duologue.tokenizer.recognizer import Recognizer, RecognizerConfig

    test_set = load_test_set(args.data).limited(args.limit)
    folder = model_folder(args.model)
    head = args.recognizer if args.recognizer is not None else folder / "recognizer"
    recognizer = None
    if args.recognizer is not None or head.is_dir():
        recognizer = load_component(head, Recognizer, RecognizerConfig).to(args.device)
    bot = load(folder, args.device)
    _say_if_untrained(bot.models.card)
    parts = ("tokenizer", "vocabulary", "language", "decoder")
    model = {
        "name": bot.models.card.name,
        "trained": bot.models.card.trained,
        "hashes": {part: file_hash(folder / part) for part in parts},
    }
    settings = {"num_dialogues": len(test_set.dialogues), "version": _version()}
    report = evaluate_pocket(bot, test_set, recognizer, model=model, settings=settings)
    written = report.save(args.output, args.suite) if args.output is not None else []
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        print(format_table(report))
        for path in written:
            print(f"-> {path}")


def _doctor(args: argparse.Namespace) -> int:
    from duologue.doctor import State, examine, format_checks

    checks = examine(args.model)
    print(json.dumps([asdict(check) for check in checks]) if args.json else format_checks(checks))
    return FAILED if any(check.state is State.BROKEN for check in checks) else 0


def _bench(args: argparse.Namespace) -> None:
    from duologue.audio import load_audio
    from duologue.chatbot import load, model_folder
    from duologue.evaluation.latency import format_latency, measure_latency

    question = args.question if args.question is not None else model_folder() / "question.wav"
    wav, sample_rate = load_audio(question)
    bot = load(args.model, args.device, args.dtype, args.quantize)
    latency = measure_latency(bot, wav, sample_rate, args.repetitions, args.warm_up)
    _say_if_untrained(bot.models.card)
    if not args.json:
        print(format_latency(latency))
    else:
        print(json.dumps(latency.to_json()))


def _convert(args: argparse.Namespace) -> None:
    from duologue.language.convert import convert
    from duologue.released import find_released

    released = find_released(args.folder)
    folder = args.folder if released is None else released.language
    convert(folder, args.output, args.dtype, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({"folder": str(args.output)}))
    else:
        print(f"{folder} -> {args.output}")


def _init_random(args: argparse.Namespace) -> None:
    from duologue.released import init_random

    init_random(args.preset, args.output, args.seed, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({"folder": str(args.output), "preset": args.preset}))
    else:
        print(f"{args.preset}, random weights: what it says means nothing -> {args.output}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see: {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(prog="duologue", description="A spoken chatbot: it listens, thinks and answers aloud.")
    parser.add_argument("--version", action="version", version=f"duologue {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    chat = _command(commands, "chat", _chat, "ask spoken or written questions and get spoken answers", model=True)
    chat.add_argument(
        "questions", nargs="*", type=Path, metavar="QUESTION", help="sound files, the turns of a conversation"
    )
    chat.add_argument("--text", action="append", default=[], help="a written question, after the spoken ones")
    chat.add_argument(
        "-o", "--output", type=Path, metavar="ANSWER", help="where the answer's sound goes (.wav, .flac, ...)"
    )
    _add_precision(chat)
    chat.add_argument("--text-only", action="store_true", help="answer in writing")
    chat.add_argument("--voice", default="", help="one of the model's voices")
    chat.add_argument("--seed", type=int, help="of the sampling")
    chat.add_argument("--temperature", type=float, help="of the sampling; 0 takes the most likely")
    chat.add_argument("--max-tokens", type=int, help="of one reply")
    chat.add_argument("--text-language", choices=("en", "zh"), help="keep the reply's text to this language")

    tokenize = _command(commands, "tokenize", _tokenize, "sound -> speech tokens", model=True)
    tokenize.add_argument("audio", type=Path, help="a sound file")
    tokenize.add_argument("-o", "--output", type=Path, metavar="TOKENS", help="a JSON file for `synthesize`")

    synthesize = _command(commands, "synthesize", _synthesize, "speech tokens -> sound", model=True)
    synthesize.add_argument(
        "tokens", help="a JSON file with a list of tokens or as `tokenize` writes it; - reads stdin"
    )
    synthesize.add_argument("-o", "--output", type=Path, required=True, metavar="SOUND", help="a sound file")
    synthesize.add_argument("--seed", type=int, default=0, help="of the decoder's noise")

    train = _command(commands, "train", _train, "train one part of a chatbot; goes on from the last checkpoint")
    stages = "; ".join(f"{name}: {what}" for name, what in STAGES.items())
    train.add_argument("stage", choices=STAGES, metavar="STAGE", help=stages)
    train.add_argument("--recipe", type=Path, required=True, help="a YAML file, see recipes/")
    train.add_argument("--out", type=Path, help="folder of the run (default: runs/STAGE)")
    train.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="like loop.num_steps=20"
    )
    _add_device(train)

    plot = _command(commands, "plot", _plot, "draw the curves of a training")
    plot.add_argument("folder", type=Path, help="folder of the run")
    plot.add_argument("-o", "--output", type=Path, help="the picture (default: curves.png in the folder)")

    evaluate = _command(commands, "evaluate", _evaluate, "judge a chatbot on a held-out test set", model=True)
    evaluate.add_argument("suite", choices=("pocket",), metavar="SUITE", help="pocket")
    evaluate.add_argument(
        "--data", type=Path, default=Path(TEST_DATA), help=f"folder of the test set (default: {TEST_DATA})"
    )
    evaluate.add_argument(
        "--recognizer", type=Path, help="the tokenizer's recognition head (default: recognizer/ in the model)"
    )
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="only N dialogues, for a quick look")
    evaluate.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="write the results there, as JSON and picture"
    )

    convert = _command(commands, "convert", _convert, "a released language model -> a folder for plain transformers")
    convert.add_argument("folder", type=Path, help="the language model's folder, or that of the whole released set")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a new folder")
    convert.add_argument("--dtype", choices=DTYPES, help="of the new weights (default: that of the old ones)")

    random = _command(commands, "init-random", _init_random, "write a released set with random weights, for load tests")
    random.add_argument("preset", choices=RANDOM_PRESETS, metavar="PRESET", help="tiny, or 9b: the published sizes")
    random.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    random.add_argument("--seed", type=int, default=0)

    doctor = _command(commands, "doctor", _doctor, "what this machine can run, what is missing, and what mends it")
    doctor.add_argument("--model", default="pocket", help="a preset or a model folder (default: pocket)")

    bench = _command(commands, "bench", _bench, "measure this machine", model=True)
    bench.add_argument(
        "name", choices=("latency",), metavar="NAME", help="latency: time to first audio, stage by stage"
    )
    _add_precision(bench)
    bench.add_argument("--question", type=Path, help="a sound file (default: the one of the package)")
    bench.add_argument("--repetitions", type=_positive, default=10)
    bench.add_argument("--warm-up", type=int, default=2, help="repetitions that are not counted")
    return parser


def _command(commands: Any, name: str, run: Any, text: str, model: bool = False) -> _Parser:
    parser: _Parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    if model:
        parser.add_argument("--model", default="pocket", help="a preset or a model folder (default: pocket)")
        _add_device(parser)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of the language model (default: bfloat16 if released)")
    parser.add_argument("--quantize", choices=SCHEMES, help="the language model's matrices in 8 or 4 bits")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _sampling(args: argparse.Namespace, card: Card) -> Sampling:
    names = ("seed", "temperature", "max_tokens", "text_language")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(card.sampling, **given)


def _checked(output: Path) -> Path:
    """Refuses a sound file that could not be written, before any work is done.

    Raises:
        ValueError: its name does not end like a sound file, or its folder does not exist.
    """
    if output.suffix.lower() not in SOUND_SUFFIXES:
        raise ValueError(f"{output} cannot be written: its name must end in {', '.join(SOUND_SUFFIXES)}")
    if not output.parent.is_dir():
        raise ValueError(f"{output} cannot be written: there is no folder {output.parent}")
    return output


def _numbered(output: Path | None, num: int) -> list[Path | None]:
    """One file for each of `num` answers: the name as it is, or answer-1.wav, answer-2.wav, ..."""
    if output is None:
        return [None] * num
    stem = _checked(output).stem
    return [output.with_stem(f"{stem}-{index + 1}") if num > 1 else output for index in range(num)]


def _checked_device(name: str) -> str:
    """The device, when torch has it here. Raises ValueError otherwise."""
    if name == "cpu":
        return name
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"there is no device {name!r} for torch on this machine ({reason})") from None
    return name


def _read_tokens(source: str) -> tuple[list[int], str | None]:
    """Tokens of a JSON file, and the hash of the tokenizer that made them, where it stands there."""
    name = "stdin" if source == "-" else source
    try:
        data = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{source}: there is no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{source} is a folder; give one file with tokens") from None
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not a text file; `duologue tokenize` makes tokens from sound") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON (line {error.lineno}: {error.msg})") from None
    tokens = data.get("tokens") if isinstance(data, dict) else data
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise ValueError(f"{name} must hold a list of whole numbers, alone or as 'tokens'")
    if not tokens:
        raise ValueError(f"{name} holds no tokens")
    return tokens, data.get("tokenizer") if isinstance(data, dict) else None


class _Transcript:
    """Prints the text of a reply as it comes, after a head. An error before the first event leaves nothing behind."""

    def __init__(self, head: str) -> None:
        self._head = head

    def __call__(self, event: Event) -> None:
        from duologue.events import TextDelta

        text = event.text if isinstance(event, TextDelta) else ""
        # Random weights say anything, control sequences of the terminal too.
        print(self._head + "".join(char if char.isprintable() else " " for char in text), end="", flush=True)
        self._head = ""


def _times(timings: Timings) -> str:
    if timings.first_audio_s is None or timings.real_time_factor is None:
        return f"{timings.total_s:.2f} s"
    return (
        f"time to first audio {timings.first_audio_s:.2f} s, {timings.audio_s:.1f} s of speech, "
        f"real-time factor {timings.real_time_factor:.2f}"
    )


def _reply_json(reply: Reply, written: Path | None) -> dict[str, Any]:
    return {
        "text": reply.text,
        "audio": None if written is None else str(written),
        "sample_rate": reply.sample_rate,
        "speech_tokens": list(reply.speech_tokens),
        "reason": str(reply.reason),
        "timings": {**asdict(reply.timings), "real_time_factor": reply.timings.real_time_factor},
    }


def _say_if_untrained(card: Card) -> None:
    if not card.trained:
        print(
            f"duologue: {card.name} is untrained: its weights are random, so its answers mean nothing", file=sys.stderr
        )


def _version() -> str:
    try:
        return importlib.metadata.version("duologue")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _fail(sentence: str, code: int) -> int:
    print(f"duologue: {' '.join(sentence.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
