"""Records the HTTP requests of OpenAI's SDKs for Python and Node: python -m tests.record_requests.

Writes tests/golden/client_requests.json. Every request is answered by an error, so that each is sent once.
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from duologue.sound_files import wav_bytes

FOLDER = Path(__file__).parent
DROPPED = ("host", "content-length", "connection", "authorization", "accept-encoding", "expect")
ANSWER = b'{"error": {"message": "recorded", "type": "invalid_request_error", "param": null, "code": null}}'
QUESTION: list[Any] = [{"role": "user", "content": "Hello"}]


def python_requests(base_url: str) -> None:
    """Sends one request of each kind by the Python SDK."""
    import openai

    client = openai.OpenAI(base_url=base_url, api_key="recorded", max_retries=0)
    session: Any = {"type": "realtime", "model": "gpt-realtime"}
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    audio: Any = {"voice": "fable", "format": "wav"}
    silence = wav_bytes(np.zeros(1600, np.float32), 16_000)
    neutral: Any = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": None, "stop": None, "tools": []}
    calls = (
        lambda: client.models.list(),
        lambda: client.chat.completions.create(model="gpt-audio", messages=QUESTION, **neutral),
        lambda: client.chat.completions.create(model="gpt-audio", messages=QUESTION, stream=True, tool_choice="none"),
        lambda: client.chat.completions.create(
            model="gpt-audio", messages=QUESTION, modalities=["text", "audio"], audio=audio
        ),
        lambda: client.chat.completions.create(model="gpt-audio", messages=QUESTION, tools=[tool]),
        lambda: client.audio.speech.create(model="tts-1", voice="nova", input="Hi", response_format="pcm"),
        lambda: client.audio.transcriptions.create(model="whisper-1", file=("silence.wav", silence), language="en"),
        lambda: client.realtime.client_secrets.create(session=session),
    )
    for call in calls:
        try:
            call()
        except openai.APIStatusError:
            continue
        raise AssertionError("a recorded request was answered")


async def record() -> list[dict[str, Any]]:
    requests: list[dict[str, Any]] = []
    client = ""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = dict(_header(line) for line in head[1:] if line)
        length = int(headers.get("content-length", "0"))
        body = await reader.readexactly(length) if length else b""
        if headers.get("transfer-encoding") == "chunked":
            body = await _chunks(reader)
        kept = {name: value for name, value in headers.items() if name not in (*DROPPED, "transfer-encoding")}
        text = base64.b64encode(body).decode()
        requests.append({"client": client, "method": method, "path": path, "headers": kept, "body": text})
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n")
        writer.write(f"Content-Length: {len(ANSWER)}\r\n\r\n".encode() + ANSWER)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        client = "openai-python"
        await asyncio.to_thread(python_requests, url)
        client = "openai-node"
        command = ["node", str(FOLDER / "node" / "sdk.mjs"), url, "recorded"]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    return requests


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.lower(), value.strip()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


if __name__ == "__main__":
    path = FOLDER / "golden" / "client_requests.json"
    path.write_text(json.dumps(asyncio.run(record()), indent=1) + "\n", encoding="utf-8")
