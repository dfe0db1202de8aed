"""OpenAI's Node SDK, unmodified, against the real server, and its recorded requests where Node is not there.

The SDK comes with `npm install --no-package-lock --prefix tests/node`. `python -m tests.record_requests` records.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duologue.conversation.chatbot import load
from tests.serving import START_S, Running, running
from tests.tiny import write_tiny_chatbot

FOLDER = Path(__file__).parent / "node"
RECORDED = Path(__file__).parent / "golden" / "client_requests.json"
KEY = "a-key-of-enough-length"
REFUSED = "get_weather"  # the only request that must fail: it gives a tool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    bot = load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_tokens=30))
    with running(bot, api_keys=(KEY,)) as it:
        yield it


@pytest.mark.skipif(
    shutil.which("node") is None or not (FOLDER / "node_modules" / "openai").is_dir(),
    reason="the Node SDK is not there: npm install --no-package-lock --prefix tests/node",
)
def test_the_node_sdk(server: Running) -> None:
    command = ["node", str(FOLDER / "sdk.mjs"), f"{server.url}/v1", KEY, "realtime"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=True)
    told = {line["kind"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert told.pop("tools")["status"] == 400
    assert not {kind: line for kind, line in told.items() if "error" in line}
    assert told["models"]["ids"] == ["tiny"]
    assert told["chat"]["role"] == "assistant"
    assert told["chat.stream"]["chunks"] > 2
    assert told["chat.audio"]["bytes"] > 10_000
    assert told["speech"]["bytes"] > 1000
    assert told["client_secret"] == {"kind": "client_secret", "prefix": "ek_", "modalities": ["text"]}
    assert told["transcription"]["text"] == ""  # of silence
    assert isinstance(told["realtime"]["text"], str)


def recorded() -> list[dict[str, Any]]:
    requests: list[dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return requests


@pytest.mark.parametrize("request_", recorded(), ids=lambda one: f"{one['client']}:{one['path']}")
def test_recorded_requests_are_answered(server: Running, request_: dict[str, Any]) -> None:
    body = base64.b64decode(request_["body"])
    headers = {**request_["headers"], "authorization": f"Bearer {KEY}"}
    with server.client() as client:
        response = client.request(request_["method"], request_["path"], content=body, headers=headers)
    error = {} if response.is_success else response.json()["error"]
    if REFUSED.encode() in body:
        assert (response.status_code, error["param"]) == (400, "tools")
    else:
        assert response.status_code == 200, error
