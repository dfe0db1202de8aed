"""A private server: `duologue serve` or `duologue scale` on a free port of this machine, stopped at the end."""

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
START_S = 900.0  # large models load slowly
STOP_S = 30.0  # exceeds the server's `drain_s`


@dataclass(frozen=True)
class ServerProcess:
    """A running server process.

    Attributes:
        url: such as http://127.0.0.1:40123.
        process: the process.
        log: file with its output.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> int:
        """Stops the server by SIGTERM, after `STOP_S` by SIGKILL; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


@contextlib.contextmanager
def start_server(model: str, arguments: Sequence[str] = (), command: str = "serve") -> Iterator[ServerProcess]:
    """Starts `duologue serve` without API keys and waits until it is ready.

    Args:
        model: preset or folder.
        arguments: additional arguments of the command.
        command: "serve", or "scale" for several cells.

    Raises:
        ValueError: the server did not start; the message ends with its last line of output.
    """
    source = str(Path(__file__).parents[2])
    paths = os.pathsep.join(path for path in (source, os.environ.get("PYTHONPATH", "")) if path)
    server_command = [sys.executable, "-m", "duologue", command, "--host", HOST, "--port", "0"]
    # The server stops even if this process is killed.
    server_command += ["--model", model, "--json", "--until-stdin-ends"]
    with tempfile.TemporaryDirectory(prefix="duologue-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*server_command, *arguments],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths, "DUOLOGUE_API_KEYS": ""},
                start_new_session=True,  # Ctrl-C reaches the client only; it then stops the server
            )
        server = ServerProcess("", process, log)
        try:
            yield ServerProcess(_url_when_ready(process, log), process, log)
        finally:
            server.stop()
            process.communicate()  # closes the pipe


def _url_when_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Returns the URL in the JSON line that the server prints when it is ready."""
    deadline = time.monotonic() + START_S
    while True:
        ended = process.poll() is not None
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            with contextlib.suppress(ValueError):
                ready = json.loads(line)
                if isinstance(ready, dict) and "url" in ready:
                    return str(ready["url"]).rstrip("/")
        if ended or time.monotonic() > deadline:
            output = [line.strip() for line in lines if line.strip()] or ["it printed nothing"]
            when = "" if ended else f" within {START_S:.0f} s"
            raise ValueError(f"the server did not start{when}: {output[-1].removeprefix('duologue: ')}")
        time.sleep(0.05)
