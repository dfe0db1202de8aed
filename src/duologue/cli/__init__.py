"""The command line: `duologue COMMAND --help`.

Bad input ends with one sentence on stderr and exit code 2, without a traceback. Each command imports its heavy modules
itself, so that `--help` is fast. Each file holds a group of commands: `add` adds their parsers, and each parser names
the function to run.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from duologue.cli import bench, chat, data, evaluate, models, scale, serve, talk, train
from duologue.cli.parser import FAILED, Parser, add_subcommands, epilog
from duologue.machine import version_of

BAD_INPUT = 2
INTERRUPTED = 130
EXAMPLES = (
    "duologue chat question.wav -o answer.wav",
    "duologue serve",
    "duologue doctor",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 if interrupted."""
    # Spinning threads are slow on a busy machine. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Disables telemetry. Must be set before onnxruntime is imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    _replace_unprintable()
    try:
        args = argument_parser().parse_command(argv)
        args.json = "json" in args
        args.argv = list(sys.argv[1:] if argv is None else argv)
        if getattr(args, "device", "cpu") != "cpu":
            from duologue.cuda import check_device

            check_device(args.device)
        return int(args.run(args) or 0)
    except ValueError as error:
        return _fail(str(error), BAD_INPUT)
    except ImportError as error:
        return _fail(
            f'{error.name or error} is not installed: run pip install -e ".[serve,talk,train,eval,data]" in the '
            "folder of Duologue",
            BAD_INPUT,
        )
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED)
    except RuntimeError as error:
        if type(error).__name__ in ("NonFiniteLoss", "RankLost"):
            return _fail(str(error), FAILED)
        raise


def argument_parser() -> Parser:
    """Returns the parser of all commands. Its namespaces hold the function to run as `run`."""
    parser = Parser(
        prog="duologue",
        description="A spoken chatbot: it listens, thinks and answers aloud.",
        epilog=epilog(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"duologue {version_of('duologue')}")
    commands = add_subcommands(parser, "commands", "COMMAND")
    for group in (chat, talk, serve, scale, models, data, train, evaluate, bench):
        group.add(commands)
    return parser


def _replace_unprintable() -> None:
    """Lets a console print `?` for what its encoding lacks. The default raises an error, and the answer is lost."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(sentence: str, code: int) -> int:
    print(f"duologue: {' '.join(sentence.split())}", file=sys.stderr)
    return code
