"""Benchmark `soak`: a few clients for an hour or more, and what the server's process holds over time.

Each client makes one visit after another, with pauses between them: spoken and written conversations, a resumed one,
one that is left without a goodbye, REST requests, client secrets, and faulty events. The order is random by seed.

After the warm-up and at the end all clients wait until the server is idle. Memory, tasks and file descriptors are
compared between these two moments. Samples between them are for the picture.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import AIMS
from benchmarks.plots import draw_lines
from benchmarks.server import Client, Footprint, footprint, settled
from benchmarks.speech import questions
from duologue.audio import resample
from duologue.client.connection import WIRE_RATE, Connection, ConnectionLost, open_connection
from duologue.client.conversation import TalkSettings
from duologue.evaluation.report import Row
from duologue.pcm import from_int16, to_int16
from duologue.progress import bar
from duologue.rates import LISTEN_SAMPLE_RATE
from duologue.sound_files import wav_bytes

MAX_GROWTH_MB = 30.0
WARM_UP_SHARE = 1 / 6  # of the duration; the server first fills its caches
VISIT_S = 300.0  # at most; a busy machine is no fault of the server
MAX_TOKENS = 60  # of a written answer
SPOKEN = TalkSettings(transcribe=True, max_tokens=150)
FAULTS = (
    "{",
    '{"type": "session.updat"}',
    '{"type": "input_audio_buffer.append", "audio": "###"}',
    '{"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": -1}',
    '{"type": "response.create", "response": {"max_output_tokens": 0}}',
)


@dataclass(frozen=True)
class Sample:
    """What the server's process held at one moment."""

    minute: float
    footprint: Footprint


@dataclass(frozen=True)
class Soak:
    """The result.

    Attributes:
        minutes: duration after the warm-up.
        visits: number by kind, warm-up included.
        before, after: without clients, after the warm-up and at the end.
        failed: visits that went wrong, by their sentence.
    """

    minutes: float
    warm_up_minutes: float
    num_clients: int
    pause_s: float
    visits: dict[str, int]
    before: Footprint
    after: Footprint
    failed: tuple[str, ...]
    samples: tuple[Sample, ...]

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        group = f"{self.num_clients} clients, {self.minutes:.0f} minutes"
        rows = [Row(group, f"visits: {kind}", float(num)) for kind, num in self.visits.items()]
        for name, held in (("before", self.before), ("after", self.after)):
            counts = f"{held.descriptors} descriptors, {held.threads} threads, {held.tasks} tasks"
            rows.append(Row(group, f"memory {name}", held.memory_mb, "MB", note=counts))
        rows += [Row(group, "failed", 1.0, note=sentence) for sentence in self.failed[:20]]
        before, after = self.before, self.after
        growth = {
            "memory_growth_mb": after.memory_mb - before.memory_mb,
            "task_growth": (after.tasks or 0) - (before.tasks or 0),
            "descriptor_growth": after.descriptors - before.descriptors,
            "failed": len(self.failed),
        }
        aims = {"memory_growth_mb": MAX_GROWTH_MB}
        return rows + [
            Row(AIMS, f"soak.{name}", float(value), aim=aims.get(name, 0.0)) for name, value in growth.items()
        ]

    def draw(self, figure: Any) -> None:
        """Memory, and what can be counted, over the minutes of the run."""
        left, right = figure.subplots(1, 2)
        minutes = [sample.minute for sample in self.samples]
        held = [sample.footprint for sample in self.samples]
        draw_lines(left, {"resident": (minutes, [one.memory_mb for one in held])}, "memory of the server", "min", "MB")
        counts = {
            "descriptors": [float(one.descriptors) for one in held],
            "threads": [float(one.threads) for one in held],
            "tasks": [float(one.tasks or 0) for one in held],
        }
        draw_lines(right, {name: (minutes, values) for name, values in counts.items()}, "counts", "min", "number")
        for axes in (left, right):
            axes.axvline(self.warm_up_minutes, color="black", linewidth=0.8, linestyle=":")


def measure_soak(
    url: str,
    pid: int,
    key: str = "",
    minutes: float = 60.0,
    num_clients: int = 2,
    pause_s: float = 10.0,
    sample_s: float = 10.0,
    seed: int = 0,
    said: Sequence[NDArray[np.int16]] | None = None,
) -> Soak:
    """Talks with a running server at low load.

    Args:
        url: as `open_connection` takes it.
        pid: the server's process, on this machine.
        minutes: duration after a warm-up of a sixth of it.
        pause_s: mean pause of a client between two visits.
        sample_s: interval of the samples.
        said: questions (S,) int16 at `WIRE_RATE`; None takes those of the package.
    """
    if said is None:
        said = [to_int16(resample(wav, LISTEN_SAMPLE_RATE, WIRE_RATE)) for wav in questions()]
    clients = [Visitor(url, key, random.Random(seed + index), pause_s, said) for index in range(num_clients)]
    return asyncio.run(_soak(url, key, pid, minutes, clients, pause_s, sample_s))


async def _soak(
    url: str, key: str, pid: int, minutes: float, clients: list[Visitor], pause_s: float, sample_s: float
) -> Soak:
    begun = time.monotonic()
    samples: list[Sample] = []
    warm_up_s = minutes * 60 * WARM_UP_SHARE

    async def sample() -> None:
        while True:
            found = await asyncio.to_thread(footprint, url, pid, key)
            samples.append(Sample((time.monotonic() - begun) / 60, found))
            await asyncio.sleep(sample_s)

    sampling = asyncio.create_task(sample())
    try:
        with bar(round((warm_up_s + minutes * 60) * len(clients)), "soak", "seconds of the clients") as line:
            await asyncio.gather(*(client.visit_for(warm_up_s, line.update) for client in clients))
            before = await settled(url, key, pid, None)
            warmed = time.monotonic()
            await asyncio.gather(*(client.visit_for(minutes * 60, line.update) for client in clients))
            after = await settled(url, key, pid, before)
    finally:
        sampling.cancel()
    return Soak(
        minutes=(time.monotonic() - warmed) / 60,
        warm_up_minutes=(warmed - begun) / 60,
        num_clients=len(clients),
        pause_s=pause_s,
        visits=dict(sorted(sum((client.visits for client in clients), Counter[str]()).items())),
        before=before,
        after=after,
        failed=tuple(sentence for client in clients for sentence in client.failed),
        samples=tuple(samples),
    )


class Visitor:
    """One client, which makes one visit after another.

    Attributes:
        visits: number of visits by kind.
        failed: what went wrong.
        kinds: the visits by name.
    """

    def __init__(
        self, url: str, key: str, draw: random.Random, pause_s: float, said: Sequence[NDArray[np.int16]]
    ) -> None:
        self._url, self._key, self._random, self._pause_s, self._said = url.rstrip("/"), key, draw, pause_s, said
        self.visits: Counter[str] = Counter()
        self.failed: list[str] = []
        self.kinds: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "spoken": self._spoken,
            "written": self._written,
            "resumed": self._resumed,
            "left in the middle": self._left,
            "faults": self._faults,
            "client secret": self._client_secret,
            "speech": self._speech,
            "transcription": self._transcription,
            "chat": self._chat,
        }

    async def visit_for(self, seconds: float, passed: Callable[[float], object]) -> None:
        """Makes visits for this time. Each one ends within `VISIT_S`."""
        end = time.monotonic() + seconds
        while (start := time.monotonic()) < end:
            await self.visit(self._random.choice(list(self.kinds)))
            await asyncio.sleep(self._random.expovariate(1 / self._pause_s))
            passed(min(time.monotonic(), end) - start)

    async def visit(self, kind: str) -> None:
        """Makes one visit."""
        try:
            async with asyncio.timeout(VISIT_S):
                await self.kinds[kind]()
        except (ValueError, RuntimeError, OSError) as error:
            self.failed.append(f"{kind}: {error or type(error).__name__}")
            print(self.failed[-1], file=sys.stderr, flush=True)
        self.visits[kind] += 1

    async def _spoken(self) -> None:
        index = self._random.randrange(len(self._said))
        client = Client(index, 0.0, 1, self._said, lambda: None)
        await client.run(self._url, self._key, SPOKEN)
        if client.errors:
            raise ValueError("; ".join(client.errors))
        if not client.turns:
            raise ValueError("no answer")

    async def _written(self) -> None:
        async with open_connection(self._url, key=self._key) as connection:
            await _ask(connection, "What is two plus three?")

    async def _resumed(self) -> None:
        """A conversation whose line breaks, and which goes on over another one."""
        async with open_connection(self._url, key=self._key) as connection:
            session_id = (await connection.receive())["session"]["id"]
            await _ask(connection, "Who are you?")
            connection.socket.transport.abort()
        url = f"{self._url}/v1/realtime?session_id={session_id}"
        async with open_connection(url, key=self._key) as connection:
            if (await connection.receive())["session"]["id"] != session_id:
                raise ValueError("the conversation was not resumed")
            await _ask(connection, "And who am I?")

    async def _left(self) -> None:
        async with open_connection(self._url, key=self._key) as connection:
            manual = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
            await connection.send({"type": "session.update", "session": manual})
            await connection.append(self._said[0][: WIRE_RATE // 2])
            await _ask(connection, "hello", "response.output_audio.delta")
            connection.socket.transport.abort()

    async def _faults(self) -> None:
        """Every fault is answered by an error, and the session goes on."""
        async with open_connection(self._url, key=self._key) as connection:
            for fault in self._random.sample(FAULTS, len(FAULTS)):
                await connection.socket.send(fault)
                await connection.receive_until("error")
            await _ask(connection, "hello")

    async def _client_secret(self) -> None:
        body = json.dumps({"session": {"type": "realtime"}}).encode()
        made = json.loads(await self._post("/v1/realtime/client_secrets", body))
        async with open_connection(self._url, key=made["value"]) as connection:
            await _ask(connection, "hello")

    async def _speech(self) -> None:
        kind = self._random.choice(("wav", "pcm", "mp3", "opus", "flac"))
        body = {"model": "tts-1", "voice": "nova", "input": "The answer is five.", "response_format": kind}
        if not await self._post("/v1/audio/speech", json.dumps(body).encode()):
            raise ValueError("no sound came")

    async def _transcription(self) -> None:
        head = 'Content-Disposition: form-data; name="file"; filename="question.wav"'
        sound = wav_bytes(from_int16(self._random.choice(self._said)), WIRE_RATE)
        body = f"--soak\r\n{head}\r\n\r\n".encode() + sound + b"\r\n--soak--\r\n"
        await self._post("/v1/audio/transcriptions", body, "multipart/form-data; boundary=soak")

    async def _chat(self) -> None:
        sound = {
            "data": base64.b64encode(wav_bytes(from_int16(self._said[0]), WIRE_RATE)).decode("ascii"),
            "format": "wav",
        }
        message = {"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}
        body = {"model": "any", "messages": [message], "max_completion_tokens": MAX_TOKENS}
        spoken = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
        await self._post("/v1/chat/completions", json.dumps({**body, **spoken}).encode())

    async def _post(self, path: str, body: bytes, kind: str = "application/json") -> bytes:
        """Returns the body of the answer. Raises OSError for a refusal."""
        headers = {"Content-Type": kind, **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        request = urllib.request.Request(f"{self._url}{path}", body, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def post() -> bytes:
            try:
                with opener.open(request, timeout=VISIT_S) as answer:
                    found: bytes = answer.read()
                    return found
            except urllib.error.HTTPError as error:
                raise OSError(f"{path}: {error.code} {error.read()[:300].decode('utf-8', 'replace')}") from None

        return await asyncio.to_thread(post)


async def _ask(connection: Connection, text: str, until: str = "response.done") -> None:
    """A written question; reads up to this event of the answer. Raises ConnectionLost if the answer failed."""
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    await connection.send({"type": "conversation.item.create", "item": item})
    await connection.send({"type": "response.create", "response": {"max_output_tokens": MAX_TOKENS}})
    last = (await connection.receive_until(until, "error", "response.done"))[-1]
    if last["type"] == "error":
        raise ConnectionLost(last["error"]["message"])
    if last["type"] == "response.done" and last["response"]["status"] == "failed":
        raise ConnectionLost("the answer failed")
