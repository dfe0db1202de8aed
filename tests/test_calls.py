"""Real-time sessions over WebRTC, with aiortc as the client in the test's own process."""

from __future__ import annotations

import asyncio
import fractions
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from duologue import rates
from duologue.audio import resample
from duologue.pcm import from_int16
from tests.fuzz import SDP
from tests.live_server import NUM_SPEECH, TEXT, TIMEOUT_S, LiveServer, kept, question, scripted_bot, serving

aiortc = pytest.importorskip("aiortc", reason="aiortc is not installed: pip install -e '.[webrtc]'")
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack  # noqa: E402
from av import AudioFrame  # noqa: E402

KEY = "a-key-of-enough-length"
PAGE = "https://app.example.org"
RATE, FRAME = 48_000, 960


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[LiveServer]:
    with serving(*scripted_bot(tiny_folder), api_keys=(KEY,)) as running:
        yield running


@pytest.fixture(autouse=True)
def _released(server: LiveServer) -> None:
    server.engine.release()


class Microphone(MediaStreamTrack):  # type: ignore[misc]
    """Says what is put into `samples`, and silence."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.samples = np.zeros(0, np.int16)
        self._began, self._count = time.monotonic(), 0

    def ask(self) -> None:
        wav = from_int16(question(before_s=0.0, after_s=0.0))
        self.samples = (resample(wav, 24_000, RATE) * 32767).astype(np.int16)

    async def recv(self) -> Any:
        await asyncio.sleep(max(0.0, self._began + self._count * FRAME / RATE - time.monotonic()))
        piece, self.samples = self.samples[:FRAME], self.samples[FRAME:]
        frame = AudioFrame.from_ndarray(np.pad(piece, (0, FRAME - len(piece)))[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self._count * FRAME, fractions.Fraction(1, RATE)
        self._count += 1
        return frame


class Caller:
    """A WebRTC client: sends events, and holds the events and the audio that came."""

    def __init__(self) -> None:
        self.peer = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        self.microphone = Microphone()
        self.peer.addTrack(self.microphone)
        self.channel = self.peer.createDataChannel("oai-events")
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.seen: list[dict[str, Any]] = []
        self.frames: list[tuple[float, np.ndarray]] = []  # arrival and samples
        self.channel.on("message", lambda text: self.events.put_nowait(json.loads(text)))
        self.peer.on("track", lambda track: asyncio.ensure_future(self._listen(track)))

    async def _listen(self, track: Any) -> None:
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            self.frames.append((time.monotonic(), frame.to_ndarray().reshape(-1, 2)[:, 0]))

    async def offer(self) -> str:
        await self.peer.setLocalDescription(await self.peer.createOffer())
        return str(self.peer.localDescription.sdp)

    async def connect(self, server: LiveServer, key: str = KEY, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/sdp", **more}
        answer = await post(server, headers=headers, content=await self.offer())
        if answer.status_code == 201:
            await self.peer.setRemoteDescription(aiortc.RTCSessionDescription(sdp=answer.text, type="answer"))
        return answer

    def send(self, kind: str, **fields: Any) -> None:
        self.channel.send(json.dumps({"type": kind, **fields}))

    async def until(self, kind: str) -> dict[str, Any]:
        while True:
            event = await self.events.get()
            self.seen.append(event)
            if event["type"] == kind:
                return event

    async def ask(self) -> None:
        content = [{"type": "input_text", "text": "Hello."}]
        self.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
        self.send("response.create")

    def sound(self) -> np.ndarray:
        return np.concatenate([samples for _, samples in self.frames])


async def post(server: LiveServer, **sent: Any) -> httpx.Response:
    url = f"{server.url.replace('ws://', 'http://')}/realtime/calls"
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
        return await client.post(url, **sent)


def hold(work: Callable[[Caller], Any]) -> None:
    async def held() -> None:
        caller = Caller()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await work(caller)
        finally:
            await caller.peer.close()

    asyncio.run(held())


def test_a_spoken_question_is_answered_in_paced_frames(server: LiveServer) -> None:
    async def work(caller: Caller) -> None:
        answer = await caller.connect(server)
        assert answer.status_code == 201
        assert answer.headers["content-type"].startswith("application/sdp")
        assert answer.headers["location"].startswith("/v1/realtime/calls/rtc_")
        created = await caller.until("session.created")
        assert created["session"]["model"] == "tiny"
        caller.microphone.ask()
        await caller.until("input_audio_buffer.speech_started")
        started = await caller.until("output_audio_buffer.started")
        if not any(event["type"] == "response.done" for event in caller.seen):
            await caller.until("response.done")
        if not any(event["type"] == "output_audio_buffer.stopped" for event in caller.seen):
            await caller.until("output_audio_buffer.stopped")
        done = next(event["response"] for event in caller.seen if event["type"] == "response.done")
        assert done["id"] == started["response_id"]
        assert done["output"][0]["content"][0]["transcript"] == TEXT
        kinds = {event["type"] for event in caller.seen}
        assert "response.output_audio.delta" not in kinds
        assert "error" not in kinds
        await asyncio.sleep(0.3)
        loud = np.abs(caller.sound().astype(np.int32)) > 200
        heard_s = (len(loud) - loud.argmax() - loud[::-1].argmax()) / RATE
        expected_s = rates.speak_samples_for_tokens(NUM_SPEECH) / rates.SPEAK_SAMPLE_RATE
        assert heard_s == pytest.approx(expected_s, abs=0.3)
        # Frames of 20 ms, not faster than real time.
        (first, _), (last, _) = caller.frames[0], caller.frames[-1]
        assert {len(samples) for _, samples in caller.frames} == {FRAME}
        assert len(caller.frames) * FRAME / RATE < last - first + 0.5

    hold(work)


def test_clearing_the_output_cuts_the_history_at_what_was_sent(server: LiveServer) -> None:
    sessions: list[str] = []

    async def work(caller: Caller) -> None:
        await caller.connect(server)
        sessions.append((await caller.until("session.created"))["session"]["id"])
        await caller.ask()
        started = await caller.until("output_audio_buffer.started")
        await asyncio.sleep(0.5)
        caller.send("output_audio_buffer.clear")
        cleared = await caller.until("output_audio_buffer.cleared")
        assert cleared["response_id"] == started["response_id"]
        await asyncio.sleep(1.5)  # an estimate would go on
        caller.microphone.ask()
        truncated = await caller.until("conversation.item.truncated")
        assert 0 < truncated["audio_end_ms"] < 1500

    hold(work)
    assert kept(server, sessions[0]).items.order[1].heard_ms is not None


@pytest.mark.parametrize("kind", ["input_audio_buffer.append", "playback.ack"])
def test_audio_in_events_is_refused(server: LiveServer, kind: str) -> None:
    async def work(caller: Caller) -> None:
        await caller.connect(server)
        await caller.until("session.created")
        caller.send(kind, audio="AAAA", event_id="mine")
        error = (await caller.until("error"))["error"]
        assert (error["code"], error["event_id"]) == ("invalid_event_for_transport", "mine")
        caller.send("session.update", session={"type": "realtime", "instructions": "x"})
        await caller.until("session.updated")

    hold(work)


def test_a_page_calls_with_a_client_secret_and_a_form(server: LiveServer) -> None:
    url = f"{server.url.replace('ws://', 'http://')}/realtime/client_secrets"
    headers = {"Authorization": f"Bearer {KEY}"}
    made = httpx.post(url, json={"origin": PAGE}, headers=headers, trust_env=False, timeout=TIMEOUT_S).json()

    async def work(caller: Caller) -> None:
        offer, session = await caller.offer(), json.dumps({"type": "realtime", "instructions": "Be brief."})
        headers = {"Authorization": f"Bearer {made['value']}", "Origin": "https://elsewhere.example.org"}
        form = {"sdp": (None, offer, "application/sdp"), "session": (None, session, "application/json")}
        refused = await post(server, headers=headers, files=form)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
        answer = await post(server, headers={**headers, "Origin": PAGE}, files=form)
        assert answer.status_code == 201, answer.text
        assert answer.headers["access-control-allow-origin"] == PAGE
        await caller.peer.setRemoteDescription(aiortc.RTCSessionDescription(sdp=answer.text, type="answer"))
        assert (await caller.until("session.created"))["session"]["instructions"] == "Be brief."

    hold(work)


def test_the_session_ends_with_its_call(server: LiveServer) -> None:
    async def work(caller: Caller) -> None:
        await caller.connect(server)
        await caller.until("session.created")

    hold(work)
    deadline = time.monotonic() + TIMEOUT_S
    while server.service.admission.num_active:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_call_may_open_slower_than_a_stalled_client_reads(tiny_folder: Path) -> None:
    """A browser needs seconds for ICE and DTLS, in which it reads nothing."""

    async def work(caller: Caller) -> None:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/sdp"}
        answer = await post(hurried, headers=headers, content=await caller.offer())
        await asyncio.sleep(3 * hurried.service.settings.stall_s)
        await caller.peer.setRemoteDescription(aiortc.RTCSessionDescription(sdp=answer.text, type="answer"))
        await caller.until("session.created")

    with serving(*scripted_bot(tiny_folder), api_keys=(KEY,), stall_s=0.2) as hurried:
        hold(work)


def test_a_call_that_never_opens_is_ended(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duologue.serving.call.OPEN_S", 0.2)

    async def work(caller: Caller) -> None:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/sdp"}
        assert (await post(server, headers=headers, content=await caller.offer())).status_code == 201
        while server.service.admission.num_active:
            await asyncio.sleep(0.02)
        assert caller.events.empty()

    hold(work)


HALF = SDP.replace("m=audio", "=audio").replace("UDP/DTLS", "UP/DTLS")  # a data channel without a transport


@pytest.mark.parametrize("content", ["", "no sdp", "v=0\r\nm=audio x", HALF])
def test_a_bad_offer_is_refused(server: LiveServer, content: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/sdp"}
    response = asyncio.run(post(server, headers=headers, content=content))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "sdp"


def test_a_call_needs_the_key(server: LiveServer) -> None:
    response = asyncio.run(post(server, headers={"Content-Type": "application/sdp"}, content="v=0"))
    assert response.status_code == 401


def test_a_call_that_cannot_be_answered_stops_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    from duologue.serving.call import Call
    from duologue.serving.errors import ApiError

    async def fail(*_: object) -> None:
        raise ValueError("no answer")

    async def work(caller: Caller) -> None:
        call = Call()
        monkeypatch.setattr(call._peer, "createAnswer", fail)
        with pytest.raises(ApiError, match="the SDP offer cannot be read"):
            await call.answer(await caller.offer())
        assert call._listening is not None
        with pytest.raises(asyncio.CancelledError):
            await call._listening

    hold(work)
