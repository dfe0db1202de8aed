"""A real server with the tiny model and a scripted engine, and a plain client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.sync.client import connect
from websockets.sync.connection import Connection

import duologue
from duologue.audio import resample
from duologue.conversation.chatbot import Chatbot
from duologue.interleave import INTERLEAVED, Schedule, weave
from duologue.language.sampling import Sampling
from duologue.models import Models
from duologue.serving.app import create_app
from duologue.serving.items import SavedConversation
from duologue.serving.server import Server, listen
from duologue.serving.service import Service
from duologue.serving.settings import Settings
from duologue.sound_files import load_audio
from duologue.vocabulary import Vocabulary

TIMEOUT_S = 300.0  # a busy machine is not a failing test
TEXT = "Seven plus five is twelve."
NUM_SPEECH = 45
QUESTION = Path(duologue.__file__).parent / "pocket" / "question.wav"

Event = dict[str, Any]


class ScriptedEngine:
    """An engine that always generates the same reply, and pauses on request.

    Attributes:
        hold_after: number of ids after which a reply waits for `release`; None does not wait.
        prompts: the prompts of all replies.
        num_prefilled: number of prompt ids reported as cached.
    """

    def __init__(self, vocabulary: Vocabulary, max_positions: int = 512) -> None:
        self.max_positions, self.max_sessions, self.cached_tokens, self.running = max_positions, 16, 0, 0
        self.hold_after: int | None = None
        self.prompts: list[list[int]] = []
        self.num_prefilled = 0
        self.failure: Exception | None = None
        self._vocabulary = vocabulary
        self._released = threading.Event()
        self._cancelled: set[str] = set()

    def hold(self, after: int) -> None:
        self._released.clear()
        self.hold_after = after

    def release(self) -> None:
        self.hold_after = None
        self._released.set()

    def reply(self, schedule: Schedule) -> list[int]:
        text = self._vocabulary.encode_text(TEXT)
        if not schedule.speech_run:
            return text
        codes = [index % self._vocabulary.codebook_size for index in range(NUM_SPEECH)]
        return weave(text if schedule.text_run else [], self._vocabulary.speech_ids(codes), schedule)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        self.prompts.append(list(prompt_ids))
        if self.failure is not None:
            raise self.failure
        ids = self.reply(schedule)[: sampling.max_tokens]
        for index, token in enumerate(ids):
            while self.hold_after is not None and index >= self.hold_after and not self._released.is_set():
                if request_id in self._cancelled:
                    return
                await asyncio.sleep(0.002)
            yield token
        if len(ids) < sampling.max_tokens:
            yield self._vocabulary.end_id

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        pass

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        return min(self.num_prefilled, len(prompt_ids))

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)


@dataclasses.dataclass(eq=False)
class LiveServer:
    url: str
    service: Service
    engine: ScriptedEngine
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def vocabulary(self) -> Vocabulary:
        return self.service.bot.models.vocabulary


def scripted_bot(folder: Path, **parts: Any) -> tuple[Chatbot, ScriptedEngine]:
    models = Models.load(folder)
    engine = ScriptedEngine(models.vocabulary)
    return Chatbot(dataclasses.replace(models, engine=engine, **parts)), engine


@contextlib.contextmanager
def serving(bot: Chatbot, engine: ScriptedEngine, **settings: Any) -> Iterator[LiveServer]:
    """Runs until the block is left."""
    wanted = Settings(port=0, **settings)
    sock, ready = listen(wanted), threading.Event()
    app = create_app(bot, wanted)
    server = Server(app, ready.set)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve([sock]),), daemon=True)
    thread.start()
    assert ready.wait(TIMEOUT_S)
    url = f"ws://127.0.0.1:{sock.getsockname()[1]}/v1"
    try:
        yield LiveServer(url, app.state.service, engine, server, loop)
    finally:
        engine.release()
        server.should_exit = True
        thread.join(TIMEOUT_S)
        sock.close()


class Talk:
    """A plain client."""

    def __init__(self, socket: Connection) -> None:
        self.socket = socket
        self.session: Event = self.receive()["session"]

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def receive(self) -> Event:
        event: Event = json.loads(self.socket.recv(timeout=TIMEOUT_S))
        return event

    def until(self, kind: str) -> list[Event]:
        """Events up to the first of this type, that one included."""
        events = [self.receive()]
        while events[-1]["type"] != kind:
            events.append(self.receive())
        return events

    def ask(self, kind: str, answer: str, **fields: Any) -> Event:
        """Sends an event; the first event of the type that answers it, which is the next one."""
        self.send(kind, **fields)
        event = self.receive()
        assert event["type"] == answer, event
        return event

    def update(self, **session: Any) -> Event:
        """`session.update`; the new session."""
        changed: Event = self.ask("session.update", "session.updated", session={"type": "realtime", **session})
        return changed["session"]  # type: ignore[no-any-return]

    def update_input(self, **changes: Any) -> Event:
        return self.update(audio={"input": changes})

    def append(self, pcm: NDArray[np.int16] | bytes, chunk: int = 9600) -> None:
        data = pcm if isinstance(pcm, bytes) else pcm.tobytes()
        for start in range(0, len(data), chunk):
            self.send("input_audio_buffer.append", audio=base64.b64encode(data[start : start + chunk]).decode())

    def write(self, text: str, **fields: Any) -> Event:
        """A message of the user; its item."""
        message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
        self.send("conversation.item.create", item={**message, **fields})
        item: Event = self.until("conversation.item.done")[-1]["item"]
        return item


@contextlib.contextmanager
def talking(server: LiveServer, query: str = "model=tiny") -> Iterator[Talk]:
    with connect(f"{server.url}/realtime?{query}", max_size=None, open_timeout=TIMEOUT_S) as socket:
        yield Talk(socket)


def silence(seconds: float, rate: int = 24_000) -> NDArray[np.int16]:
    return np.zeros(int(seconds * rate), "<i2")


def question(before_s: float = 0.5, after_s: float = 1.0) -> NDArray[np.int16]:
    """A spoken question at 24 kHz with silence around it."""
    wav, rate = load_audio(QUESTION)
    pcm = (resample(wav, rate, 24_000) * 32767).astype("<i2")
    return np.concatenate([silence(before_s), pcm, silence(after_s)])


def types(events: Sequence[Event]) -> list[str]:
    """Types in order, each run of deltas as one."""
    names = [event["type"] for event in events]
    return [name for index, name in enumerate(names) if not (name.endswith("delta") and name in names[:index])]


def sound(events: Sequence[Event]) -> bytes:
    """What was heard of a response."""
    deltas = [event["delta"] for event in events if event["type"] == "response.output_audio.delta"]
    return b"".join(base64.b64decode(delta) for delta in deltas)


def kept(server: LiveServer, session_id: str) -> SavedConversation:
    """What the server keeps of a conversation whose client has gone."""
    deadline = time.monotonic() + TIMEOUT_S
    while session_id not in server.service.resumable._stored:
        assert time.monotonic() < deadline, "the server has not noticed that its client is gone"
        time.sleep(0.005)
    return server.service.resumable._stored[session_id].conversation
