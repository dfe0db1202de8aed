"""The parser, arguments and checks shared by the commands."""

from __future__ import annotations

import argparse
import sys
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
    """A parser that raises its errors as ValueError, one sentence each."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see: {self.prog} --help)")


def add_command(commands: Any, name: str, run: Any, text: str, model: bool = False) -> Parser:
    parser: Parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    if model:
        parser.add_argument("--model", default="pocket", help="a preset or a model folder (default: pocket)")
        add_device(parser)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the language model (default: bfloat16 if released)")
    parser.add_argument("--quantize", choices=SCHEMES, help="quantize the language model's matrices to 8 or 4 bits")
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="language model for llama.cpp, from `duologue convert --gguf`"
    )
    add_decoder_dtype(parser)


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


def checked_device(name: str) -> str:
    """Returns the name if torch supports the device. Raises ValueError otherwise."""
    if name == "cpu":
        return name
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"torch has no device {name!r} on this machine ({reason})") from None
    return name


def warn_if_untrained(card: Card) -> None:
    if not card.trained:
        print(
            f"duologue: {card.name} is untrained: its weights are random, so its answers mean nothing", file=sys.stderr
        )
