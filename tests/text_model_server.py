"""A chat endpoint that answers by a script: it writes slowly on request and keeps the requests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_S = 60.0


@dataclass(eq=False)
class ScriptedEndpoint:
    """The answers in order; the last one repeats.

    Attributes:
        answers: deltas of each answer, in the form of chat completion chunks. "WAIT" waits for `go_on`.
        requests: bodies of the requests.
        left: set when a client left before the end.
        status: of every answer.
    """

    answers: list[list[Any]]
    requests: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    status: int = 200
    url: str = ""


def words(text: str) -> list[Any]:
    """Deltas of one word each."""
    first, *rest = text.split(" ")
    return [{"content": first}, *({"content": f" {word}"} for word in rest)]


def call(name: str, *arguments: str, index: int = 0) -> list[Any]:
    """Deltas of one call, its arguments in fragments."""
    head = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
    parts = [{"index": index, "function": {"arguments": part}} for part in arguments]
    return [{"tool_calls": [head]}, *({"tool_calls": [part]} for part in parts)]


@contextlib.contextmanager
def endpoint(*answers: list[Any]) -> Iterator[ScriptedEndpoint]:
    script = ScriptedEndpoint(list(answers))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self._head("application/json")
            self.wfile.write(json.dumps({"data": [{"id": "scripted"}]}).encode())

        def do_POST(self) -> None:
            script.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            self._head("text/event-stream")
            try:
                for delta in answer:
                    if delta == "WAIT":
                        while not script.go_on.wait(0.05):
                            self._write(": still here\n\n")
                    else:
                        chunk = {"choices": [{"index": 0, "delta": delta}]}
                        self._write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n")
                self._write("data: [DONE]\n\n")
            except OSError:
                script.left.set()

        def _head(self, kind: str) -> None:
            self.send_response(script.status)
            self.send_header("Content-Type", kind)
            self.end_headers()

        def _write(self, text: str) -> None:
            self.wfile.write(text.encode())
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield script
    finally:
        script.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join(WAIT_S)
