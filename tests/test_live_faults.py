"""Clients that vanish, stall or interrupt, and a server that stops: nothing leaks and other clients are unaffected."""

import asyncio
import os
import select
import signal
import socket as sockets
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.server import metrics_of
from duologue.client.connection import WIRE_RATE, Connection, ConnectionLost, encode_pcm, open_connection
from duologue.client.process import ServerProcess, start_server
from tests.live import (
    GIVE_UP_S,
    MANUAL,
    SPOKEN,
    Bystander,
    answer_of,
    ask,
    ask_alone,
    client,
    question,
    say,
    settled,
    until_closed,
    write_greedy_chatbot,
)

pytestmark = pytest.mark.filterwarnings("error")
SILENCE = np.zeros(WIRE_RATE, np.int16)


async def begin_answer(connection: Connection, until: str = "response.output_audio.delta") -> None:
    """Asks in manual turns, and reads up to an event of the answer."""
    await say(connection, question())
    await connection.send({"type": "input_audio_buffer.commit"})
    await connection.send({"type": "response.create"})
    await connection.receive_until(until)


async def kill_in_the_middle_of_an_answer(server: ServerProcess) -> None:
    async with client(server) as connection:
        await begin_answer(connection)
        connection.socket.transport.abort()


async def kill_before_the_first_sound(server: ServerProcess) -> None:
    async with client(server) as connection:
        await begin_answer(connection, "response.created")
        connection.socket.transport.abort()


async def say_goodbye_in_the_middle_of_an_answer(server: ServerProcess) -> None:
    async with client(server) as connection:
        await begin_answer(connection)


async def vanish_during_upload(server: ServerProcess) -> None:
    async with client(server) as connection:
        await say(connection, question()[: WIRE_RATE // 2])
        message = '{"type":"input_audio_buffer.append","audio":"' + encode_pcm(question())
        transport = connection.socket.transport
        head = bytes([0x81, 0x80 | 127]) + (len(message) * 2).to_bytes(8, "big") + bytes(4)
        transport.write(head + message.encode()[: len(message) // 2])  # half of what the frame promises
        transport.abort()


async def vanish_while_being_heard(server: ServerProcess) -> None:
    async with client(server, SPOKEN) as connection:
        await say(connection, question())
        await connection.receive_until("input_audio_buffer.speech_started")
        connection.socket.transport.abort()


async def leave_while_an_item_is_read(server: ServerProcess) -> None:
    async with client(server) as connection:
        content = [{"type": "input_audio", "audio": encode_pcm(np.tile(question(), 8))}]
        item = {"type": "message", "role": "user", "content": content}
        await connection.send({"type": "conversation.item.create", "item": item})
        connection.socket.transport.abort()


FAULTS = [
    kill_in_the_middle_of_an_answer,
    kill_before_the_first_sound,
    say_goodbye_in_the_middle_of_an_answer,
    vanish_during_upload,
    vanish_while_being_heard,
    leave_while_an_item_is_read,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_client_that_goes_leaves_nothing_behind(
    fault: Callable[[ServerProcess], Awaitable[None]], live_server: ServerProcess
) -> None:
    before = settled(live_server)

    async def several() -> None:
        async with asyncio.timeout(GIVE_UP_S):
            await asyncio.gather(*(fault(live_server) for _ in range(3)))

    with Bystander(live_server):
        asyncio.run(several())
    settled(live_server, before)


def test_two_barge_ins_in_a_row(live_server: ServerProcess) -> None:
    """The second barge-in precedes the answer to the first question; the last question gets its complete answer."""
    before = settled(live_server)

    async def talk() -> None:
        async with client(live_server, SPOKEN) as connection, asyncio.timeout(GIVE_UP_S):
            await say(connection, np.concatenate([question(), SILENCE]))
            events = await connection.receive_until("response.output_audio.delta")
            item_id = events[-1]["item_id"]
            for _ in range(2):
                await say(connection, np.concatenate([question(), SILENCE]))
                events += await connection.receive_until("input_audio_buffer.speech_started")
            await connection.send(
                {"type": "conversation.item.truncate", "item_id": item_id, "content_index": 0, "audio_end_ms": 90}
            )
            events += await connection.receive_until("conversation.item.truncated")
            while True:
                events += await connection.receive_until("response.done")
                responses = [each["response"] for each in events if each["type"] == "response.done"]
                if responses[-1]["status"] != "cancelled":
                    break
            created = [each["response"]["id"] for each in events if each["type"] == "response.created"]
            assert [each["id"] for each in responses] == created, "every response is over, in order"
            assert {each["status"] for each in responses[:-1]} == {"cancelled"}
            assert {each["status_details"]["reason"] for each in responses[:-1]} == {"turn_detected"}
            assert not [each for each in events if each["type"] == "error"]
            # Nothing of a response comes after it is over.
            over: set[str] = set()
            for event in events:
                assert event.get("response_id") not in over, event["type"]
                if event["type"] == "response.done":
                    over.add(event["response"]["id"])
            # What stays of the first answer is what was heard of it.
            await connection.send({"type": "conversation.item.retrieve", "item_id": item_id})
            item = (await connection.receive_until("conversation.item.retrieved"))[-1]["item"]
            assert item["status"] == "incomplete"
            # The connection works as before.
            await connection.send({"type": "session.update", "session": MANUAL})
            await connection.receive_until("session.updated")
            assert (await ask(connection, max_tokens=40)).status in ("completed", "incomplete")

    with Bystander(live_server):
        asyncio.run(talk())
    settled(live_server, before)


def test_cancel_before_the_first_sound(live_server: ServerProcess) -> None:
    before = settled(live_server)

    async def talk() -> None:
        async with client(live_server) as connection, asyncio.timeout(GIVE_UP_S):
            await say(connection, question())
            for kind in ("input_audio_buffer.commit", "response.create", "response.cancel"):
                await connection.send({"type": kind})
            events = await connection.receive_until("response.done")
            answer = answer_of(events)
            assert answer.status == "cancelled"
            assert not len(answer.audio)
            assert events[-1]["response"]["status_details"]["reason"] == "client_cancelled"
            await connection.send({"type": "response.create", "response": {"max_output_tokens": 60}})
            again = answer_of(await connection.receive_until("response.done"))
            assert again.status in ("completed", "incomplete")
            assert len(again.audio)

    with Bystander(live_server):
        asyncio.run(talk())
    settled(live_server, before)


def test_cancelling_nothing_is_an_error_and_no_more(live_server: ServerProcess) -> None:
    async def talk() -> None:
        async with client(live_server) as connection, asyncio.timeout(GIVE_UP_S):
            await connection.send({"type": "response.cancel", "event_id": "mine"})
            error = (await connection.receive_until("error"))[-1]["error"]
            assert error["event_id"] == "mine"
            assert (await ask(connection)).same_as(await ask_alone(live_server))

    asyncio.run(talk())


def test_a_reader_that_stalls_is_dropped(live_server: ServerProcess) -> None:
    """It asks for its own sound again and again and reads none of it: the server gives it up, with a count."""
    before = settled(live_server)
    stalled = 'duologue_sessions_closed_total{reason="stalled"}'
    count = metrics_of(live_server.url).get(stalled, 0)

    async def stall() -> None:
        async with client(live_server) as connection, asyncio.timeout(GIVE_UP_S):
            content = [{"type": "input_audio", "audio": encode_pcm(np.tile(question(), 12))}]
            item = {"id": "mine", "type": "message", "role": "user", "content": content}
            await connection.send({"type": "conversation.item.create", "item": item})
            await connection.receive_until("conversation.item.done")
            connection.socket.transport.pause_reading()
            for _ in range(20):  # 22 MB
                await connection.send({"type": "conversation.item.retrieve", "item_id": "mine"})
            while metrics_of(live_server.url).get(stalled, 0) == count:
                await asyncio.sleep(0.05)
            connection.socket.transport.abort()

    with Bystander(live_server):
        asyncio.run(stall())
    settled(live_server, before)


@pytest.mark.parametrize("end", ["reset", "half-closed", "silent"])
def test_sockets_that_never_become_a_conversation(end: str, live_server: ServerProcess) -> None:
    before = settled(live_server)
    host, port = live_server.url.removeprefix("http://").split(":")
    request = b"GET /v1/realtime?model=pocket HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
    with Bystander(live_server):
        for _ in range(5):
            with sockets.create_connection((host, int(port))) as raw:
                if end != "silent":
                    raw.sendall(request)
                if end == "half-closed":
                    raw.shutdown(sockets.SHUT_WR)
                    raw.settimeout(GIVE_UP_S)
                    while raw.recv(4096):
                        pass
                if end == "reset":
                    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    settled(live_server, before)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ServerProcess]:
    with start_server(str(write_greedy_chatbot(tmp_path)), ("--resume-s", "0")) as server:
        yield server


def test_sigterm_in_the_middle_of_an_answer(own_server: ServerProcess) -> None:
    """The answer is finished, new clients are refused in one sentence, then the server ends with code 0."""
    alone = asyncio.run(ask_alone(own_server, max_tokens=400))
    assert alone.status in ("completed", "incomplete")
    assert len(alone.audio) > WIRE_RATE

    async def talk() -> None:
        async with client(own_server) as connection, client(own_server) as idle, asyncio.timeout(GIVE_UP_S):
            await say(connection, question())
            await connection.send({"type": "input_audio_buffer.commit"})
            await connection.send({"type": "response.create", "response": {"max_output_tokens": 400}})
            events = await connection.receive_until("duologue.tokens")
            own_server.process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionLost, match=r"\(1012\): the server is stopping"):
                await idle.receive()
            with pytest.raises(ValueError, match="stopping|no real-time server"):
                await open_connection(own_server.url).__aenter__()
            events += await connection.receive_until("response.done")
            assert answer_of(events).same_as(alone)
            assert "(1012): the server is stopping" in str(await until_closed(connection))

    asyncio.run(talk())
    waiter = threading.Thread(target=own_server.process.wait)
    waiter.start()
    waiter.join(GIVE_UP_S)
    assert own_server.process.poll() == 0, own_server.log.read_text()
    assert "Traceback" not in own_server.log.read_text()


STARTER = """
import sys, time
from duologue.client.process import start_server
with start_server(sys.argv[1]) as server:
    print(server.pid, flush=True)
    time.sleep(1e6)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process that is no child, as Linux can")
def test_a_server_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    """Killed, that program cannot say anything any more."""
    command = [sys.executable, "-c", STARTER, str(write_greedy_chatbot(tmp_path / "model"))]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as starter:
        assert starter.stdout is not None
        server = os.pidfd_open(int(starter.stdout.readline()))
        starter.kill()
    try:
        assert select.select([server], [], [], GIVE_UP_S)[0] == [server]
    finally:
        os.close(server)


def test_many_at_once_get_what_each_would_get_alone(live_server: ServerProcess) -> None:
    questions = [question()[: WIRE_RATE * (6 + index) // 8] for index in range(4)]

    async def one(pcm: np.ndarray) -> object:
        async with client(live_server) as connection, asyncio.timeout(GIVE_UP_S):
            return await ask(connection, pcm)

    async def together() -> list[object]:
        return list(await asyncio.gather(*(one(pcm) for pcm in questions)))

    alone = [asyncio.run(one(pcm)) for pcm in questions]
    for mine, theirs in zip(alone, asyncio.run(together()), strict=True):
        assert mine.same_as(theirs)  # type: ignore[attr-defined]
