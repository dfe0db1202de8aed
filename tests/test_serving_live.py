"""Live conversations: admission, resumption, recording, and draining."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from duologue.audio import resample
from duologue.conversation.chatbot import Chatbot, load, model_folder
from duologue.serving.recording import SAMPLE_RATE, SessionRecorder, remove_leftovers
from duologue.sound_files import load_audio
from duologue.turns import Conversation, Role
from tests.clock import pass_time
from tests.serving import Running, running
from tests.tiny import write_tiny_chatbot

KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")
WAIT_S = 300.0  # a busy machine is not a failing test


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_tokens=80))


class Client:
    """A client of one live conversation."""

    def __init__(
        self, server: Running, query: str = "", key: str = "", origin: str | None = None, offered: tuple[str, ...] = ()
    ) -> None:
        self.socket: ClientConnection = connect(
            f"{server.live_url}{query}",
            additional_headers={"Authorization": f"Bearer {key}"} if key else None,
            origin=origin,  # type: ignore[arg-type]
            subprotocols=[Subprotocol(name) for name in offered] or None,
            proxy=None,
            open_timeout=WAIT_S,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def read(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.socket.recv(WAIT_S))
        return event

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of this type; an error on the way fails the test."""
        while (event := self.read())["type"] != kind:
            assert event["type"] != "error", event
        return event

    def closed(self) -> tuple[int, str]:
        """Reads until the server closes; code and reason."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.read()
        assert self.socket.close_code is not None
        return self.socket.close_code, self.socket.close_reason or ""

    def write(self, text: str) -> None:
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
        self.send("conversation.item.create", item=item)
        self.until("conversation.item.done")

    def manual(self) -> None:
        self.send("session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        self.until("session.updated")

    def ask(self, **response: Any) -> dict[str, Any]:
        self.send("response.create", response=response)
        return self.until("response.done")["response"]  # type: ignore[no-any-return]


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def spoken_question() -> str:
    wav, rate = load_audio(model_folder() / "question.wav")
    samples = (resample(wav, rate, SAMPLE_RATE) * 32767).astype("<i2")
    return base64.b64encode(samples.tobytes()).decode()


# Who comes in.


def test_keys_by_header_and_subprotocol(bot: Chatbot) -> None:
    with running(bot, api_keys=KEYS) as server:
        with Client(server, key=KEYS[1]) as client:
            assert client.until("session.created")["session"]["id"].startswith("sess_")
        browser = ("realtime", f"openai-insecure-api-key.{KEYS[0]}", "openai-beta.realtime-v1")
        with Client(server, offered=browser, origin=server.url) as client:
            assert client.socket.subprotocol == "realtime"
            client.until("session.created")
        for key in ("", "wrong-key-of-the-tests", KEYS[0][:-1]):
            with pytest.raises(InvalidStatus) as refused:
                Client(server, key=key)
            assert refused.value.response.status_code == 401
            assert json.loads(refused.value.response.body)["error"]["code"] == "invalid_api_key"
        with Client(server, offered=("realtime", "openai-insecure-api-key.nope"), origin=server.url) as page:
            event = page.read()
            assert (event["type"], event["error"]["code"]) == ("error", "invalid_api_key")
            code, reason = page.closed()
            assert code == 1008
            assert "API key" in reason
            assert KEYS[0] not in json.dumps(event) + reason


def test_foreign_origins_are_refused(bot: Chatbot) -> None:
    with running(bot, allowed_origins=("https://talk.example.org",)) as server:
        with pytest.raises(InvalidStatus) as refused:
            Client(server, origin="https://evil.example.org")
        assert refused.value.response.status_code == 403
        for origin in (server.url, "https://talk.example.org", None):
            with Client(server, origin=origin) as client:
                client.until("session.created")


def test_a_full_server_refuses(bot: Chatbot) -> None:
    with running(bot, api_keys=KEYS, max_sessions=2, max_sessions_per_key=1) as server:
        with Client(server, key=KEYS[0]) as first:
            first.until("session.created")
            with pytest.raises(InvalidStatus) as refused:
                Client(server, key=KEYS[0])
            assert refused.value.response.status_code == 429
            assert "this API key can hold 1 conv" in json.loads(refused.value.response.body)["error"]["message"]
            with Client(server, key=KEYS[1]) as second:
                second.until("session.created")
                with pytest.raises(InvalidStatus) as refused:
                    Client(server, key=KEYS[1])
                assert refused.value.response.status_code == 503
                assert refused.value.response.headers["Retry-After"]
                offered = ("realtime", f"openai-insecure-api-key.{KEYS[1]}")
                with Client(server, offered=offered, origin=server.url) as page:
                    assert page.read()["error"]["code"] == "server_full"
                    assert page.closed()[0] == 1013
        eventually(lambda: server.service.admission.num_active == 0)
        with Client(server, key=KEYS[0]) as again:
            again.until("session.created")


def test_limits_of_time_and_size_close_with_a_reason(bot: Chatbot) -> None:
    with running(bot, idle_s=0.3) as server, Client(server) as client:
        client.until("session.created")
        code, reason = client.closed()
        assert (code, "has sent nothing for 0.3 s" in reason) == (1000, True)
    with running(bot, max_message_bytes=5000) as server, Client(server) as client:
        client.send("input_audio_buffer.append", audio="A" * 8000)
        assert client.closed()[0] == 1009
    with running(bot, session_s=0.3) as server, Client(server) as client:
        assert "may last at most 0.3 s" in client.closed()[1]


# What remains.


def test_a_dropped_client_resumes(bot: Chatbot) -> None:
    with running(bot, api_keys=KEYS) as server:
        with Client(server, key=KEYS[0]) as client:
            session = client.until("session.created")["session"]
            client.write("Hello")
            first = client.ask()
            client.socket.socket.shutdown(socket.SHUT_RDWR)  # without a word, as a lost network does
        eventually(lambda: len(server.service.resumable) == 1)
        query = f"?model=x&session_id={session['id']}"
        with Client(server, query, KEYS[1]) as stranger:
            assert stranger.until("session.created")["session"]["id"] != session["id"]
        with Client(server, query, KEYS[0]) as client:
            assert client.until("session.created")["session"]["id"] == session["id"]
            items = [client.until("conversation.item.done")["item"] for _ in range(2)]
            assert [item["role"] for item in items] == ["user", "assistant"]
            assert items[1]["id"] == first["output"][0]["id"]
            second = client.ask(output_modalities=["text"])
            assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]


def test_a_reconnecting_client_replaces_its_connection(bot: Chatbot) -> None:
    with running(bot) as server, Client(server) as old:
        session = old.until("session.created")["session"]["id"]
        old.write("Hello")
        with Client(server, f"?session_id={session}") as new:
            assert new.until("session.created")["session"]["id"] == session
            assert new.until("conversation.item.done")["item"]["content"][0]["text"] == "Hello"
            old.closed()
        assert server.service.metrics.sessions_resumed._value.get() == 1


def test_saved_conversations_expire(bot: Chatbot) -> None:
    with running(bot, resume_s=1e5) as server:
        with Client(server) as client:
            session = client.until("session.created")["session"]["id"]
        eventually(lambda: len(server.service.resumable) == 1)
        pass_time(server.loop, 1e5)
        eventually(lambda: len(server.service.resumable) == 0)
        with Client(server, f"?session_id={session}") as client:
            assert client.until("session.created")["session"]["id"] != session


def test_recording(bot: Chatbot, tmp_path: Path) -> None:
    with running(bot, record_folder=tmp_path) as server:
        with Client(server) as client:
            session = client.until("session.created")["session"]["id"]
            client.manual()
            client.send("input_audio_buffer.append", audio=spoken_question())
            client.send("input_audio_buffer.commit")
            client.until("conversation.item.done")
            assert client.ask()["status"] in ("completed", "incomplete")
            assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
        eventually(lambda: server.service.admission.num_active == 0)
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith(session)
    assert {path.name for path in folder.iterdir()} == {"conversation.wav", "conversation.json", "session.json"}
    description = json.loads((folder / "session.json").read_text())
    assert description["session_id"] == session
    assert [item["role"] for item in description["items"]] == ["user", "assistant"]
    conversation = Conversation.load(folder / "conversation.json")
    assert conversation.turns[0].role is Role.USER
    sound, rate = soundfile.read(folder / "conversation.wav")
    assert rate == SAMPLE_RATE
    assert sound.shape[1] == 2
    assert np.abs(sound[:, 0]).max() > 0.05, "the user is not heard"
    assert len(sound) / rate == pytest.approx(description["audio_s"], abs=0.01)


def test_nothing_is_recorded_by_default(bot: Chatbot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with running(bot) as server, Client(server) as client:
        client.write("Hello")
        client.ask()
    assert list(tmp_path.iterdir()) == []


def test_logs_hold_no_content_and_no_ids(bot: Chatbot, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with running(bot, api_keys=KEYS) as server, server.client(Authorization=f"Bearer {KEYS[0]}") as http:
        with Client(server, key=KEYS[0]) as client:
            session = client.until("session.created")["session"]["id"]
            client.write("xylophone")
            client.ask()
        with Client(server, f"?session_id={session}", KEYS[0]) as client:
            client.until("conversation.item.done")
        http.post("/v1/audio/speech", json={"input": "xylophone"})
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "xylophone"}]})
        http.post("/v1/chat/completions", json={"messages": "xylophone"})
    ours = [record for record in caplog.records if not record.name.startswith(("websockets", "httpx", "httpcore"))]
    logged = "\n".join(record.getMessage() for record in ours)
    assert "conversation started (key-0), 1 open" in logged
    for secret in ("xylophone", session, *KEYS):
        assert secret not in logged


def test_both_sides_share_one_clock(tmp_path: Path) -> None:
    now = 0.0
    recorder = SessionRecorder(tmp_path, "sess_1", "tiny", clock=lambda: now)
    half = np.full(SAMPLE_RATE // 2, 0.5, np.float32)
    now = 1.5
    recorder.heard(half, SAMPLE_RATE)  # 1.0 to 1.5
    now = 2.0
    recorder.begin_reply()
    recorder.spoke(half, SAMPLE_RATE)  # 2.0 to 2.5
    recorder.spoke(half, SAMPLE_RATE)  # 2.5 to 3.0, made ahead
    recorder.cut(750)  # heard until 2.75
    now = 4.0
    recorder.begin_reply()
    recorder.spoke(half, SAMPLE_RATE)
    folder = recorder.finish(Conversation(), {"note": "x"})
    sound, _ = soundfile.read(folder / "conversation.wav")

    def stretches(side: int) -> list[tuple[float, float]]:
        loud = np.flatnonzero(np.diff(np.concatenate([[0], np.abs(sound[:, side]) > 0.1, [0]]).astype(int)))
        return [(a / SAMPLE_RATE, b / SAMPLE_RATE) for a, b in loud.reshape(-1, 2).tolist()]

    assert stretches(0) == [(1.0, 1.5)]
    assert stretches(1) == [(2.0, 2.75), (4.0, 4.5)]
    assert json.loads((folder / "session.json").read_text())["note"] == "x"
    SessionRecorder(tmp_path, "sess_2", "tiny")
    assert remove_leftovers(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [folder]


# The end.


def test_draining_finishes_the_answer(bot: Chatbot) -> None:
    with running(bot) as server, Client(server) as client, Client(server) as idle:
        idle.until("session.created")
        client.write("Hello")
        client.send("response.create")
        client.until("response.output_audio_transcript.delta")
        server.drain()
        assert client.until("response.done")["response"]["status"] in ("completed", "incomplete")
        code, reason = client.closed()
        assert code == 1012
        assert "stopping" in reason
        assert idle.closed()[0] == 1012
        eventually(lambda: server.server.drained)


def test_draining_refuses_new_clients(bot: Chatbot) -> None:
    with running(bot) as server, server.client() as http:
        server.service.admission.drain()
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
        assert http.get("/healthz").status_code == 200
        for path, body in (
            ("/v1/audio/speech", {"input": "Hello"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ):
            refused = http.post(path, json=body)
            assert refused.status_code == 503, path
            assert refused.json()["error"]["code"] == "server_stopping"
            assert refused.headers["Retry-After"]
        with pytest.raises(InvalidStatus) as closed:
            Client(server)
        assert closed.value.response.status_code == 503
        with Client(server, origin=server.url) as page:
            assert page.read()["error"]["code"] == "server_stopping"
            assert page.closed()[0] == 1012


def test_draining_has_a_time_limit(bot: Chatbot) -> None:
    with running(bot, drain_s=0.2) as server:
        server.service.admission._requests += 1  # a request that never ends
        server.drain()
        eventually(lambda: server.server.should_exit)
        assert not server.server.drained


def test_requests_beyond_the_limit_are_refused(bot: Chatbot) -> None:
    with running(bot, max_requests=1) as server, server.client() as http:
        server.service.admission._requests += 1
        refused = http.post("/v1/audio/speech", json={"input": "Hello"})
        server.service.admission._requests -= 1
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "server_busy"
        assert http.post("/v1/audio/speech", json={"input": "Hello"}).status_code == 200


def test_a_disconnect_cancels_the_answer(bot: Chatbot) -> None:
    with running(bot) as server:
        with server.client() as http:
            asked = {"input": "Hello, how are you? " * 20, "response_format": "pcm"}
            with http.stream("POST", "/v1/audio/speech", json=asked) as response:
                next(response.iter_raw())
        eventually(lambda: server.service.admission.num_active == 0)
        eventually(lambda: server.service.bot.models.engine.running == 0)
        question: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
        with server.client() as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=question, timeout=httpx.Timeout(30, read=0.001))
        eventually(lambda: server.service.admission.num_active == 0)


def test_a_stalled_reader_is_dropped(bot: Chatbot) -> None:
    with running(bot, stall_s=0.5) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        body = json.dumps({"input": "Hello, how are you? " * 60, "response_format": "wav"}).encode()
        head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        stalled = server.service.metrics.errors.labels("stalled")
        eventually(lambda: stalled._value.get() == 1)
        eventually(lambda: server.service.admission.num_active == 0)
        eventually(lambda: server.service.bot.models.engine.running == 0)
