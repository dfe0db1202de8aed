"""`duologue serve`: invalid arguments fail with one sentence before a model is loaded; keys are never printed."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

import pytest

from duologue.cli import main
from duologue.cli.serve import KEYS_VARIABLE, given_settings

KEY = "secret-key-of-the-tests"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0"], "needs API keys: give --keys FILE or set DUOLOGUE_API_KEYS"),
        (["--port", "70000"], "'70000' is not a port from 0 to 65535"),
        (["--keys", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--origin", "example.org"], "an allowed origin looks like https://talk.example.org"),
        (["--idle-s", "0"], "idle_s must be above 0"),
        (["--idle-s", "long"], "'long' is not a number of seconds"),
        (["--sessions", "0"], "'0' is not a positive whole number"),
        (["--host", "no.such.host.invalid", "--port", "0"], "needs API keys"),
    ],
)
def test_invalid_arguments_fail_before_loading(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert sentence in output.err
    assert output.err.count("\n") == 1


def test_recordings_need_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["serve", "--record", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: another program uses this port" in capsys.readouterr().err


def _arguments(**given: Any) -> argparse.Namespace:
    names = (
        "max_sessions",
        "max_sessions_per_key",
        "idle_s",
        "session_s",
        "resume_s",
        "store",
        "store_s",
        "drain_s",
        "stall_s",
        "ahead_s",
        "write_out_numbers",
    )
    return argparse.Namespace(
        **{"host": "127.0.0.1", "port": 0, "origin": [], **dict.fromkeys((*names, "record_folder", "keys")), **given}
    )


def test_keys_come_from_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of friends\n{KEY}-1\n\n {KEY}-2 \n", encoding="utf-8")
    file.chmod(0o644)
    monkeypatch.setenv(KEYS_VARIABLE, f"{KEY}-3, {KEY}-1")
    assert given_settings(_arguments(keys=file))["api_keys"] == (f"{KEY}-3", f"{KEY}-1", f"{KEY}-2")
    output = capsys.readouterr().err
    assert f"chmod 600 {file}" in output
    assert KEY not in output
    file.chmod(0o600)
    given_settings(_arguments(keys=file))
    assert capsys.readouterr().err == ""
    file.write_text("# nothing\n", encoding="utf-8")
    monkeypatch.delenv(KEYS_VARIABLE)
    with pytest.raises(ValueError, match="holds no API key"):
        given_settings(_arguments(keys=file))


def test_only_given_arguments_change_settings() -> None:
    given = given_settings(_arguments(max_sessions=3, drain_s=1.5, record_folder=Path("records")))
    wanted = {"max_sessions": 3, "drain_s": 1.5, "record_folder": Path("records")}
    assert given == {"host": "127.0.0.1", "port": 0, "api_keys": (), "allowed_origins": (), **wanted}


def test_a_short_key_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "tooshort")
    assert main(["serve"]) == 2
    output = capsys.readouterr().err
    assert "at least 16 characters" in output
    assert "tooshort" not in output


def test_a_key_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_bytes(b"\xef\xbb\xbf" + KEY.encode() + b"\r\n")
    file.chmod(0o600)
    assert given_settings(_arguments(keys=file))["api_keys"] == (KEY,)
