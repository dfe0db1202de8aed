"""A server of one's own: `duologue serve` on a free port of this machine, stopped at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
START_S = 900.0  # large models load slowly, and one that fails says so at once
STOP_S = 30.0  # longer than the server lets answers finish


@dataclass(frozen=True)
class ServerProcess:
    """A running server.

    Attributes:
        url: like http://127.0.0.1:40123.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path  # everything it printed

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> int:
        """Ends it as a service manager would, by SIGTERM, then by force; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


@contextlib.contextmanager
def start_server(model: str, arguments: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """Starts `duologue serve` on this machine, without API keys, and waits until it is ready.

    Args:
        arguments: more of the command line of `duologue serve`.
    Raises:
        ValueError: it did not come up; the sentence is its own last one.
    """
    source = str(Path(__file__).parents[2])
    paths = os.pathsep.join(path for path in (source, os.environ.get("PYTHONPATH", "")) if path)
    command = [sys.executable, "-m", "duologue", "serve", "--host", HOST, "--port", "0", "--model", model, "--json"]
    command.append("--until-stdin-ends")  # which it does however this process ends
    with tempfile.TemporaryDirectory(prefix="duologue-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths, "DUOLOGUE_API_KEYS": ""},
                start_new_session=True,  # Ctrl-C in the terminal is for the client, which then ends the server
            )
        server = ServerProcess("", process, log)
        try:
            yield ServerProcess(_url_when_ready(process, log), process, log)
        finally:
            server.stop()
            process.communicate()  # closes the pipe


def _url_when_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address in the line of JSON that the server prints when clients can come."""
    deadline = time.monotonic() + START_S
    while True:
        ended = process.poll() is not None
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                if isinstance(told, dict) and "url" in told:
                    return str(told["url"]).rstrip("/")
        if ended or time.monotonic() > deadline:
            said = [line.strip() for line in lines if line.strip()] or ["it said nothing"]
            when = "" if ended else f" within {START_S:.0f} s"
            raise ValueError(f"the server did not start{when}: {said[-1].removeprefix('duologue: ')}")
        time.sleep(0.05)
