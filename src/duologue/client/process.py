"""A server of one's own: `duologue serve` on a free port of this machine, stopped at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
START_S = 180.0
STOP_S = 15.0


@dataclass(frozen=True)
class ServerProcess:
    """A running server.

    Attributes:
        url: like http://127.0.0.1:40123.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

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

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1].removeprefix("duologue: ") if said else f"exit code {self.process.poll()}"


@contextlib.contextmanager
def start_server(
    model: str, arguments: Sequence[str] = (), env: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Starts `duologue serve` and waits until it is ready.

    Args:
        arguments: more of the command line of `duologue serve`.
        env: more of the environment.
    Raises:
        ValueError: it did not come up; the sentence is its own last one.
    """
    port = free_port()
    source = str(Path(__file__).parents[2])
    paths = os.pathsep.join(path for path in (source, os.environ.get("PYTHONPATH", "")) if path)
    command = [sys.executable, "-m", "duologue", "serve", "--host", HOST, "--port", str(port), "--model", model]
    with tempfile.TemporaryDirectory(prefix="duologue-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {}), "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C in the terminal is for the client, which then ends the server
            )
        server = ServerProcess(f"http://{HOST}:{port}", process, log)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: ServerProcess) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ValueError(f"the server did not start: {server.last_words()}")
        with contextlib.suppress(urllib.error.URLError, OSError), opener.open(f"{server.url}/readyz", timeout=5):
            return
        time.sleep(0.1)
    raise ValueError(f"the server was not ready within {START_S:.0f} s: {server.last_words()}")
