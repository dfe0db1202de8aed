"""OpenAI's SDKs for browsers, unmodified, in Chromium on a page of another origin; and the page of `deploy/`.

They come with `npm install --no-package-lock --prefix tests/node`.
"""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import soundfile

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: browser)")
pytest.importorskip("aiortc", reason="aiortc is not installed (extra: webrtc)")

from playwright.sync_api import Browser, Page, expect, sync_playwright

from duologue.pcm import from_int16
from tests.browser import launch, needs_chromium, wait_for
from tests.live_server import TEXT, TIMEOUT_S, LiveServer, question, scripted_bot, serving

ROOT = Path(__file__).parent.parent
PACKAGES = Path(__file__).parent / "node" / "node_modules"
AGENTS = PACKAGES / "@openai" / "agents-realtime" / "dist" / "bundle"
OPENAI = PACKAGES / "openai"
KEY = "a-key-of-enough-length"
WORDS = "Is this in writing?"

pytestmark = needs_chromium
needs_sdks = pytest.mark.skipif(
    not (AGENTS.is_dir() and OPENAI.is_dir()),
    reason="the SDKs are not there: npm install --no-package-lock --prefix tests/node",
)

# The session of @openai/agents over WebRTC; `loudest` is the peak of what the page plays.
AGENT = """async ({ url, secret }) => {
  const { RealtimeAgent, RealtimeSession, OpenAIRealtimeWebRTC } = await import("/agents/openai-realtime-agents.mjs");
  const audioElement = document.createElement("audio");
  audioElement.autoplay = true;
  const transport = new OpenAIRealtimeWebRTC({ baseUrl: `${url}/realtime/calls`, audioElement });
  const agent = new RealtimeAgent({ name: "Assistant", instructions: "You are brief." });
  const session = new RealtimeSession(agent, { transport, model: "gpt-realtime" });
  window.seen = { replies: [], errors: [], history: [], loudest: 0 };
  session.on("error", ({ error }) => seen.errors.push(JSON.stringify(error)));
  session.on("agent_end", (context, agent, output) => seen.replies.push(output));
  session.on("history_updated", (history) => (seen.history = history));
  await session.connect({ apiKey: secret });
  window.session = session;
  const context = new AudioContext();
  const meter = context.createAnalyser();
  context.createMediaStreamSource(audioElement.srcObject).connect(meter);
  const samples = new Float32Array(meter.fftSize);
  setInterval(() => {
    meter.getFloatTimeDomainData(samples);
    for (const sample of samples) seen.loudest = Math.max(seen.loudest, Math.abs(sample));
  }, 20);
}"""

# The client of `openai`, with a key as a page should not have it. Its WebSocket client takes `wss:` only; the test's
# server has no TLS.
SDK = """async ({ url, key, pcm }) => {
  const { default: OpenAI } = await import("/openai/index.mjs");
  const { OpenAIRealtimeWebSocket } = await import("/openai/realtime/websocket.mjs");
  const client = new OpenAI({ apiKey: key, baseURL: url, dangerouslyAllowBrowser: true, maxRetries: 0 });
  const found = {};
  found.models = (await client.models.list()).data.length;
  const messages = [{ role: "user", content: "Hello." }];
  found.whole = (await client.chat.completions.create({ model: "gpt-audio", messages })).choices[0].message.content;
  found.streamed = "";
  for await (const chunk of await client.chat.completions.create({ model: "gpt-audio", messages, stream: true }))
    found.streamed += chunk.choices[0]?.delta?.content ?? "";
  const said = { model: "tts-1", voice: "nova", input: "Five.", response_format: "wav" };
  const spoken = await client.audio.speech.create(said);
  const wav = await spoken.blob();
  found.bytes = wav.size;
  const file = new File([wav], "said.wav", { type: "audio/wav" });
  found.heard = typeof (await client.audio.transcriptions.create({ model: "whisper-1", file })).text;
  const Native = WebSocket;
  window.WebSocket = class extends Native {
    constructor(address, protocols) { super(address.replace("wss:", "ws:"), protocols); }
  };
  const socket = new OpenAIRealtimeWebSocket({ model: "gpt-realtime" }, client);
  await new Promise((resolve) => socket.on("session.created", resolve));
  const manual = { type: "realtime", audio: { input: { turn_detection: null } } };
  socket.send({ type: "session.update", session: manual });
  socket.send({ type: "input_audio_buffer.append", audio: pcm });
  socket.send({ type: "input_audio_buffer.commit" });
  socket.send({ type: "response.create" });
  found.deltas = 0;
  socket.on("response.output_audio.delta", () => (found.deltas += 1));
  socket.on("response.output_audio_transcript.done", (event) => (found.said = event.transcript));
  await new Promise((resolve, reject) => {
    socket.on("response.done", resolve);
    socket.on("error", reject);
  });
  socket.close();
  return found;
}"""


@pytest.fixture(scope="module")
def server(tiny_folder: Path, origin: str) -> Iterator[LiveServer]:
    with serving(*scripted_bot(tiny_folder), api_keys=(KEY,), allowed_origins=(origin,)) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Its microphone asks a question every ten seconds."""
    file = tmp_path_factory.mktemp("microphone") / "question.wav"
    wav = np.repeat(from_int16(question(before_s=0.5, after_s=8.0)), 2)
    soundfile.write(file, wav, 48_000, subtype="PCM_16")
    with sync_playwright() as playwright:
        browser = launch(playwright, file)
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser, url: str) -> Iterator[tuple[Page, list[str]]]:
    """A page that may use the microphone, and what it throws or complains about."""
    context = browser.new_context(permissions=["microphone"])
    context.set_default_timeout(1000 * TIMEOUT_S)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(url)
    yield page, errors
    context.close()


class Pages(BaseHTTPRequestHandler):
    """An empty page, and the SDKs' modules from the folders in which npm put them."""

    def do_GET(self) -> None:
        _, first, *rest = urlsplit(self.path).path.split("/")
        folder = {"agents": AGENTS, "openai": OPENAI}.get(first)
        file = folder.joinpath(*rest) if folder else None
        body = file.read_bytes() if file else b"<!doctype html><title>A page</title><link rel=icon href=data:,>"
        self.send_response(200)
        self.send_header("Content-Type", "text/javascript" if file else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    """A page of localhost may use the microphone."""
    pages = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    yield f"http://localhost:{pages.server_port}"
    pages.shutdown()
    pages.server_close()


def rest_url(server: LiveServer) -> str:
    return server.url.replace("ws://", "http://")


def client_secret(server: LiveServer, origin: str) -> str:
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{rest_url(server)}/realtime/client_secrets"
    answer = httpx.post(url, json={"origin": origin}, headers=headers, timeout=TIMEOUT_S, trust_env=False)
    return str(answer.json()["value"])


def seen(page: Page) -> Any:
    return page.evaluate("window.seen")


def asked(page: Page) -> list[dict[str, Any]]:
    """First content part of each message of the user."""
    messages = [item for item in seen(page)["history"] if item["type"] == "message"]
    return [item["content"][0] for item in messages if item["role"] == "user"]


def written(page: Page) -> list[str]:
    return [part["text"] for part in asked(page) if part["type"] == "input_text"]


@needs_sdks
def test_openai_agents_talks_over_webrtc(server: LiveServer, browser: Browser, origin: str) -> None:
    server.engine.release()
    with visiting(browser, origin) as (page, errors):
        page.evaluate(AGENT, {"url": rest_url(server), "secret": client_secret(server, origin)})
        wait_for(lambda: TEXT in seen(page)["replies"], page, TIMEOUT_S)  # the question that the microphone asked
        wait_for(lambda: seen(page)["loudest"] > 0.005, page, TIMEOUT_S)
        page.evaluate("session.mute(true)")
        server.engine.hold(after=30)
        num_prompts = len(server.engine.prompts)
        page.evaluate("words => session.sendMessage(words)", WORDS)
        wait_for(lambda: len(server.engine.prompts) > num_prompts, page, TIMEOUT_S)
        count = len(seen(page)["replies"])
        page.evaluate("session.interrupt()")
        server.engine.release()
        page.evaluate("words => session.sendMessage(words)", "And once more?")
        # On a slow machine the microphone asks again before it is muted, and that reply comes first.
        wait_for(lambda: written(page) == [WORDS, "And once more?"], page, TIMEOUT_S)
        wait_for(lambda: TEXT in seen(page)["replies"][count:], page, TIMEOUT_S)
        assert seen(page)["errors"] == []
        assert asked(page)[0]["type"] == "input_audio"
        page.evaluate("session.close()")
    assert errors == []


@needs_sdks
def test_the_sdk_of_openai_works_in_a_page(server: LiveServer, browser: Browser, origin: str) -> None:
    server.engine.release()
    pcm = base64.b64encode(question().tobytes()).decode()
    with visiting(browser, origin) as (page, errors):
        found = page.evaluate(SDK, {"url": rest_url(server), "key": KEY, "pcm": pcm})
    assert errors == []
    assert found.pop("bytes") > 10_000
    assert found.pop("deltas") > 0
    assert found == {"models": 1, "whole": TEXT, "streamed": TEXT, "heard": "string", "said": TEXT}


def test_the_page_of_another_origin_gets_a_spoken_answer(server: LiveServer, browser: Browser) -> None:
    server.engine.release()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = [
        sys.executable,
        str(ROOT / "deploy" / "other_origin.py"),
        "--server",
        rest_url(server).removesuffix("/v1"),
    ]
    environment = {**os.environ, "DUOLOGUE_API_KEY": KEY}
    process = subprocess.Popen([*script, "--port", str(port)], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert str(port) in process.stdout.readline()
        with visiting(browser, f"http://localhost:{port}/") as (page, errors):
            page.get_by_role("button", name="Talk").click()
            expect(page.get_by_text("connected", exact=True)).to_be_visible(timeout=1000 * TIMEOUT_S)
            expect(page.get_by_text(f"Answer: {TEXT}").first).to_be_visible(timeout=1000 * TIMEOUT_S)
            expect(page.get_by_text("You: ").first).to_be_attached(timeout=1000 * TIMEOUT_S)
            played = "document.getElementById('answers').currentTime"
            wait_for(lambda: page.evaluate(played) > 0, page, TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    assert [error for error in errors if "favicon" not in error] == []
