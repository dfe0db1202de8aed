"""A server with the HTTP interface of vLLM: our own engine answers, in vLLM's stream format, with faults on demand."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from duologue.language.engine import PlainEngine
from duologue.language.vllm_plugin import read_arguments

CHUNKS = (1, 2, 3, 50, 7, 400)  # bytes of successive chunks
TEXT = "a\u2028b\x85c 字"  # JSON leaves line separators of Unicode as they are


class FakeVllm:
    """What the server does and what it saw.

    Attributes:
        fault: what goes wrong in the next completions, see `_Handler`; empty for nothing.
        after: ids before it goes wrong.
        cached: prompt ids that it reports as found in its cache.
        wrong_id: the id of the fault "wrong kind".
        requests: bodies of the completions.
        aborted: set when a client leaves in mid-reply.
        hold: replies wait for it before each id.
        hold_after: pairs of ids after which a reply clears `hold` itself; None for never.
    """

    def __init__(self, engine: PlainEngine, url: str) -> None:
        self.engine, self.url = engine, url
        self.fault, self.after = "", 4
        self.cached = self.wrong_id = 0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.aborted, self.hold = threading.Event(), threading.Event()
        self.hold.set()
        self.hold_after: int | None = None


@contextmanager
def fake_vllm(engine: PlainEngine) -> Iterator[FakeVllm]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    state = server.state = FakeVllm(engine, f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    @property
    def state(self) -> FakeVllm:
        return self.server.state  # type: ignore[attr-defined, no-any-return]

    def do_GET(self) -> None:
        models = [{"id": "tiny", "object": "model", "max_model_len": self.state.engine.max_positions}]
        self._send(200, {"object": "list", "data": [] if self.state.fault == "no model" else models})

    def do_POST(self) -> None:
        state = self.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state.requests.append(body)
        state.headers.append(dict(self.headers))
        if state.fault == "refused":
            error = {"message": "the prompt\nis longer than the model", "type": "BadRequestError", "code": 400}
            self._send(400, {"error": error})
        elif state.fault == "proxy":
            self._send(502, b"<html>bad gateway</html>")
        elif body.get("stream"):
            self._stream(body)
        else:
            self._send(200, self._whole(body))

    def _ids(self, body: dict[str, Any]) -> Iterator[int]:
        request = read_arguments(body["vllm_xargs"])
        assert request is not None
        if self.state.fault == "no processor":
            return iter([3] * body["max_tokens"])
        return self.state.engine.stream(body["prompt"], request.sampling, request.schedule)

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, "text": TEXT, "finish_reason": "length", "token_ids": [*self._ids(body)]}
        usage = {"prompt_tokens": len(body["prompt"]), "prompt_tokens_details": {"cached_tokens": self.state.cached}}
        return {"object": "text_completion", "model": "tiny", "choices": [choice], "usage": usage}

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sizes = itertools.cycle(CHUNKS)
        try:
            for event in self._events(body):
                data = (
                    event if isinstance(event, bytes) else f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
                )
                while data:
                    piece, data = data[: (size := next(sizes))], data[size:]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.state.aborted.set()
            self.close_connection = True
        except EOFError:  # the server dies
            self.close_connection = True

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any] | bytes]:
        state = self.state
        fault, last = state.fault, 0
        yield b": a comment\n\n"
        with _closing(self._ids(body)) as ids:
            for count, pair in enumerate(_pairs(ids)):
                if count == state.hold_after:
                    state.hold.clear()
                state.hold.wait(30.0)
                choice: dict[str, Any] = {"index": 0, "text": TEXT, "finish_reason": None, "token_ids": [*pair]}
                if count == 0:
                    choice["prompt_token_ids"] = body["prompt"]
                if fault and 2 * count >= state.after:
                    yield from self._broken(fault, choice)
                    return
                last = count
                yield {"object": "text_completion", "choices": [choice]}
        end = {"index": 0, "text": "", "finish_reason": "stop", "stop_reason": None, "token_ids": []}
        yield {"object": "text_completion", "choices": [end]}
        details = {"prompt_tokens_details": {"cached_tokens": state.cached}}
        yield {"choices": [], "usage": {"completion_tokens": 2 * last, **details}}
        yield b"data: [DONE]\n\n"

    def _broken(self, fault: str, choice: dict[str, Any]) -> Iterator[dict[str, Any] | bytes]:
        if fault == "dies":
            raise EOFError
        if fault == "error event":
            yield {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}
        elif fault == "length":
            yield {"choices": [{**choice, "finish_reason": "length", "token_ids": []}]}
        elif fault == "no ids":
            del choice["token_ids"]
            yield {"choices": [choice]}
        elif fault == "no choices":
            yield {"choices": "none"}
        elif fault == "empty choices":
            yield {"choices": [None]}
        elif fault == "not json":
            yield b"data: {oops\n\n"
        elif fault == "list":
            yield b"data: [1, 2]\n\n"
        elif fault == "wrong kind":
            yield {"choices": [{**choice, "token_ids": [self.state.wrong_id]}]}
        elif fault == "unknown id":
            yield {"choices": [{**choice, "token_ids": [10**6]}]}
        elif fault == "done":
            yield b"data: [DONE]\n\n"
        elif fault != "ends":
            raise AssertionError(fault)

    def _send(self, status: int, answer: dict[str, Any] | bytes) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def _closing(ids: Iterator[int]) -> Iterator[Iterator[int]]:
    try:
        yield ids
    finally:
        if hasattr(ids, "close"):
            ids.close()


def _pairs(ids: Iterator[int]) -> Iterator[tuple[int, ...]]:
    while pair := tuple(itertools.islice(ids, 2)):
        yield pair
