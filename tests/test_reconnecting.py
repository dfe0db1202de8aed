"""A client that loses its connection comes back to its conversation, with bounded tries and a message."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from duologue.client.connection import WIRE_RATE, ConnectionLost, open_connection
from duologue.client.conversation import TalkClient, TalkSettings, TalkSummary
from duologue.client.playback import CHUNK, Playback
from duologue.talk.screen import TerminalDisplay
from tests.test_talk import Peer, Script


@contextlib.asynccontextmanager
async def dropping(*scripts: Script) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that plays each script to one client after the other and then drops it; the paths of all requests."""
    paths: list[str] = []

    async def handle(socket: ServerConnection) -> None:
        paths.append(socket.request.path if socket.request else "")
        await scripts[len(paths) - 1](Peer(socket))
        socket.transport.abort()

    async def refuse(socket: ServerConnection, request: Request) -> Response | None:
        return socket.respond(503, "the server is full") if len(paths) == len(scripts) else None

    async with serve(handle, "127.0.0.1", 0, process_request=refuse) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", paths


@pytest.mark.parametrize("resumed", [True, False])
def test_a_dropped_line_is_taken_up_again(
    resumed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("duologue.client.connection.RETRIES_S", (0.0, 0.0))
    updates: list[dict[str, Any]] = []

    async def first(peer: Peer) -> None:
        await peer.send("session.created", session={"id": "sess_1"})
        await peer.until("input_audio_buffer.append")
        await peer.hear_turn("one")
        await peer.begin_answer("in the mid")

    async def second(peer: Peer) -> None:
        await peer.send("session.created", session={"id": "sess_1" if resumed else "sess_2"})
        while not updates or "include" not in updates[-1]["session"]:
            updates.append(await peer.until("session.update"))
        await peer.until("input_audio_buffer.append")
        await peer.hear_turn("two")
        await peer.begin_answer()
        await peer.end_answer()
        await peer.until("never")

    async def talk() -> tuple[TalkSummary, list[str]]:
        async with dropping(first, second) as (url, paths), open_connection(url, reconnect=True) as connection:

            def observe(event: dict[str, Any]) -> None:
                screen.observe(event)
                if event["type"] == "response.done":
                    talking.stop()

            async def source() -> AsyncIterator[np.ndarray]:
                while True:
                    await asyncio.sleep(0)
                    yield np.ones(CHUNK, np.int16)

            talking = TalkClient(connection, Playback(WIRE_RATE), TalkSettings(), observe)
            with TerminalDisplay("pocket", lambda: 0.0, lambda: 0.0) as screen:
                return await talking.run(source()), paths

    summary, paths = asyncio.run(talk())
    assert [(each.user, each.status) for each in summary.exchanges] == [("one", "incomplete"), ("two", "completed")]
    assert (summary.ended_by, summary.errors, summary.num_reconnects) == ("", [], 1)
    assert paths == ["/v1/realtime?model=pocket", "/v1/realtime?model=pocket&session_id=sess_1"]
    settings = [update for update in updates if "audio" in update["session"]]
    assert len(settings) == (0 if resumed else 1)  # a new conversation needs its settings
    out, error = capsys.readouterr()
    assert out.splitlines() == ["you: one", "pocket: in the mid (cut off)", "you: two", "pocket: good day"]
    lost, again = error.splitlines()
    assert lost.endswith("broke; trying again in 0 s (1 of 2)")
    assert again == "connected again" + ("" if resumed else "; the server no longer has the earlier conversation")


def test_tries_to_reconnect_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duologue.client.connection.RETRIES_S", (0.0, 0.0))

    async def talk() -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []
        created = lambda peer: peer.send("session.created", session={"id": "sess_1"})  # noqa: E731
        async with dropping(created) as (url, _), open_connection(url, reconnect=True) as connection:
            while len(seen) < 3:
                seen.append(await connection.receive())
            with pytest.raises(ConnectionLost, match=r"2 tries to reconnect failed: .*503 the server is full"):
                await connection.receive()
        return seen

    kinds = [(event["type"], event.get("attempt")) for event in asyncio.run(talk())]
    assert kinds == [("session.created", None), ("talk.reconnecting", 1), ("talk.reconnecting", 2)]
