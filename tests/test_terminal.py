"""The terminal as people meet it: help, near misses, `--json` anywhere, consoles of small encodings, progress."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from duologue import doctor
from duologue.cli import argument_parser, main
from duologue.cli.parser import Parser
from duologue.progress import steps

Capture = pytest.CaptureFixture[str]


def parsers(parser: Parser) -> Iterator[Parser]:
    """A parser and those of all its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from parsers(one)


ALL = {parser.prog: parser for parser in parsers(argument_parser())}


@pytest.mark.parametrize("command", [[], ["data"], ["evaluate"], ["bench"]])
def test_a_command_alone_prints_its_help(command: list[str], capsys: Capture) -> None:
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: {' '.join(['duologue', *command])} ")
    assert "examples:" in out
    assert err == ""


@pytest.mark.parametrize("name", ALL)
def test_every_help_has_examples_that_parse(name: str) -> None:
    examples = [line.strip() for line in (ALL[name].epilog or "").splitlines()[1:]]
    assert examples
    for example in examples:
        program, *arguments = shlex.split(example)
        assert program == "duologue"
        args = argument_parser().parse_command(arguments)
        assert args.parser.prog.startswith(name.removesuffix("duologue"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("caht", "chat"),
        ("bench latncy", "latency"),
        ("chat --modle pocket", "--model"),
        ("serve --prot=80", "--port"),
        ("doctor --jsn", "--json"),
    ],
)
def test_a_near_miss_is_answered_with_the_name(typed: str, meant: str, capsys: Capture) -> None:
    assert main(typed.split()) == 2
    error = capsys.readouterr().err
    assert f"did you mean {meant}?" in error
    assert error.count("\n") == 1


def test_what_is_like_nothing_gets_no_suggestion(capsys: Capture) -> None:
    assert main(["chat", "--zzzzzz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["--json doctor", "doctor --json", "--json doctor --json"])
def test_json_stands_before_or_after_the_command(
    command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duologue.doctor.examine", lambda model: [doctor.Check("all", doctor.CheckState.OK, model)])
    assert main(command.split()) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "all", "state": "ok", "found": "pocket", "mend": ""}]


class Console(io.TextIOWrapper):
    """A console of Windows, which has 256 characters."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, encoding="cp1252", write_through=True)


def test_a_console_without_a_character_prints_a_question_mark(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = Console(), Console()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    command = [
        "chat",
        "--text",
        "Zwei plus drei é 你好?",
        "--text-only",
        "--model",
        str(tiny_folder),
        "--max-tokens",
        "4",
    ]
    assert main(command) == 0
    assert out.file.getvalue().decode("cp1252").startswith("you: Zwei plus drei é ???\ntiny: ")
    assert main(["chat", "没有.wav"]) == 2
    assert "??.wav: there is no such file" in err.file.getvalue().decode("cp1252")


def test_a_long_command_says_step_and_time_from_the_first_moment(capsys: Capture) -> None:
    seen = []
    for number in steps(range(3), "part 1 of 2, replies"):
        seen.append((number, capsys.readouterr().err))
        time.sleep(0.01)
    assert seen[0][0] == 0
    assert "part 1 of 2, replies: 0 of 3 steps, 00:00 so far, ? left" in seen[0][1]  # before any work
    assert "replies: 3 of 3 steps, 00:00 so far, 00:00 left" in capsys.readouterr().err


def test_bench_latency_is_never_silent(
    question: Path, tiny_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--question", str(question), "--repetitions", "1", "--warm-up", "0", "--model", str(tiny_folder)]

    def stop(*_: object) -> None:
        raise ValueError("the parts before are enough")

    monkeypatch.setattr("benchmarks.latency.measure_commits", stop)
    assert main(["bench", "latency", *few]) == 2
    shown = capsys.readouterr().err
    assert f"loading {tiny_folder}" in shown
    for part in ("1 of 6, speech tokenizer", "2 of 6, language model", "3 of 6, speech decoder", "4 of 6, replies"):
        assert f"part {part}: 0 of 1 steps" in shown


class PortAudioError(Exception):
    """As sounddevice raises it."""


def sounddevice(devices: dict[str, dict[str, Any]], opens: bool = True) -> SimpleNamespace:
    def query_devices(kind: str) -> dict[str, Any]:
        if kind not in devices:
            raise PortAudioError(f"no {kind} device")
        return devices[kind]

    def check(**settings: Any) -> None:
        if not opens:
            raise PortAudioError("Device unavailable")

    return SimpleNamespace(
        query_devices=query_devices,
        check_input_settings=check,
        check_output_settings=check,
        get_portaudio_version=lambda: (1, "PortAudio V19.7.0"),
        PortAudioError=PortAudioError,
    )


def test_the_doctor_opens_portaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"name": "Built-in", "default_samplerate": 48_000.0}

    def states(module: object) -> dict[str, str]:
        monkeypatch.setitem(sys.modules, "sounddevice", module)
        return {check.name: check.state.value for check in doctor._sound()}

    assert states(sounddevice({"input": one, "output": one})) == dict.fromkeys(
        ("PortAudio", "microphone", "loudspeaker"), "ok"
    )
    assert states(sounddevice({"output": one}))["microphone"] == "missing"
    assert states(sounddevice({"input": one, "output": one}, opens=False))["loudspeaker"] == "missing"
    assert states(None) == {}  # not installed: its extra says so

    class NoLibrary:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice")
    monkeypatch.setattr(sys, "meta_path", [NoLibrary(), *sys.meta_path])
    [check] = doctor._sound()
    assert (check.state, check.found) == ("missing", "for duologue talk: PortAudio library not found")
    assert "libportaudio2" in check.mend
