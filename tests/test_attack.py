"""Malformed, false and excessive input over the real-time protocol. The server must answer with an error or a close
reason, and other clients must be unaffected."""

import asyncio
import base64
import contextlib
import json
import re
import socket as sockets
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from duologue.client.connection import WIRE_RATE, ConnectionLost, encode_pcm, open_connection
from duologue.client.process import ServerProcess
from duologue.serving.protocol import CLIENT_EVENTS
from tests.live import GIVE_UP_S, Bystander, ask_alone, client, question, settled, until_closed

ONCE_FOR_ALL_EXAMPLES = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
TONE = encode_pcm(question()[:4800])
MESSAGE = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
# One good event of each kind, in an order that makes sense; attacks change them.
GOOD: list[dict[str, Any]] = [
    {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}}},
    {"type": "input_audio_buffer.append", "audio": TONE},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear"},
    {"type": "conversation.item.create", "item": {**MESSAGE, "id": "mine"}, "previous_item_id": "root"},
    {"type": "conversation.item.retrieve", "item_id": "mine"},
    {"type": "response.create", "response": {"max_output_tokens": 20, "output_modalities": ["audio"]}},
    {"type": "response.create", "response": {"conversation": "none", "input": [MESSAGE], "max_output_tokens": 5}},
    {"type": "response.cancel"},
    {"type": "conversation.item.truncate", "item_id": "mine", "content_index": 0, "audio_end_ms": 100},
    {"type": "conversation.item.delete", "item_id": "mine"},
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["mine", "root", "audio/pcmu", "inf", TONE, "!!!", "\ud800", "\0", "9" * 400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _paths(child, (*path, key))


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """A good event with one value replaced, left out or added."""
    event: dict[str, Any] = json.loads(json.dumps(draw(st.sampled_from(GOOD))))
    *parents, last = draw(st.sampled_from(list(_paths(event))))
    place: Any = event
    for key in parents:
        place = place[key]
    match draw(st.sampled_from(["replace", "leave out", "add"])):
        case "leave out" if isinstance(place, dict):
            del place[last]
        case "add" if isinstance(place, dict):
            place[draw(st.text(max_size=8))] = draw(VALUES)
        case _:
            place[last] = draw(VALUES)
    return event


FIELDS = st.dictionaries(st.sampled_from(["session", "audio", "item", "item_id", "response"]), VALUES)
FRAMES = st.one_of(
    st.sampled_from(GOOD).map(json.dumps),  # in any order, which is out of order
    changed().map(json.dumps),
    st.builds(lambda kind, more: json.dumps({"type": kind, **more}), st.sampled_from([*CLIENT_EVENTS, "x"]), FIELDS),
    VALUES.map(json.dumps),
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.binary(max_size=60),
)


async def fate(socket: ClientConnection, frames: list[str | bytes]) -> list[dict[str, Any]]:
    """Sends the frames and then something whose answer tells that the session goes on. What came until then."""
    seen: list[dict[str, Any]] = []
    ended: ConnectionClosed | None = None
    try:
        for frame in frames:
            await socket.send(frame)
        await socket.send(json.dumps({"type": "conversation.item.delete", "item_id": "probe", "event_id": "probe"}))
        while not seen or seen[-1].get("error", {}).get("event_id") != "probe":
            seen.append(json.loads(await socket.recv()))
    except ConnectionClosed as error:
        ended = error
    if ended is not None:
        assert ended.rcvd is not None, "the line broke without a word"
        assert ended.rcvd.code in (1000, 1003, 1007, 1008, 1009), ended.rcvd
        assert ended.rcvd.reason, ended.rcvd
    for event in seen:
        assert isinstance(event["event_id"], str)
        if event["type"] == "error":
            refusal = event["error"]
            assert refusal["message"].strip(), refusal
            assert refusal["type"] == "invalid_request_error", refusal  # never the server's own fault
            assert len(refusal["message"]) < 2000, "an attacker's value comes back whole"
    return seen


@pytest.fixture(scope="module")
def watched(live_server: ServerProcess) -> Iterator[ServerProcess]:
    """The server, with a bystander during all attacks and a look at what it holds afterwards."""
    before = settled(live_server)
    with Bystander(live_server):
        yield live_server
    settled(live_server, before)
    # The WebSocket library logs text that is not UTF-8 as an error of its own; nothing of ours may.
    errors = [line for line in live_server.log.read_text().splitlines() if " ERROR " in line]
    assert not [line for line in errors if "uvicorn.error: Invalid UTF-8" not in line], errors


@ONCE_FOR_ALL_EXAMPLES
@given(st.lists(FRAMES, min_size=1, max_size=6))
def test_whatever_is_sent_is_answered_or_closed_with_a_reason(
    watched: ServerProcess, frames: list[str | bytes]
) -> None:
    async def attack() -> None:
        async with open_connection(watched.url) as connection, asyncio.timeout(GIVE_UP_S):
            await fate(connection.socket, frames)

    asyncio.run(attack())


@ONCE_FOR_ALL_EXAMPLES
@given(st.lists(st.sampled_from(GOOD), min_size=3, max_size=12))
def test_good_events_in_any_order_never_end_the_session(watched: ServerProcess, events: list[dict[str, Any]]) -> None:
    async def attack() -> None:
        async with open_connection(watched.url) as connection, asyncio.timeout(GIVE_UP_S):
            seen = await fate(connection.socket, [json.dumps(event) for event in events])
            assert seen[-1]["error"]["event_id"] == "probe"
            created = [each["response"]["id"] for each in seen if each["type"] == "response.created"]
            done = [each["response"]["id"] for each in seen if each["type"] == "response.done"]
            while len(done) < len(created):  # every response ends, once
                event = await connection.receive()
                done += [event["response"]["id"]] if event["type"] == "response.done" else []
            assert sorted(done) == sorted(created)

    asyncio.run(attack())


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("", "invalid_json"),
        ("{", "invalid_json"),
        ("[]", "invalid_json"),
        ("null", "invalid_json"),
        ("[" * 100_000, "invalid_json"),
        ('{"type": ' + "[" * 500 + "]" * 500 + "}", None),
        ('{"type": 7}', "unknown_event"),
        ('{"type": "session.updat"}', "unknown_event"),
        (b"\x00\xff", "invalid_message"),
        (json.dumps({"type": "input_audio_buffer.append", "audio": "###"}), None),
        (json.dumps({"type": "input_audio_buffer.append", "audio": "A"}), None),
        (json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(b"\0\0\0").decode()}), None),
        (json.dumps({"type": "input_audio_buffer.append", "audio": 3}), None),
        (json.dumps({"type": "input_audio_buffer.commit"}), "input_audio_buffer_commit_empty"),
        ('{"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": NaN}', None),
        ('{"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": -1}', None),
        ('{"type": "response.create", "response": {"max_output_tokens": 0}}', None),
        ('{"type": "response.create", "response": {"max_output_tokens": 1e400}}', None),
    ],
)
def test_each_refusal_is_an_error_event(frame: str | bytes, code: str | None, watched: ServerProcess) -> None:
    async def attack() -> None:
        async with open_connection(watched.url) as connection, asyncio.timeout(GIVE_UP_S):
            seen = await fate(connection.socket, [frame])
            errors = [
                each["error"] for each in seen if each["type"] == "error" and each["error"]["event_id"] != "probe"
            ]
            assert len(errors) == 1, seen
            assert code in (None, errors[0]["code"])

    asyncio.run(attack())


@pytest.mark.parametrize("num_bytes", [17 * 2**20, 40 * 2**20])
def test_a_message_that_is_too_large_closes_with_a_reason(num_bytes: int, watched: ServerProcess) -> None:
    async def attack() -> None:
        async with open_connection(watched.url) as connection, asyncio.timeout(GIVE_UP_S):
            with contextlib.suppress(ConnectionLost):
                await connection.send({"type": "input_audio_buffer.append", "audio": "A" * num_bytes})
            assert re.search(r"\(1009\): \w", str(await until_closed(connection)))

    asyncio.run(attack())


def test_more_sound_than_a_turn_may_have_is_refused_and_the_session_goes_on(watched: ServerProcess) -> None:
    async def attack() -> None:
        async with client(watched) as connection, asyncio.timeout(GIVE_UP_S):
            minute = json.dumps(
                {"type": "input_audio_buffer.append", "audio": encode_pcm(np.zeros(WIRE_RATE * 60, np.int16))}
            )
            seen = await fate(connection.socket, [minute] * 4)
            errors = [each["error"] for each in seen if each["type"] == "error"][:-1]
            assert errors
            assert {each["code"] for each in errors} == {"input_audio_buffer_full"}

    asyncio.run(attack())


RAW_FRAMES = {
    "unmasked": b"\x81\x02{}",
    "unknown opcode": b"\x8b\x80\0\0\0\0",
    "reserved bits": b"\xf1\x80\0\0\0\0",
    "fragmented ping": b"\x09\x80\0\0\0\0",
    "text that is not UTF-8": b"\x81\x82\0\0\0\0\xff\xfe",
    "continuation of nothing": b"\x80\x80\0\0\0\0",
    "a promise of 2^62 bytes": b"\x81\xff" + (2**62).to_bytes(8, "big") + b"\0\0\0\0",
}


@pytest.mark.parametrize("name", [*RAW_FRAMES, "half a frame", "nothing"])
def test_broken_frames_and_half_closed_sockets(name: str, watched: ServerProcess) -> None:
    """What no WebSocket library sends. The server closes the line, and goes on with everybody else."""
    host, port = watched.url.removeprefix("http://").split(":")
    key = base64.b64encode(bytes(16)).decode()
    head = f"GET /v1/realtime?model=pocket HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
    with sockets.create_connection((host, int(port)), timeout=GIVE_UP_S) as raw:
        raw.sendall(
            f"{head}Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        received = b""
        while b"session.created" not in received:
            received += raw.recv(65536)
        raw.sendall(RAW_FRAMES.get(name, b"\x81\xff" + bytes(6) if name == "half a frame" else b""))
        if name not in RAW_FRAMES:
            raw.shutdown(sockets.SHUT_WR)
        while raw.recv(65536):  # until the server has closed
            pass
    assert len(asyncio.run(ask_alone(watched)).ids)
