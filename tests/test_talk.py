"""`duologue talk` against a scripted server: events sent, end of the conversation, summary."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from websockets.asyncio.server import ServerConnection, serve

from duologue.cli import main
from duologue.client.connection import WIRE_RATE, Connection, encode_pcm, open_connection, realtime_url
from duologue.client.conversation import TalkClient, TalkSettings, TalkSummary
from duologue.client.playback import CHUNK, Playback, Ticker, in_real_time
from duologue.talk.screen import TerminalDisplay, bar
from duologue.talk.terminal import PlaybackRecorder
from tests.clock import Clock

Script = Callable[["Peer"], Awaitable[object]]
SOUND = (np.arange(WIRE_RATE) % 1000 + 1).astype(np.int16)  # one second, never silent


class Peer:
    """The server side of a scripted conversation."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        self.received: list[dict[str, Any]] = []

    async def send(self, kind: str, **fields: object) -> None:
        await self.socket.send(json.dumps({"type": kind, "event_id": "event", **fields}))

    async def until(self, kind: str) -> dict[str, Any]:
        while True:
            event: dict[str, Any] = json.loads(await self.socket.recv())
            self.received.append(event)
            if event["type"] == kind:
                return event

    async def hear_turn(self, transcript: str = "hello") -> None:
        await self.send("input_audio_buffer.speech_started", item_id="user", audio_start_ms=0)
        await self.send("input_audio_buffer.speech_stopped", item_id="user", audio_end_ms=100)
        await self.send("input_audio_buffer.committed", item_id="user")
        done = "conversation.item.input_audio_transcription.completed"
        await self.send(done, item_id="user", content_index=0, transcript=transcript)

    async def begin_answer(self, text: str = "good day") -> None:
        await self.send("response.created", response={"id": "r", "status": "in_progress", "output": []})
        await self.send("response.output_item.added", response_id="r", output_index=0, item={"id": "answer"})
        await self.send("response.output_audio_transcript.delta", response_id="r", item_id="answer", delta=text)

    async def sound(self, pcm: np.ndarray) -> None:
        await self.send("response.output_audio.delta", response_id="r", item_id="answer", delta=encode_pcm(pcm))

    async def end_answer(self, status: str = "completed") -> None:
        await self.send("response.output_audio.done", response_id="r", item_id="answer")
        await self.send("response.done", response={"id": "r", "status": status, "output": [{"id": "answer"}]})


@contextlib.asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[tuple[str, Peer]]:
    """A server that plays a script to its first client, and then waits until that goes."""
    peers: list[Peer] = []

    async def handle(socket: ServerConnection) -> None:
        peers.append(Peer(socket))
        await script(peers[-1])
        async for message in socket:
            peers[-1].received.append(json.loads(message))

    async with serve(handle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        holder = Peer.__new__(Peer)
        yield f"http://127.0.0.1:{port}", holder
        holder.__dict__.update(peers[-1].__dict__)


def base64_bytes(event: dict[str, Any]) -> bytes:
    return base64.b64decode(event["audio"])


async def hold(
    script: Script,
    settings: TalkSettings,
    source: Callable[[Playback, Clock], AsyncIterator[np.ndarray]],
    silence: bool = True,
) -> tuple[TalkSummary, Peer, list[dict[str, Any]]]:
    """A conversation on a clock that only runs as the source goes on."""
    clock = Clock()
    seen: list[dict[str, Any]] = []
    playback = Playback(WIRE_RATE, ahead_ms=0, clock=clock)

    async def quiet() -> AsyncIterator[np.ndarray]:
        while True:
            playback.take(CHUNK)
            await clock.sleep(CHUNK / WIRE_RATE)
            yield np.zeros(CHUNK, np.int16)

    async with scripted(script) as (url, peer), open_connection(url) as connection:
        talk = TalkClient(connection, playback, settings, seen.append, clock)
        summary = await talk.run(source(playback, clock), quiet() if silence else None)
    return summary, peer, seen


async def a_second(playback: Playback, clock: Clock) -> AsyncIterator[np.ndarray]:
    for _ in range(50):
        yield np.ones(CHUNK, np.int16)


def test_summary_of_one_exchange() -> None:
    async def script(peer: Peer) -> None:
        await peer.until("input_audio_buffer.append")
        await peer.hear_turn()
        await peer.begin_answer()
        await peer.sound(SOUND[:12_000])
        await peer.sound(SOUND[12_000:])
        await peer.end_answer()

    summary, peer, seen = asyncio.run(hold(script, TalkSettings(voice="slt", max_tokens=9), a_second))
    assert [(each.user, each.answer, each.status) for each in summary.exchanges] == [("hello", "good day", "completed")]
    assert summary.exchanges[0].first_audio_ms is not None
    assert summary.exchanges[0].heard_ms is None
    assert (summary.num_gaps, summary.errors, summary.ended_by) == (0, [], "")
    session = peer.received[0]["session"]
    assert peer.received[0]["type"] == "session.update"
    assert session["audio"]["output"] == {"format": {"type": "audio/pcm", "rate": 24000}, "voice": "slt"}
    assert session["audio"]["input"]["turn_detection"]["type"] == "server_vad"
    assert session["max_output_tokens"] == 9
    assert {event["type"] for event in peer.received[1:]} == {"input_audio_buffer.append"}
    assert seen[-1]["type"] == "response.done"


def test_barge_in_stops_playback_and_truncates() -> None:
    interrupting = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.until("input_audio_buffer.append")
        await peer.hear_turn()
        await peer.begin_answer()
        await peer.sound(SOUND)
        while not np.any(np.frombuffer(base64_bytes(await peer.until("input_audio_buffer.append")), "<i2") == 7):
            pass
        await peer.send("input_audio_buffer.speech_started", item_id="user2", audio_start_ms=500)
        await peer.sound(SOUND)  # crossed on the way
        await peer.end_answer("cancelled")
        truncate = await peer.until("conversation.item.truncate")
        assert truncate == {
            "type": "conversation.item.truncate",
            "item_id": "answer",
            "content_index": 0,
            "audio_end_ms": 340,
        }
        interrupting.set()
        await peer.send("input_audio_buffer.speech_stopped", item_id="user2", audio_end_ms=700)
        await peer.send("error", error={"type": "invalid_request_error", "message": "nothing was said"})

    async def source(playback: Playback, clock: Clock) -> AsyncIterator[np.ndarray]:
        yield np.ones(CHUNK, np.int16)
        while not playback.num_waiting:  # the answer is on its way
            await asyncio.sleep(0)
        for _ in range(17):  # 340 ms of it are heard
            assert playback.take(CHUNK).any()
            clock.now += CHUNK / WIRE_RATE
        yield np.full(CHUNK, 7, np.int16)
        await interrupting.wait()
        assert not playback.active
        assert not playback.take(CHUNK).any()

    summary, _, seen = asyncio.run(hold(script, TalkSettings(), source))
    assert [(each.heard_ms, each.status) for each in summary.exchanges] == [(340, "cancelled")]
    assert {"type": "talk.interrupted", "item_id": "answer", "played_ms": 340} in seen
    assert summary.errors == ["nothing was said"]


@pytest.mark.parametrize("taken", [True, False])
def test_playback_is_reported_to_a_server_that_takes_reports(taken: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.send("session.created", session={})
        offer = await peer.until("session.update")
        while offer["session"].get("include") is None:
            offer = await peer.until("session.update")
        if taken:
            await peer.send("session.updated", session=offer["session"])
        else:
            fault = {"type": "invalid_request_error", "message": "unknown", "event_id": offer["event_id"]}
            await peer.send("error", error=fault)
        await peer.until("input_audio_buffer.append")
        await peer.hear_turn()
        await peer.begin_answer()
        await peer.sound(SOUND)
        await peer.end_answer()

    summary, peer, seen = asyncio.run(hold(script, TalkSettings(), a_second))
    reports = [event for event in peer.received if event["type"] == "playback.ack"]
    assert summary.errors == []
    assert not any(event["type"] == "error" for event in seen)
    if not taken:
        assert reports == []
        return
    positions = [report["played_ms"] for report in reports]
    assert {report["item_id"] for report in reports} == {"answer"}
    assert positions == sorted(set(positions))
    assert positions[-1] == 1000  # all of it
    assert 4 <= len(positions) <= 7  # every 200 ms, and at the end


def test_without_barge_in_the_server_hears_silence_while_the_answer_plays() -> None:
    async def script(peer: Peer) -> None:
        await peer.until("input_audio_buffer.append")
        await peer.hear_turn()
        await peer.begin_answer()
        await peer.sound(SOUND)
        await peer.end_answer()

    async def source(playback: Playback, clock: Clock) -> AsyncIterator[np.ndarray]:
        yield np.ones(CHUNK, np.int16)
        while not playback.num_waiting:
            await asyncio.sleep(0)
        yield np.full(CHUNK, 7, np.int16)
        playback.take(WIRE_RATE)
        clock.now += 1.0
        yield np.full(CHUNK, 9, np.int16)

    _, peer, _ = asyncio.run(hold(script, TalkSettings(barge_in=False), source))
    assert peer.received[0]["session"]["audio"]["input"]["turn_detection"]["interrupt_response"] is False
    heard = [base64_bytes(event)[0] for event in peer.received if event["type"] == "input_audio_buffer.append"]
    assert heard[:3] == [1, 0, 9]


def test_a_manual_turn_ends_with_the_sound() -> None:
    async def script(peer: Peer) -> None:
        await peer.until("response.create")
        await peer.send("input_audio_buffer.committed", item_id="user")
        await peer.begin_answer()
        await peer.sound(SOUND[:CHUNK])
        await peer.end_answer("incomplete")

    summary, peer, _ = asyncio.run(hold(script, TalkSettings(manual=True), a_second))
    kinds = [event["type"] for event in peer.received]
    assert kinds == ["session.update", *["input_audio_buffer.append"] * 50, "input_audio_buffer.commit", kinds[-1]]
    assert peer.received[0]["session"]["audio"]["input"]["turn_detection"] is None
    assert [each.status for each in summary.exchanges] == ["incomplete"]


def test_a_gap_in_the_answer_is_counted() -> None:
    more = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.until("input_audio_buffer.append")
        await peer.hear_turn()
        await peer.begin_answer()
        await peer.sound(SOUND[:CHUNK])
        await more.wait()
        await peer.sound(SOUND[CHUNK:])
        await peer.end_answer()

    async def source(playback: Playback, clock: Clock) -> AsyncIterator[np.ndarray]:
        yield np.ones(CHUNK, np.int16)
        while not playback.num_waiting:
            await asyncio.sleep(0)
        playback.take(3 * CHUNK)
        more.set()
        while not playback.num_waiting:
            await asyncio.sleep(0)

    summary, _, _ = asyncio.run(hold(script, TalkSettings(), source))
    assert (summary.num_gaps, summary.gap_ms) == (1, 40.0)


def test_a_server_that_ends_the_conversation_is_quoted() -> None:
    async def script(peer: Peer) -> None:
        await peer.until("input_audio_buffer.append")
        await peer.socket.close(1013, "the server is being restarted")

    async def source(playback: Playback, clock: Clock) -> AsyncIterator[np.ndarray]:
        while True:
            await asyncio.sleep(0)
            yield np.ones(CHUNK, np.int16)

    summary, _, _ = asyncio.run(hold(script, TalkSettings(), source))
    assert "(1013): the server is being restarted" in summary.ended_by


def test_stopping_ends_a_conversation_whose_microphone_goes_on() -> None:
    async def talk() -> TalkSummary:
        async with scripted(lambda peer: peer.until("session.update")) as (url, _), open_connection(url) as connection:
            talking = TalkClient(connection, Playback(WIRE_RATE), TalkSettings(), lambda event: None)

            async def source() -> AsyncIterator[np.ndarray]:
                yield np.ones(CHUNK, np.int16)
                talking.stop()
                await asyncio.Event().wait()

            return await talking.run(source())

    assert asyncio.run(talk()).ended_by == ""


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("localhost:8000", "ws://localhost:8000/v1/realtime?model=pocket"),
        ("http://127.0.0.1:8000/", "ws://127.0.0.1:8000/v1/realtime?model=pocket"),
        ("https://talk.example.org/v1", "wss://talk.example.org/v1/realtime?model=pocket"),
        ("ws://h:1/v1/realtime?model=other", "ws://h:1/v1/realtime?model=other"),
    ],
)
def test_realtime_url(server: str, url: str) -> None:
    assert realtime_url(server, "pocket") == url


@pytest.mark.parametrize("server", ["", "ftp://h", "http://"])
def test_invalid_urls_are_refused(server: str) -> None:
    with pytest.raises(ValueError, match="is not a server URL"):
        realtime_url(server, "pocket")


@pytest.mark.parametrize("body", ['{"error": {"message": "the server is full"}}', '{"detail": "the server is full"}'])
def test_a_refusal_is_quoted(body: str) -> None:
    async def connect() -> None:
        refuse = lambda connection, request: connection.respond(503, body)  # noqa: E731
        async with serve(lambda socket: socket.wait_closed(), "127.0.0.1", 0, process_request=refuse) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await open_connection(address, key="secret").__aenter__()

    with pytest.raises(ValueError, match=r"refused the conversation: 503 the server is full"):
        asyncio.run(connect())


def test_audio_files_in_real_time(tmp_path: Path) -> None:
    async def play() -> tuple[float, list[np.ndarray]]:
        clock = Clock()
        playback = Playback(WIRE_RATE, ahead_ms=0, clock=clock)
        recorder = PlaybackRecorder(playback)
        recording = asyncio.create_task(recorder.run(Ticker(clock, clock.sleep)))
        heard = [pcm async for pcm in in_real_time(SOUND[:1000], Ticker(clock, clock.sleep))]
        assert recorder.num_samples == 0
        playback.add("a", SOUND[:1000])
        playback.end("a")
        while playback.active:
            await asyncio.sleep(0)
        recording.cancel()
        recorder.save(tmp_path / "b.wav")
        return clock.now, heard

    _, heard = asyncio.run(play())
    assert [len(pcm) for pcm in heard] == [480, 480, 40]
    written, rate = soundfile.read(tmp_path / "b.wav", dtype="int16")
    assert rate == WIRE_RATE
    assert written[:1000].tolist() == SOUND[:1000].tolist()
    assert not written[1000:].any()


def test_ticks_do_not_drift() -> None:
    slept = []
    clock = Clock()

    async def late(seconds: float) -> None:
        slept.append(round(seconds, 6))
        clock.now += seconds + 0.005  # each sleep takes longer than asked for

    async def tick() -> None:
        ticker = Ticker(clock, late)
        for _ in range(4):
            await ticker.tick()

    asyncio.run(tick())
    assert slept == [0.02, 0.015, 0.015, 0.015]


def test_no_file_without_playback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was played"):
        PlaybackRecorder(Playback(WIRE_RATE)).save(tmp_path / "b.wav")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--manual"], "--manual needs --input, whose end is the end of the turn"),
        (["--input", "missing.wav", "--output", "b.wav"], "missing.wav: there is no such file"),
        (["--input", "a.wav", "--output", "b.txt"], "b.txt cannot be written"),
        (["--silence", "0"], "'0' is not a positive whole number"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["talk", "--server", "http://127.0.0.1:1", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_screen_prints_lines_in_a_pipe_and_no_control_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalDisplay("pocket", lambda: 0.0, lambda: 0.0) as screen:
        said = "conversation.item.input_audio_transcription.completed"
        screen.observe({"type": said, "item_id": "u", "transcript": " what\x1b[31m is it? "})
        for delta in ("it is ", "three"):
            screen.observe({"type": "response.output_audio_transcript.delta", "delta": delta})
        screen.observe({"type": "talk.interrupted", "item_id": "a", "played_ms": 1240})
        screen.observe({"type": "response.done", "response": {"id": "r", "status": "cancelled"}})
        screen.observe({"type": "error", "error": {"message": "no such voice"}})
    out, error = capsys.readouterr()
    assert out.splitlines() == [
        "you: what [31m is it?",
        "(interrupted after 1.2 s)",
        "pocket: it is three (cancelled)",
    ]
    assert error == "the server: no such voice\n"


def test_bars() -> None:
    assert bar(0.0) == "·" * 16
    assert bar(1.0) == "█" * 16
    assert bar(10 ** (-25 / 20)) == "█" * 8 + "·" * 8


def test_a_connection_says_when_the_server_sends_no_events() -> None:
    async def talk() -> None:
        async def script(peer: Peer) -> None:
            await peer.socket.send("[1, 2]")

        async with scripted(script) as (url, _), open_connection(url) as connection:
            assert isinstance(connection, Connection)
            await connection.receive()

    with pytest.raises(RuntimeError, match="sent a message that is not an event"):
        asyncio.run(talk())
