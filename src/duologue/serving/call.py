"""A call: a real-time session over WebRTC instead of a WebSocket.

The data channel `oai-events` carries the protocol's events. Audio is RTP, Opus at 48 kHz, in frames of 20 ms; events
hold none. The call reports what was sent over RTP as played, so that an interruption cuts the history there.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame
from numpy.typing import NDArray
from starlette.websockets import WebSocketDisconnect

from duologue.audio import StreamingResampler
from duologue.client.playback import Playback, PlaybackPosition
from duologue.pcm import from_int16, to_int16
from duologue.serving.errors import ApiError
from duologue.serving.formats import pack, unpack
from duologue.serving.objects import Format, Pcm, Pcma, Pcmu
from duologue.serving.protocol import new_id

RATE = 48_000
FRAME = RATE // 50  # samples: 20 ms
REPORT_S = 0.2  # interval of the reports of what was played
OPEN_S = 30.0  # for ICE, DTLS and the data channel; a call that is not open by then is ended
MAX_WAITING = 1000  # messages, or 20 s of audio; a client that is further ahead is hung up on
ICE_VARIABLE = "DUOLOGUE_ICE_SERVERS"  # JSON: [{"urls": "stun:...", "username": ..., "credential": ...}]
CHANNEL = "oai-events"
_FORMATS: dict[str, Format] = {
    "audio/pcm": Pcm(),
    "audio/pcmu": Pcmu(type="audio/pcmu"),
    "audio/pcma": Pcma(type="audio/pcma"),
}


class _AnswerTrack(MediaStreamTrack):  # type: ignore[misc]  # aiortc may be absent
    """The model's voice: one frame every 20 ms, silence when there is nothing to play."""

    kind = "audio"

    def __init__(self, playback: Playback, on_frame: Callable[[], None]) -> None:
        super().__init__()
        self._playback, self._on_frame = playback, on_frame
        self._began: float | None = None
        self._num_frames = 0

    async def recv(self) -> AudioFrame:
        clock = asyncio.get_running_loop().time
        if self._began is None:
            self._began = clock()
        await asyncio.sleep(max(0.0, self._began + self._num_frames * FRAME / RATE - clock()))
        frame = AudioFrame.from_ndarray(self._playback.take(FRAME)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self._num_frames * FRAME, Fraction(1, RATE)
        self._num_frames += 1
        self._on_frame()
        return frame


class Call:
    """One WebRTC connection, with the methods of a WebSocket that a session uses: `send_text`, `receive`, `close`.

    Attributes:
        id: named in the `Location` of the answer.
    """

    def __init__(self) -> None:
        servers = [RTCIceServer(**server) for server in json.loads(os.environ.get(ICE_VARIABLE) or "[]")]
        self.id = new_id("rtc")
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=servers))
        self._channel: RTCDataChannel | None = None
        self._opened = asyncio.Event()
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._playback = Playback(RATE, ahead_ms=0.0)
        self._outgoing: dict[str, StreamingResampler] = {}  # by item
        self._responses: dict[str, str] = {}  # response id by item
        self._spoken: Format = Pcm()
        self._heard: Format = Pcm()
        self._playing = ""  # the response that plays
        self._reported: tuple[PlaybackPosition | None, float] = (None, 0.0)
        self._listening: asyncio.Task[None] | None = None
        self._peer.addTrack(_AnswerTrack(self._playback, self._on_frame))
        self._peer.on("datachannel", self._on_channel)
        self._peer.on("track", self._on_track)
        self._peer.on("connectionstatechange", self._on_state)

    async def answer(self, offer: str) -> str:
        """Returns the SDP answer to an SDP offer. Raises ApiError if the offer cannot be read."""
        try:
            await self._peer.setRemoteDescription(RTCSessionDescription(sdp=offer, type="offer"))
            await self._peer.setLocalDescription(await self._peer.createAnswer())
        except Exception as error:  # aiortc raises many types for a text that is no SDP
            with suppress(Exception):  # a data channel without a transport cannot be closed
                await self.close()
            raise ApiError(f"the SDP offer cannot be read ({type(error).__name__})", "invalid_sdp", "sdp") from None
        return str(self._peer.localDescription.sdp)

    async def wait_until_open(self) -> bool:
        """Waits for the data channel for at most `OPEN_S`; returns whether it is open."""
        with suppress(TimeoutError):
            async with asyncio.timeout(OPEN_S):
                await self._opened.wait()
        return self._channel is not None

    # What a session uses of a WebSocket.

    async def send_text(self, data: str) -> None:
        """Sends an event over the data channel; its audio is played instead. Raises WebSocketDisconnect."""
        event = json.loads(data)
        match event["type"]:
            case "session.created" | "session.updated":
                audio = event["session"]["audio"]
                self._heard = _FORMATS[audio["input"]["format"]["type"]]
                self._spoken = _FORMATS[audio["output"]["format"]["type"]]
            case "response.output_audio.delta":
                self._play(event)
                return
            case "response.output_audio.done":
                self._end(event["item_id"])
            case "conversation.item.truncated" if event["item_id"] == next(reversed(self._responses), None):
                self._clear()
        self._send(event, data)

    async def receive(self) -> dict[str, Any]:
        return await self._messages.get()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        if self._listening is not None:
            self._listening.cancel()
        await self._peer.close()

    # Audio to the client.

    def _play(self, event: dict[str, Any]) -> None:
        item_id = event["item_id"]
        if item_id not in self._outgoing:
            self._outgoing[item_id] = StreamingResampler(self._spoken.rate, RATE)
            self._responses[item_id] = event["response_id"]
            self._report(item_id, 0)
        wav = self._outgoing[item_id].step(unpack(event["delta"], self._spoken))
        self._playback.add(item_id, to_int16(wav))

    def _end(self, item_id: str) -> None:
        if (resampler := self._outgoing.pop(item_id, None)) is not None:
            self._playback.add(item_id, to_int16(resampler.step(np.zeros(0, np.float32), last=True)))
        self._playback.end(item_id)

    def _clear(self) -> None:
        """Drops the audio that was not sent, and says so."""
        for cut in self._playback.cut():
            self._report(cut.item_id, cut.played_ms)
        if self._playing:
            self._tell("output_audio_buffer.cleared", response_id=self._playing)
            self._playing = ""

    def _on_frame(self) -> None:
        """Reports the position of playback: at intervals, and at the end."""
        position, (last, at) = self._playback.heard, self._reported
        now, active = asyncio.get_running_loop().time(), self._playback.active
        if position is not None and position != last:
            response_id = self._responses[position.item_id]
            if active and response_id != self._playing:
                self._playing = response_id
                self._tell("output_audio_buffer.started", response_id=response_id)
            if now - at >= REPORT_S or not active:
                self._reported = position, now
                self._report(position.item_id, position.played_ms)
        if self._playing and not active:
            self._tell("output_audio_buffer.stopped", response_id=self._playing)
            self._playing = ""

    def _report(self, item_id: str, played_ms: int) -> None:
        self._take({"type": "playback.ack", "item_id": item_id, "played_ms": played_ms})

    # Audio and events from the client.

    def _on_track(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio" and self._listening is None:
            self._listening = asyncio.ensure_future(self._listen(track))

    async def _listen(self, track: MediaStreamTrack) -> None:
        wire, resampler = self._heard, StreamingResampler(RATE, self._heard.rate)
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            if wire != self._heard:
                wire, resampler = self._heard, StreamingResampler(RATE, self._heard.rate)
            if len(wav := resampler.step(_mono(frame))):
                audio = base64.b64encode(pack(wav, wire)).decode("ascii")
                self._take({"type": "input_audio_buffer.append", "audio": audio})

    def _on_channel(self, channel: RTCDataChannel) -> None:
        if channel.label != CHANNEL or self._channel is not None:
            return
        self._channel = channel
        channel.on("message", self._on_message)
        channel.on("close", self._hang_up)
        self._opened.set()

    def _on_message(self, message: str | bytes) -> None:
        event: Any = None
        if isinstance(message, str):
            try:
                event = json.loads(message)
            except (ValueError, RecursionError):
                event = None  # the session refuses it
        kind = event.get("type") if isinstance(event, dict) else None
        if kind == "output_audio_buffer.clear":
            self._clear()
        elif kind in ("input_audio_buffer.append", "playback.ack"):
            text = f"{kind} is not used over WebRTC: audio is sent as RTP, and the server counts what it sends"
            about = {"type": "invalid_request_error", "code": "invalid_event_for_transport", "message": text}
            self._tell("error", error={**about, "param": "type", "event_id": event.get("event_id")})
        else:
            self._put({"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message})

    def _on_state(self) -> None:
        if self._peer.connectionState in ("failed", "closed"):
            self._hang_up()

    def _hang_up(self) -> None:
        self._messages.put_nowait({"type": "websocket.disconnect"})
        self._opened.set()

    def _take(self, event: dict[str, Any]) -> None:
        self._put({"type": "websocket.receive", "text": json.dumps(event)})

    def _put(self, message: dict[str, Any]) -> None:
        if self._messages.qsize() < MAX_WAITING:
            self._messages.put_nowait(message)
        else:
            self._hang_up()

    def _tell(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": new_id("event"), **fields}
        if self._channel is not None and self._channel.readyState == "open":
            self._channel.send(json.dumps(event))

    def _send(self, event: dict[str, Any], data: str) -> None:
        if self._channel is None or self._channel.readyState != "open":
            raise WebSocketDisconnect(1006)
        self._channel.send(data)


def _mono(frame: AudioFrame) -> NDArray[np.float32]:
    """Returns the samples (S,) of a frame of 16-bit packed audio: the mean of its channels."""
    samples = np.asarray(frame.to_ndarray(), np.int16).reshape(-1, len(frame.layout.channels))
    mean: NDArray[np.float32] = np.mean(from_int16(samples), axis=1, dtype=np.float32)
    return mean
