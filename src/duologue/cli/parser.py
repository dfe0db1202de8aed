"""The parser, arguments and checks shared by the commands."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from duologue.models import Card

FAILED = 1
KEY_VARIABLE = "DUOLOGUE_API_KEY"  # for clients
DTYPES = ("float32", "bfloat16", "float16")
DECODER_DTYPES = ("float32", "bfloat16")
SCHEMES = ("int8", "int4")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors as ValueError, one sentence each, with a similar name where there is one."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see: {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"{value!r} is not one of its values{_similar(str(value), map(str, action.choices))}: {choices}"
            )

    def parse_command(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses the arguments of a command. An unknown option is compared with those of that command.

        Raises:
            ValueError: an argument is missing, unknown or bad.
        """
        args, unknown = self.parse_known_args(argv)
        if unknown:
            parser: Parser = args.parser
            options = parser._option_string_actions
            raise ValueError(
                f"{unknown[0]} is not an argument of {parser.prog}{_similar(unknown[0].partition('=')[0], options)} "
                f"(see: {parser.prog} --help)"
            )
        return args


def _similar(name: str, names: Iterable[str]) -> str:
    """Returns ", did you mean NAME?" or an empty string."""
    found = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {found[0]}?" if found else ""


def add_command(
    commands: Any, name: str, run: Any, text: str, model: bool = False, examples: Sequence[str] = ()
) -> Parser:
    """Adds the parser of a command.

    Args:
        text: what it does, without a period.
        model: whether it takes `--model` and `--device`.
        examples: complete command lines, shown below the options.
    """
    parser = _add_parser(commands, name, text, examples)
    parser.set_defaults(run=run, parser=parser)
    add_json(parser)
    if model:
        parser.add_argument("--model", default="pocket", help="a preset or a model folder (default: pocket)")
        add_device(parser)
    return parser


def add_group(commands: Any, name: str, text: str, title: str, metavar: str, examples: Sequence[str] = ()) -> Any:
    """Adds a command of several commands and returns the place for them. Alone, it prints its help."""
    return add_subcommands(_add_parser(commands, name, text, examples), title, metavar)


def _add_parser(commands: Any, name: str, text: str, examples: Sequence[str]) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_subcommands(parser: Parser, title: str, metavar: str) -> Any:
    """Returns the place for the commands of a parser, which prints its help without one."""
    add_json(parser)
    parser.set_defaults(run=lambda _: parser.print_help(), parser=parser)
    return parser.add_subparsers(title=title, metavar=metavar, parser_class=Parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`. Without a default, so that one before the name of the command is kept."""
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, for programs")


def epilog(examples: Sequence[str]) -> str | None:
    return "\n".join(["examples:", *(f"  {example}" for example in examples)]) if examples else None


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the language model (default: bfloat16 if released)")
    parser.add_argument("--quantize", choices=SCHEMES, help="quantize the language model's matrices to 8 or 4 bits")
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="language model for llama.cpp, from `duologue convert --gguf`"
    )
    add_decoder_dtype(parser)


def add_text_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-model",
        metavar="PLACE",
        help="text model that answers, read aloud by the model: URL of a chat endpoint such as "
        "http://127.0.0.1:8080/v1, a transformers folder or a GGUF file (docs/talker.md)",
    )
    parser.add_argument(
        "--talker", metavar="FOLDER", help="run of `duologue train text-to-token` that reads its text aloud"
    )
    parser.add_argument(
        "--text-model-name", default="", metavar="NAME", help="model of the endpoint (default: the first it lists)"
    )


def text_model_options(args: argparse.Namespace) -> dict[str, str]:
    """Returns the arguments of `add_text_model` that were given, by option. Raises ValueError for a talker alone."""
    given = {"--text-model": args.text_model, "--text-model-name": args.text_model_name, "--talker": args.talker}
    given = {option: value for option, value in given.items() if value}
    if given and args.text_model is None:
        raise ValueError(f"{', '.join(given)} needs --text-model")
    return given


def add_decoder_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoder-dtype",
        choices=DECODER_DTYPES,
        help="dtype of a released decoder's U-Net (default: bfloat16 on CUDA)",
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def checked_output(output: Path) -> Path:
    """Checks that an audio file can be written, before any work.

    Raises:
        ValueError: the suffix is not an audio format, or the folder does not exist.
    """
    if output.suffix.lower() not in AUDIO_SUFFIXES:
        raise ValueError(f"{output} cannot be written: the name must end in {', '.join(AUDIO_SUFFIXES)}")
    if not output.parent.is_dir():
        raise ValueError(f"{output} cannot be written: the folder {output.parent} does not exist")
    return output


def warn_if_untrained(card: Card) -> None:
    if not card.trained:
        print(
            f"duologue: {card.name} is untrained: its weights are random, so its answers mean nothing", file=sys.stderr
        )
