"""A small server for tests of the page: the page's files, and as much of the Realtime protocol as it needs, scripted.

Its ears are an energy threshold and its answers tones, so that every test knows what the page must have heard and said.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import mimetypes
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

RATE = 24_000
STATIC = Path(__file__).parent.parent / "src" / "duologue" / "serving" / "static"
# As the real server sends it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOGPROBS = "item.input_audio_transcription.logprobs"
LOUD, SILENCE_MS = 0.02, 500

ANSWER = "Two and three make five. Shall we go on with something harder?"


def _realtime(_: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return Subprotocol("realtime") if "realtime" in offered else None


def tone(seconds: float, hertz: float) -> np.ndarray[Any, np.dtype[np.int16]]:
    """16-bit samples at 24 kHz."""
    time = np.arange(round(seconds * RATE)) / RATE
    return (9000 * np.sin(2 * np.pi * hertz * time)).astype("<i2")


@dataclass
class Script:
    """What the server does next; tests change it.

    Attributes:
        seconds: length of an answer's sound, made of blocks of `block_s`.
        pause_s: from block to block, after the first.
        full: new conversations are refused.
        keeps: dropped conversations can be gone on with.
        busy: the next question finds an answer under way of which its client has not heard.
        transcribes: what was spoken comes back as text.
        answer: the words of an answer.
        about: further fields of the model.
        unsure: the log probability of the last word that was heard.
        prefix: the path below which all addresses lie.
        denies: connections are refused with this HTTP status, before they are open.
        plays_first: an answer is interrupted only once its client has reported that some of it was played. A busy
            browser hands over several turns of its microphone at once.
    """

    seconds: float = 2.4
    block_s: float = 0.4
    pause_s: float = 0.05
    full: bool = False
    keeps: bool = True
    transcribes: bool = True
    busy: bool = False
    key: str = ""
    answer: str = ANSWER
    heard: str = "What is two plus three?"
    about: dict[str, Any] = field(default_factory=dict)
    unsure: float | None = None
    prefix: str = ""
    denies: int = 0
    plays_first: bool = False


@dataclass
class PageServer:
    """Runs in a thread of its own. `received` holds every event of every client, with the length of its sound only;
    `sound` all sound that came, as bytes; `asked` the path of every request. `/frame` frames the page `framed`."""

    script: Script = field(default_factory=Script)
    received: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    sound: bytearray = field(default_factory=bytearray)
    framed: str = ""
    policy: str = POLICY
    port: int = 0
    _sockets: set[ServerConnection] = field(default_factory=set)
    _known: set[str] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 10**6)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.script.prefix}/"

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of one type that clients have sent."""
        return [event for event in self.received if event["type"] == kind]

    def drop(self) -> None:
        """Cuts every line, as a network does."""

        async def cut() -> None:
            for socket in list(self._sockets):
                socket.transport.abort()

        self._do(cut())

    def close(self, code: int, reason: str) -> None:
        """Closes every line in good order."""

        async def end() -> None:
            for socket in list(self._sockets):
                await socket.close(code, reason)

        self._do(end())

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(300)

    @contextlib.contextmanager
    def running(self) -> Iterator[PageServer]:
        started: Future[int] = Future()
        stop = asyncio.Event()

        async def main() -> None:
            async with serve(
                self._talk,
                "127.0.0.1",
                0,
                process_request=self._page,
                select_subprotocol=_realtime,
                ping_interval=None,  # a browser on a busy machine answers no ping in time
            ) as server:
                started.set_result(server.sockets[0].getsockname()[1])
                await stop.wait()

        thread = threading.Thread(target=lambda: self._loop.run_until_complete(main()), daemon=True)
        thread.start()
        self.port = started.result(300)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(stop.set)
            thread.join(300)

    def _page(self, connection: ServerConnection, request: Request) -> Response | None:
        path = urlsplit(request.path).path
        self.asked.append(request.path)
        if not path.startswith(f"{self.script.prefix}/"):
            return self._answer(HTTPStatus.NOT_FOUND, b"not below the prefix", "text/plain")
        path = path.removeprefix(self.script.prefix)
        if path == "/v1/realtime":
            denies = self.script.denies
            return self._answer(HTTPStatus(denies), b"denied", "text/plain") if denies else None
        if path == "/frame":
            frame = f'<!doctype html><title>A frame</title><iframe src="{self.framed}" allow="microphone"></iframe>'
            return self._answer(HTTPStatus.OK, frame.encode(), "text/html", policy="")
        if path == "/v1/models":
            model = {"id": "mock", "object": "model", "trained": True, **self.script.about}
            body = json.dumps({"object": "list", "data": [model]}).encode()
            return self._answer(HTTPStatus.OK, body, "application/json")
        file = STATIC / (path.lstrip("/") or "index.html")
        if not file.is_file():
            return self._answer(HTTPStatus.NOT_FOUND, b"not here", "text/plain")
        return self._answer(HTTPStatus.OK, file.read_bytes(), mimetypes.guess_type(file.name)[0] or "text/plain")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, policy: str | None = None) -> Response:
        headers = Headers(
            {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Content-Security-Policy": self.policy if policy is None else policy,
                "Cache-Control": "no-store",
            }
        )
        return Response(status.value, status.phrase, headers, body)

    async def _talk(self, socket: ServerConnection) -> None:
        query = parse_qs(urlsplit(socket.request.path if socket.request else "").query)
        if self.script.full:
            await socket.close(1013, "the server is full: it holds 2 conversations at a time; try again later")
            return
        offered = socket.request.headers.get("Sec-WebSocket-Protocol", "") if socket.request else ""
        if self.script.key and self.script.key not in offered:
            await socket.close(1008, "this server needs an API key")
            return
        asked = query.get("session_id", [""])[0]
        name = asked if asked in self._known and self.script.keeps else f"sess_{next(self._numbers)}"
        self._known.add(name)
        self._sockets.add(socket)
        with contextlib.suppress(ConnectionClosed):
            await _Talk(self, socket, name).run()
        self._sockets.discard(socket)


class _Talk:
    """One conversation."""

    def __init__(self, server: PageServer, socket: ServerConnection, name: str) -> None:
        self.server, self.socket, self.name = server, socket, name
        self.detection: dict[str, Any] | None = None
        self.include: list[str] = []
        self.modality = "audio"
        self.speaking = ""
        self.heard_ms = self.loud_ms = self.quiet_ms = 0.0
        self.answering: asyncio.Task[None] | None = None
        self.played = True  # some of the latest answer

    def _id(self, kind: str) -> str:
        return f"{kind}_{next(self.server._numbers)}"

    async def send(self, kind: str, /, **values: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, "event_id": self._id("event"), **values}))

    async def run(self) -> None:
        await self.send("session.created", session={"type": "realtime", "id": self.name, "model": "mock"})
        try:
            async for message in self.socket:
                event = json.loads(message)
                self.server.received.append({**event, "audio": len(event["audio"])} if "audio" in event else event)
                await self.take(event)
        finally:
            if self.answering:
                self.answering.cancel()

    async def take(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "session.update":
                session = event["session"]
                listening = session.get("audio", {}).get("input", {})
                self.detection = listening.get("turn_detection", self.detection)
                self.include = session.get("include", self.include)
                [self.modality] = session.get("output_modalities", [self.modality])
                await self.send("session.updated", session=session)
            case "input_audio_buffer.append":
                pcm = base64.b64decode(event["audio"])
                self.server.sound += pcm
                await self.hear(np.frombuffer(pcm, "<i2"))
            case "input_audio_buffer.commit":
                await self.commit(self._id("item"))
            case "conversation.item.create":
                await self.send("conversation.item.added", item={**event["item"], "status": "completed"})
                await self.send("conversation.item.done", item={**event["item"], "status": "completed"})
            case "conversation.item.truncate":
                values = {key: event[key] for key in ("item_id", "content_index", "audio_end_ms")}
                await self.send("conversation.item.truncated", **values)
            case "playback.ack":
                self.played = self.played or event["played_ms"] > 0
            case "response.create":
                self.answer()
                if self.server.script.busy:
                    self.server.script.busy = False
                    about = {"code": "conversation_already_has_active_response", "message": "wait", "param": None}
                    await self.send("error", error={"type": "invalid_request_error", **about})
            case "response.cancel":
                self.cancel()

    def answer(self) -> None:
        self.cancel()
        self.played = False
        self.answering = asyncio.create_task(self.reply())

    def cancel(self) -> None:
        if self.answering:
            self.answering.cancel()

    async def hear(self, pcm: np.ndarray[Any, np.dtype[np.int16]]) -> None:
        duration_ms = 1000 * len(pcm) / RATE
        self.heard_ms += duration_ms
        if not self.detection:
            return
        loud = bool(np.sqrt(np.mean((pcm / 32768) ** 2)) > LOUD)
        loud = loud and (self.played or not self.server.script.plays_first)
        self.loud_ms = self.loud_ms + duration_ms if loud else 0.0
        self.quiet_ms = 0.0 if loud else self.quiet_ms + duration_ms
        if not self.speaking and self.loud_ms > 60:
            self.speaking = self._id("item")
            await self.send(
                "input_audio_buffer.speech_started", item_id=self.speaking, audio_start_ms=round(self.heard_ms)
            )
            if self.detection.get("interrupt_response"):
                self.cancel()
        elif self.speaking and self.quiet_ms > SILENCE_MS:
            item, self.speaking = self.speaking, ""
            await self.send("input_audio_buffer.speech_stopped", item_id=item, audio_end_ms=round(self.heard_ms))
            await self.commit(item)
            self.answer()

    async def commit(self, item: str) -> None:
        content = [{"type": "input_audio", "transcript": None}]
        whole = {"id": item, "type": "message", "role": "user", "status": "completed", "content": content}
        await self.send("input_audio_buffer.committed", item_id=item)
        await self.send("conversation.item.added", item=whole)
        await self.send("conversation.item.done", item=whole)
        if self.server.script.transcribes:
            kind = "conversation.item.input_audio_transcription.completed"
            heard, unsure = self.server.script.heard, self.server.script.unsure
            tokens = [f" {word}" for word in heard.split()]
            scores = [-0.01] * (len(tokens) - 1) + [unsure]
            told: dict[str, Any] = {
                "logprobs": [{"token": a, "logprob": b, "bytes": []} for a, b in zip(tokens, scores, strict=True)]
            }
            told = told if unsure is not None and LOGPROBS in self.include else {}
            await self.send(kind, item_id=item, content_index=0, transcript=heard, **told)

    async def reply(self) -> None:
        response, item = self._id("resp"), self._id("item")
        status = "cancelled"
        message = {"id": item, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        await self.send("response.created", response={"id": response, "status": "in_progress", "output": []})
        await self.send("response.output_item.added", response_id=response, output_index=0, item=message)
        await self.send("conversation.item.added", item=message)
        try:
            async for kind, values in self.pieces(response):
                if not kind.startswith("duologue."):
                    values |= {"item_id": item, "output_index": 0, "content_index": 0}
                await self.send(kind, response_id=response, **values)
            status = "completed"
        finally:
            done = {"id": response, "status": status, "output": [message]}
            with contextlib.suppress(ConnectionClosed):
                await self.send("response.done", response=done)

    async def pieces(self, response: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        script = self.server.script
        words = script.answer.split(" ")
        if self.modality == "text":
            if "duologue.tokens" in self.include:
                yield "duologue.tokens", {"kind": "text", "count": len(words), "ids": list(range(len(words)))}
            yield "response.output_text.delta", {"delta": script.answer}
            yield "response.output_text.done", {"text": script.answer}
            return
        blocks = math.ceil(script.seconds / script.block_s)
        num_text = math.ceil(len(words) / blocks)
        code = 7
        await asyncio.sleep(0.05)
        for block in range(blocks):
            if block:
                await asyncio.sleep(script.pause_s)
            said = words[block * num_text : (block + 1) * num_text]
            if said:
                if "duologue.tokens" in self.include:
                    yield "duologue.tokens", {"kind": "text", "count": 2 * len(said), "ids": list(range(2 * len(said)))}
                delta = (" " if block else "") + " ".join(said)
                yield "response.output_audio_transcript.delta", {"delta": delta}
            count = round(script.block_s * 12.5)
            codes = [(code := (code * 137 + 29) % 2048) for _ in range(count)]
            if "duologue.tokens" in self.include:
                yield "duologue.tokens", {"kind": "speech", "count": count, "ids": codes}
            pcm = tone(min(script.block_s, script.seconds - block * script.block_s), 500)
            yield "response.output_audio.delta", {"delta": base64.b64encode(pcm.tobytes()).decode()}
        yield "response.output_audio.done", {}
        yield "response.output_audio_transcript.done", {"transcript": script.answer}
        if "duologue.timings" in self.include:
            stages = {"tokenizer": 41.0, "language": 640.0, "flow": 310.0, "vocoder": 122.0}
            first = {"tokenize_ms": 18.0, "prefill_ms": 64.0, "first_text_ms": 91.0, "first_audio_ms": 322.0}
            yield (
                "duologue.timings",
                {
                    **first,
                    "total_ms": 1150.0,
                    "audio_ms": 1000 * script.seconds,
                    "stages": stages,
                },
            )
