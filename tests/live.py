"""A server process with the tiny model, its clients, and a leak check."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.server import Footprint, footprint, metrics_of
from duologue.client.connection import WIRE_RATE, Connection, ConnectionLost, ServerEvent, decode_pcm, open_connection
from duologue.client.process import ServerProcess
from duologue.conversation.chatbot import model_folder
from duologue.models import Card
from duologue.talk.terminal import read_pcm
from tests.tiny import write_tiny_chatbot

GIVE_UP_S = 300.0  # a busy machine is not a failing test
MANUAL = {"type": "realtime", "include": ["duologue.tokens"], "audio": {"input": {"turn_detection": None}}}
SPOKEN = {"type": "realtime", "include": ["duologue.tokens"]}
REPLY_TOKENS = 120


def write_greedy_chatbot(folder: Path, max_tokens: int = 400) -> Path:
    """The tiny chatbot, always taking the most likely id, with room for long answers."""
    write_tiny_chatbot(folder, max_positions=1024, max_tokens=max_tokens)
    card = Card.load(folder)
    replace(card, sampling=replace(card.sampling, temperature=0.0)).save(folder)
    return folder


@functools.cache
def question() -> NDArray[np.int16]:
    """A spoken question, at the rate of the wire."""
    return read_pcm(model_folder() / "question.wav")


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer as its client received it."""

    ids: tuple[tuple[str, int], ...]
    audio: NDArray[np.int16]
    text: str
    status: str
    item_id: str

    def same_as(self, other: Answer) -> bool:
        """The same ids, and the same sound within 1e-4 (which is 3.3 steps of 16 bits)."""
        if (self.ids, self.text, self.status, len(self.audio)) != (
            other.ids,
            other.text,
            other.status,
            len(other.audio),
        ):
            return False
        return int(np.abs(self.audio.astype(np.int32) - other.audio).max(initial=0)) <= 3


def answer_of(events: list[ServerEvent]) -> Answer:
    """The one answer among these events."""
    ids: list[tuple[str, int]] = []
    audio = [np.zeros(0, np.int16)]
    text = status = item_id = ""
    for event in events:
        match event["type"]:
            case "duologue.tokens":
                ids += [(event["kind"], token) for token in event["ids"]]
            case "response.output_audio.delta":
                audio.append(decode_pcm(event["delta"]))
                item_id = event["item_id"]
            case "response.output_audio_transcript.delta":
                text += event["delta"]
            case "response.done":
                status = event["response"]["status"]
    return Answer(tuple(ids), np.concatenate(audio), text, status, item_id)


@contextlib.asynccontextmanager
async def client(server: ServerProcess, session: dict[str, Any] = MANUAL) -> AsyncIterator[Connection]:
    """A conversation, configured and ready."""
    async with open_connection(server.url) as connection:
        await connection.send({"type": "session.update", "session": session})
        await connection.receive_until("session.updated")
        yield connection


async def until_closed(connection: Connection) -> ConnectionLost:
    """Reads until the server ends the conversation."""
    while True:
        try:
            await connection.receive()
        except ConnectionLost as lost:
            return lost


async def say(connection: Connection, pcm: NDArray[np.int16]) -> None:
    """Appends sound in pieces of 100 ms, as quickly as it goes."""
    for at in range(0, len(pcm), WIRE_RATE // 10):
        await connection.append(pcm[at : at + WIRE_RATE // 10])


async def ask(connection: Connection, pcm: NDArray[np.int16] | None = None, max_tokens: int = REPLY_TOKENS) -> Answer:
    """A spoken question and its answer, in manual turns."""
    await say(connection, question() if pcm is None else pcm)
    await connection.send({"type": "input_audio_buffer.commit"})
    await connection.send({"type": "response.create", "response": {"max_output_tokens": max_tokens}})
    return answer_of(await connection.receive_until("response.done", "error"))


async def ask_alone(server: ServerProcess, max_tokens: int = REPLY_TOKENS) -> Answer:
    """`ask` in a conversation of its own."""
    async with client(server) as connection, asyncio.timeout(GIVE_UP_S):
        return await ask(connection, max_tokens=max_tokens)


@functools.cache
def _answer_alone(server: ServerProcess) -> Answer:
    """The reference of the bystanders of one server."""
    return asyncio.run(ask_alone(server))


class Bystander:
    """A client that repeats one question in new conversations, and must always get the same answer."""

    def __init__(self, server: ServerProcess) -> None:
        self._server, self._stop = server, threading.Event()
        self._alone = _answer_alone(server)
        self._errors: list[str] = []
        self.num_answers = 0

    def __enter__(self) -> Bystander:
        self._thread = threading.Thread(target=self._live)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(GIVE_UP_S)
        assert not self._thread.is_alive(), "the bystander waits in vain"
        assert not self._errors, self._errors
        assert self.num_answers

    def _live(self) -> None:
        while not self._errors and not (self._stop.is_set() and self.num_answers):
            try:
                answer = asyncio.run(ask_alone(self._server))
            except Exception as error:
                self._errors.append(f"{type(error).__name__}: {error}")
                return
            if not answer.same_as(self._alone):
                self._errors.append(f"another answer than alone: {answer.status}, {len(answer.ids)} ids")
            self.num_answers += 1


def settled(server: ServerProcess, before: Footprint | None = None) -> Footprint:
    """Returns the footprint once no session is open and it does not exceed `before`; fails at the deadline."""
    deadline = time.monotonic() + GIVE_UP_S
    while True:
        found = footprint(server.url, server.pid)
        kept = metrics_of(server.url).get("duologue_sessions_kept", 0)
        small = found.sessions == 0
        if before is not None:
            assert before.tasks is not None
            assert found.tasks is not None
            small = small and found.descriptors <= before.descriptors and found.tasks <= before.tasks
        if small:
            return found
        assert time.monotonic() < deadline, f"not freed: {found}, {kept} kept, before: {before}"
        time.sleep(0.05)
