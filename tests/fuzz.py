"""Random events, requests and frames by seed, sent to a server; what it must never answer them with is collected.

python -m tests.fuzz --events 80000 --requests 15000 --broken 5000 --seed 1

starts a server with the tiny model. A fault is: a session that ends although every frame was valid, an error of the
server's own (5xx, or `server_error`), an answer without a message, or an error in the server's log.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import copy
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from duologue.client.connection import WIRE_RATE, Connection, encode_pcm, open_connection
from duologue.client.process import ServerProcess, start_server
from duologue.pcm import from_int16
from duologue.serving.protocol import CLIENT_EVENTS
from duologue.serving.settings import Settings
from duologue.sound_files import wav_bytes
from tests.live import GIVE_UP_S, MANUAL, question, settled, write_greedy_chatbot

BATCH = 100  # events of one session
AT_ONCE = 4
RESET = b""  # the server refused a request before it had read its body
REPORT_EVERY = 500  # jobs
MAX_CHARS = Settings().max_input_chars
FEW = {"max_output_tokens": 20}
TONE = encode_pcm(question()[:4800])
MESSAGE = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
SPOKEN = {"type": "message", "role": "user", "content": [{"type": "input_audio", "audio": TONE}]}
WIRE = {"type": "audio/pcm", "rate": 24000}
LISTEN = {
    "format": WIRE,
    "noise_reduction": {"type": "near_field"},
    "transcription": {"model": "whisper-1", "language": "en"},
    "turn_detection": {"type": "server_vad", "threshold": 0.5, "silence_duration_ms": 200, "create_response": False},
}
SESSION = {
    "type": "realtime",
    "instructions": "Be brief.",
    "output_modalities": ["audio"],
    "audio": {"input": LISTEN, "output": {"format": WIRE, "voice": "alloy", "speed": 1.0}},
    "max_output_tokens": 20,
    "truncation": "auto",
    "include": ["duologue.tokens", "duologue.timings", "duologue.playback"],
    "tools": [],
    "tool_choice": "auto",
    "tracing": "auto",
}
ANSWER = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "five"}]}
SEMANTIC = {"type": "semantic_vad", "eagerness": "low", "create_response": False}
# Valid events, which attacks change. A response costs the server most, so there are few of them.
GOOD: list[dict[str, Any]] = [
    {"type": "session.update", "session": SESSION},
    {"type": "session.update", "session": MANUAL},
    {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": SEMANTIC}}}},
    {"type": "input_audio_buffer.append", "audio": TONE},
    {"type": "input_audio_buffer.append", "audio": TONE},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear"},
    {"type": "output_audio_buffer.clear"},
    {"type": "playback.ack", "item_id": "mine", "played_ms": 100},
    {"type": "conversation.item.create", "item": {**MESSAGE, "id": "mine"}, "previous_item_id": "root"},
    {"type": "conversation.item.create", "item": SPOKEN},
    {"type": "conversation.item.create", "item": ANSWER, "previous_item_id": "mine"},
    {"type": "conversation.item.create", "item": {"type": "function_call_output", "call_id": "c", "output": "5"}},
    {"type": "conversation.item.retrieve", "item_id": "mine"},
    {"type": "conversation.item.truncate", "item_id": "mine", "content_index": 0, "audio_end_ms": 100},
    {"type": "conversation.item.delete", "item_id": "mine"},
    {"type": "response.create", "response": {**FEW, "output_modalities": ["audio"], "metadata": {"a": "b"}}},
    {"type": "response.create", "response": {"conversation": "none", "input": [MESSAGE], "max_output_tokens": 5}},
    {"type": "response.cancel"},
]
LONE = "\ud800"
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 1e308, float("inf"), float("-inf"), float("nan"), 2**31, 2**63, -(2**70)),
    *("", " ", "mine", "root", "inf", "auto", "none", "audio", "text", "user", "system", "message", "alloy", "\0"),
    *(LONE, f"a{LONE}b", "\ufeff", "\u202e", "e\u0301" * 50, "😀" * 20, "语" * 60, "9" * 400, "x" * 5000, "!!!"),
    *(TONE, TONE[:7], TONE[:-1], "audio/pcmu", "../../etc/passwd", "<script>", "%s%n", "{}", "[]"),
    *([], {}, [[]], [None], {"": ""}, {"type": "message"}, [{}], {"id": "mine"}, ["audio", "text"], [1, "2", None]),
]


WAV = wav_bytes(from_int16(question()[:12_000]), WIRE_RATE)
INLINE = {"type": "input_audio", "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/audio/speech",
        {"model": "tts-1", "voice": "nova", "input": "Five.", "response_format": "wav", "speed": 1.0},
    ),
    (
        "/v1/chat/completions",
        {
            "model": "any",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}, INLINE]},
            ],
            "modalities": ["text", "audio"],
            "audio": {"voice": "alloy", "format": "wav"},
            "max_completion_tokens": 5,
            "stream": False,
            "temperature": 0.5,
            "stop": None,
            "tools": [],
            "tool_choice": "none",
        },
    ),
    (
        "/v1/realtime/client_secrets",
        {
            "expires_after": {"anchor": "created_at", "seconds": 10},
            "session": SESSION,
            "origin": "https://app.example.org",
        },
    ),
]
FIELDS = {"model": "whisper-1", "response_format": "json", "language": "en", "temperature": "0", "stream": "false"}
SDP = (
    "v=0\r\no=- 1 2 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0 1\r\n"
    "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\nc=IN IP4 0.0.0.0\r\na=rtpmap:111 opus/48000/2\r\na=mid:0\r\na=sendrecv\r\n"
    "a=ice-ufrag:abcd\r\na=ice-pwd:0123456789012345678901\r\na=setup:actpass\r\na=rtcp-mux\r\n"
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\nc=IN IP4 0.0.0.0\r\na=mid:1\r\na=sctp-port:5000\r\n"
)
# What may stand before a request's body, besides its length and type.
HEADERS: list[tuple[str, str]] = [
    ("Authorization", "Bearer"),
    ("Authorization", "Basic eDp5"),
    ("Origin", "null"),
    ("Origin", "https://evil.example.org"),
    ("Host", "evil.example.org"),
    ("Accept-Encoding", "gzip, \xff"),
    ("Range", "bytes=5-2"),
    ("Range", "bytes=0-1,2-3,9999999999999-"),
    ("If-Modified-Since", "yesterday"),
    ("Content-Encoding", "gzip"),
    ("X-Forwarded-For", "a" * 4000),
]
BROKEN_FRAMES = [
    b"\x81\x02{}",
    b"\x8b\x80\0\0\0\0",
    b"\xf1\x80\0\0\0\0",
    b"\x09\x80\0\0\0\0",
    b"\x81\x82\0\0\0\0\xff\xfe",
    b"\x80\x80\0\0\0\0",
    b"\x88\x81\0\0\0\0\x03",
    b"\x88\x82\0\0\0\0\x00\x05",
    b"\x81\xff" + (2**62).to_bytes(8, "big") + b"\0\0\0\0",
]


class Fuzzer:
    """Draws everything that is sent; equal seeds draw equally."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        draw = self._random
        kind = draw.random()
        if kind < 0.75 or depth > 3:
            return copy.deepcopy(draw.choice(ODD))
        if kind < 0.8:
            return [self.value(depth + 1) for _ in range(draw.randrange(4))]
        if kind < 0.85:
            return {self.name(): self.value(depth + 1) for _ in range(draw.randrange(4))}
        if kind < 0.9:
            return draw.randrange(-(2**40), 2**40)
        return "".join(
            chr(draw.choice((draw.randrange(128), draw.randrange(0xD000)))) for _ in range(draw.randrange(30))
        )

    def name(self) -> str:
        names = (
            "type",
            "id",
            "item",
            "audio",
            "session",
            "response",
            "content",
            "text",
            "format",
            "event_id",
            "",
            LONE,
        )
        return self._random.choice(names)

    def changed(self, good: dict[str, Any]) -> dict[str, Any]:
        """A copy with one to three values replaced, left out or added."""
        event: dict[str, Any] = copy.deepcopy(good)
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):
            places = list(_places(event))
            if not places:
                break
            place, key = self._random.choice(places)
            change = self._random.randrange(4)
            if change == 0 and isinstance(place, dict):
                del place[key]
            elif change == 1 and isinstance(place, dict):
                place[self.name()] = self.value()
            elif change == 2 and isinstance(place, list):
                place.extend(copy.deepcopy(place) * self._random.choice((1, 1, 20)))
            else:
                place[key] = self.value()
        return event

    def damaged(self, text: str) -> str:
        """A text with some characters lost, doubled or replaced."""
        for _ in range(self._random.randrange(1, 4)):
            at = self._random.randrange(len(text) + 1)
            text = self._random.choice(
                (
                    text[:at],
                    text[at:],
                    text[:at] + text[at + 1 :],
                    text[:at] + self._random.choice('"{}[],:\0é') + text[at:],
                )
            )
        return text

    def frame(self) -> str | bytes:
        """One message of a WebSocket."""
        kind = self._random.random()
        good = self._random.choice(GOOD)
        if kind < 0.2:
            return json.dumps(good)
        if kind < 0.8:
            return json.dumps(self.changed(good))
        if kind < 0.88:
            return self.damaged(json.dumps(good))
        if kind < 0.94:
            fields = {self.name(): self.value() for _ in range(self._random.randrange(4))}
            return json.dumps({"type": self._random.choice([*CLIENT_EVENTS, "x"]), **fields})
        if kind < 0.97:
            return json.dumps(self.value())
        return self._random.randbytes(self._random.randrange(40))

    def request(self) -> bytes:
        """One HTTP request, which closes its connection."""
        draw = self._random
        kind = draw.random()
        if kind < 0.6:
            path, good = draw.choice(BODIES)
            given = good if draw.random() < 0.1 else self.changed(good)
            if isinstance(given.get("input"), str) and len(given["input"]) <= MAX_CHARS:
                given = {**given, "input": given["input"][:20]}  # a long one is read aloud for minutes
            text = json.dumps(given)
            body = (self.damaged(text) if draw.random() < 0.1 else text).encode("utf-8", "surrogatepass")
            kind_of = "application/json"
        elif kind < 0.75:
            path, (body, kind_of) = "/v1/audio/transcriptions", self._form()
        elif kind < 0.8:
            path, kind_of = "/v1/realtime/calls", "application/sdp"
            body = self.damaged(SDP).encode()
        else:
            path = draw.choice(
                ("/v1/models", "/v1/models/%00", "/v1/models/%ff", "/metrics", "/", "/..%2f..%2f", "/healthz")
            )
            path = draw.choice((path, path + "?" + "a" * 2000, "/" + draw.randbytes(4).hex()))
            body, kind_of = draw.choice((b"", b"{}", draw.randbytes(100))), "application/json"
        if draw.random() < 0.1:
            kind_of = draw.choice(
                ("", "text/plain", "multipart/form-data", "application/json; charset=utf-7", "a/b; c")
            )
        method = (
            draw.choice(("GET", "HEAD", "PUT", "OPTIONS", "DELETE")) if kind >= 0.8 or draw.random() < 0.05 else "POST"
        )
        lines = [f"{method} {path} HTTP/1.1", "Connection: close", f"Content-Length: {len(body)}"]
        more = [draw.choice(HEADERS)] if draw.random() < 0.1 else []
        lines += ["Host: 127.0.0.1"] * all(name != "Host" for name, _ in more)
        lines += [f"Content-Type: {kind_of}"] * bool(kind_of)
        lines += [f"{name}: {value}" for name, value in more]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def _form(self) -> tuple[bytes, str]:
        draw = self._random
        fields = dict(FIELDS)
        name = draw.choice([*fields, "prompt", "timestamp_granularities[]", "x"])
        fields[name] = draw.choice(("", "text", "srt", "vtt", "verbose_json", "true", "nan", "xx", "9" * 300))
        sound = bytearray(WAV)
        for _ in range(draw.choice((0, 1, 3))):
            sound[draw.randrange(64)] = draw.randrange(256)  # mostly the header
        sound = sound[: draw.choice((len(sound), len(sound), draw.randrange(len(sound))))]
        parts = [
            f'--b\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}'.encode()
            for key, value in fields.items()
        ]
        head = (
            f'--b\r\nContent-Disposition: form-data; name="file"; filename="{draw.choice(("a.wav", "", "a.mp3", "é"))}"'
        )
        parts.insert(draw.randrange(len(parts)), f"{head}\r\n\r\n".encode() + bytes(sound))
        body = b"\r\n".join([*parts, b"--b--\r\n"])
        return (body if draw.random() < 0.9 else body[: draw.randrange(len(body))]), "multipart/form-data; boundary=b"

    def broken(self) -> tuple[str, bytes]:
        """The query of a WebSocket's request, and bytes after it that no client library sends."""
        draw = self._random
        query = draw.choice(("model=x", "", "session_id=sess_0", "session_id=%00%ff", "model=" + "x" * 3000, "a=%"))
        return query, draw.choice((*BROKEN_FRAMES, draw.randbytes(draw.randrange(1, 60))))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of plain values."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(pairs):
        yield value, key
        yield from _places(child)


@dataclass
class Attack:
    """One run against a server.

    Attributes:
        answers: number of answers by error code or HTTP status.
        faults: what must not have happened, each with what was sent.
        num_sent: finished sessions, requests and broken connections.
    """

    url: str
    seed: int
    answers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_sent: int = 0

    def fault(self, sentence: str) -> None:
        self.faults.append(sentence)
        if len(self.faults) <= 50:
            print(sentence[:1500], flush=True)

    async def run(self, num_events: int, num_requests: int, num_broken: int) -> None:
        """Sends everything, in `AT_ONCE` connections at a time."""
        jobs = [self._events(seed, min(BATCH, num_events - at)) for seed, at in enumerate(range(0, num_events, BATCH))]
        jobs += [self._request(seed) for seed in range(num_requests)]
        jobs += [self._broken(seed) for seed in range(num_broken)]
        random.Random(self.seed).shuffle(jobs)
        waiting = iter(jobs)

        async def work() -> None:
            for job in waiting:
                await job
                self.num_sent += 1
                if self.num_sent % REPORT_EVERY == 0:
                    print(f"{self.num_sent} of {len(jobs)} jobs, {len(self.faults)} faults", flush=True)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    def _fuzzer(self, kind: int, number: int) -> Fuzzer:
        return Fuzzer(hash((self.seed, kind, number)))  # integers: the same in every process

    async def _events(self, number: int, num_events: int) -> None:
        """One session, which must still answer after its last event."""
        fuzzer = self._fuzzer(0, number)
        frames = [fuzzer.frame() for _ in range(num_events)]
        try:
            async with open_connection(self.url) as connection, asyncio.timeout(GIVE_UP_S):
                reading = asyncio.create_task(self._read(connection, number))
                for frame in frames:
                    await connection.socket.send(frame)
                    await asyncio.sleep(0)
                await connection.send({"type": "conversation.item.delete", "item_id": "probe", "event_id": "probe"})
                await reading
        except Exception as error:
            self.fault(f"session {number}: {type(error).__name__} {error}")

    async def _read(self, connection: Connection, number: int) -> None:
        while True:
            event = await connection.receive()
            if event["type"] == "response.done" and event["response"]["status"] == "failed":
                self.fault(f"session {number}: {event['response']['status_details']}")
            if event["type"] != "error":
                continue
            refusal = event["error"]
            if refusal["event_id"] == "probe":
                return
            self.answers[refusal["code"]] += 1
            if refusal["type"] != "invalid_request_error" or not 0 < len(refusal["message"]) < 2000:
                self.fault(f"session {number}: {refusal}")

    async def _request(self, number: int) -> None:
        sent = self._fuzzer(1, number).request()
        try:
            async with asyncio.timeout(GIVE_UP_S):
                answer = await self._exchange(sent)
            if answer == RESET:
                self.answers["reset"] += 1
                return
            status = int(answer.split(b" ", 2)[1])
        except Exception as error:
            self.fault(f"request {number}: {type(error).__name__} {error}: {sent[:300]!r}")
            return
        self.answers[str(status)] += 1
        if status >= 500:
            self.fault(f"request {number}: {answer[-300:]!r}: {sent[:600]!r}")

    async def _broken(self, number: int) -> None:
        """The server may close the connection, and nothing else may happen to it."""
        query, after = self._fuzzer(2, number).broken()
        key = base64.b64encode(bytes(16)).decode()
        head = f"GET /v1/realtime?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        head += f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await self._exchange(head.encode() + after)
        except Exception as error:
            self.fault(f"broken {number}: {type(error).__name__} {error}")

    async def _exchange(self, sent: bytes) -> bytes:
        """Sends bytes; returns what came until the server closed, or until the end was sent to it."""
        host, port = urlsplit(self.url).netloc.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            with contextlib.suppress(ConnectionError):
                writer.write(sent)
                await writer.drain()
                if b"Upgrade: websocket" in sent:
                    await reader.read(1)
                    writer.write_eof()
                return await reader.read(-1)
            return RESET
        finally:
            writer.close()


def log_size(server: ServerProcess) -> int:
    """Bytes of the server's log so far."""
    return server.log.stat().st_size


def errors_in_log(server: ServerProcess, since: int = 0) -> list[str]:
    """Errors of the server's own in its log after `since` bytes, each with the lines that follow.

    uvicorn reports text that is not UTF-8 as an error. aiortc leaves tasks behind when a call drops, and asyncio
    reports them later; they are no errors unless our code is in their stack.
    """
    lines = server.log.read_bytes()[since:].decode("utf-8", "replace").splitlines()
    found = []
    for number, line in enumerate(lines):
        if (" ERROR " not in line and "Traceback" not in line) or "Invalid UTF-8" in line:
            continue
        text = "\n".join(lines[number : number + 30])
        is_left_behind = any("never retrieved" in before for before in lines[max(number - 3, 0) : number + 1])
        if not is_left_behind or "/duologue/" in text:
            found.append(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Sends random events, requests and frames to a server.")
    parser.add_argument("--events", type=int, default=80_000)
    parser.add_argument("--requests", type=int, default=15_000)
    parser.add_argument("--broken", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_greedy_chatbot(Path(folder) / "tiny", max_tokens=40)
        with start_server(str(model)) as server:
            print(f"log of the server: {server.log}", flush=True)
            before, begun = settled(server), time.monotonic()
            attack = Attack(server.url, args.seed)
            asyncio.run(attack.run(args.events, args.requests, args.broken))
            print(f"{args.events + args.requests + args.broken} sent in {time.monotonic() - begun:.0f} s")
            print("answers:", dict(attack.answers.most_common()))
            faults = attack.faults + errors_in_log(server)
            print("\n".join([f"{len(faults)} faults", *errors_in_log(server)[:50]]))
            print("before:", before)
            print("after: ", settled(server))
            raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
