"""Records the real-time events that pipecat, LiveKit Agents and speech-to-speech send: python -m tests.record_sessions.

Writes tests/golden/client_sessions.json. The number of its samples replaces sound, and `item:3` the id of the server's
fourth item. The clients run against the
server with the tiny model; `tests/test_realtime_clients.py` sends the events again where the clients are missing.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import importlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duologue import rates
from duologue.serving.realtime_session import RealtimeSession
from duologue.serving.send_queue import SendQueue
from tests.live_server import NUM_SPEECH, question, scripted_bot, serving
from tests.tiny import write_tiny_chatbot

KEY = "a-key-of-enough-length"
GOLDEN = Path(__file__).parent / "golden" / "client_sessions.json"


def plain(event: dict[str, Any], items: list[str]) -> dict[str, Any]:
    """The event without its sound and with numbers in place of the server's items."""
    if event["type"] == "input_audio_buffer.append":
        return {"type": event["type"], "num_samples": len(base64.b64decode(event["audio"])) // 2}
    text = json.dumps(event)
    for number, item in enumerate(items):
        text = text.replace(f'"{item}"', f'"item:{number}"')
    changed: dict[str, Any] = json.loads(text)
    return changed


def record(folder: Path, client: Callable[[str], Any]) -> list[dict[str, Any]]:
    """The events that a client sends to the server; `client` is given the server's base URL."""
    events: list[dict[str, Any]] = []
    items: list[str] = []
    take, put = RealtimeSession.take, SendQueue.put

    async def noting(self: RealtimeSession, message: str | bytes) -> None:
        events.append(plain(json.loads(message), items))
        await take(self, message)

    async def putting(self: SendQueue, event: Any, *more: Any, **fields: Any) -> None:
        if event.type == "conversation.item.added":
            items.append(event.item.id)
        await put(self, event, *more, **fields)

    RealtimeSession.take, SendQueue.put = noting, putting  # type: ignore[method-assign]
    try:
        with serving(*scripted_bot(folder), api_keys=(KEY,)) as server:
            print(asyncio.run(client(server.url)).errors)
    finally:
        RealtimeSession.take, SendQueue.put = take, put  # type: ignore[method-assign]
    return events


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Appends in a row as one."""
    result: list[dict[str, Any]] = []
    for event in events:
        if result and "num_samples" in event and "num_samples" in result[-1]:
            result[-1]["num_samples"] += event["num_samples"]
        else:
            result.append(dict(event))
    return result


def main() -> None:
    """Records the clients that are installed; what others sent earlier stays."""
    pcm = question(after_s=1.5).tobytes()
    seconds = rates.speak_samples_for_tokens(NUM_SPEECH) / rates.SPEAK_SAMPLE_RATE - 0.1
    # Package -> its module here, and what runs it.
    clients: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
        "livekit-plugins-openai": ("livekit_client", lambda module, url: module.talk(url, KEY, pcm)),
        "speech-to-speech": ("speech_to_speech_client", lambda module, url: module.talk(url, KEY, pcm)),
        "pipecat-ai": ("pipecat_client", lambda module, url: module.ask(url, KEY, pcm, seconds)),
    }
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_chatbot(Path(folder) / "tiny", max_positions=512, max_tokens=60)
        for name, (module_name, client) in clients.items():
            try:
                module = importlib.import_module(f"tests.{module_name}")
            except ImportError as error:
                print(f"{name}: kept as it was ({error})")
                continue
            events = joined(record(model, functools.partial(client, module)))
            recorded[name] = {"version": importlib.metadata.version(name), "events": events}
            print(f"{name}: {len(events)} events")
    GOLDEN.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
