"""Client secrets: short-lived keys that open real-time sessions of one model from one origin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from duologue.serving.admission import AdmissionError
from duologue.serving.client_secrets import MAX_SECRETS, ClientSecret, ClientSecrets
from duologue.serving.objects import SessionConfig
from tests.live_server import TEXT, TIMEOUT_S, LiveServer, scripted_bot, serving

KEY = "a-key-of-enough-length"
PAGE = "https://app.example.org"
SUBPROTOCOL = "openai-insecure-api-key."


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[LiveServer]:
    with serving(*scripted_bot(tiny_folder), api_keys=(KEY,)) as running:
        yield running


def post(server: LiveServer, key: str = KEY, **body: Any) -> httpx.Response:
    url = f"{server.url.replace('ws://', 'http://')}/realtime/client_secrets"
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(url, json=body, headers=headers, timeout=TIMEOUT_S, trust_env=False)


def first_event(server: LiveServer, secret: str, origin: str | None = None, query: str = "") -> dict[str, Any]:
    """Connects as a page does and returns the first event."""
    offered = ["realtime", SUBPROTOCOL + secret]
    url = f"{server.url}/realtime{query}"
    with connect(url, subprotocols=offered, origin=origin, open_timeout=TIMEOUT_S) as socket:  # type: ignore[arg-type]
        event: dict[str, Any] = json.loads(socket.recv(timeout=TIMEOUT_S))
        return event


def refusal(server: LiveServer, secret: str, origin: str | None = None, query: str = "") -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as refused:
        first_event(server, secret, origin, query)
    response = refused.value.response
    return response.status_code, json.loads(response.body)["error"]["code"]


def test_a_secret_opens_sessions_with_its_configuration(server: LiveServer) -> None:
    session = {"type": "realtime", "model": "gpt-realtime", "instructions": "Be brief."}
    made = post(server, session=session, expires_after={"anchor": "created_at", "seconds": 60})
    assert made.status_code == 200, made.text
    body = made.json()
    assert body["value"].startswith("ek_")
    assert body["session"]["instructions"] == "Be brief."
    for query in ("?model=gpt-realtime", ""):
        created = first_event(server, body["value"], query=query)
        assert created["type"] == "session.created"
        assert created["session"]["instructions"] == "Be brief."
        assert created["session"]["model"] == "gpt-realtime"
    assert refusal(server, body["value"], query="?model=another") == (403, "model_not_allowed")


def test_a_secret_is_for_its_origin(server: LiveServer) -> None:
    secret = post(server, origin=PAGE).json()["value"]
    assert first_event(server, secret, PAGE)["type"] == "session.created"
    assert refusal(server, secret, "https://elsewhere.example.org") == (403, "origin_not_allowed")
    assert refusal(server, secret) == (403, "origin_not_allowed")


def test_a_secret_without_an_origin_belongs_to_the_first(server: LiveServer) -> None:
    own = server.url.replace("ws://", "http://").removesuffix("/v1")
    secret = post(server).json()["value"]
    assert refusal(server, secret, PAGE) == (403, "origin_not_allowed")  # not in --origin
    assert first_event(server, secret, own)["type"] == "session.created"
    assert refusal(server, secret) == (403, "origin_not_allowed")


def test_a_secret_is_no_api_key(server: LiveServer) -> None:
    secret = post(server).json()["value"]
    assert post(server, key=secret).status_code == 401
    headers = {"Authorization": f"Bearer {secret}"}
    url = server.url.replace("ws://", "http://")
    assert httpx.get(f"{url}/models", headers=headers, trust_env=False).status_code == 401


def test_an_unknown_secret_is_refused(server: LiveServer) -> None:
    assert refusal(server, "ek_unknown") == (401, "invalid_client_secret")
    own = server.url.replace("ws://", "http://").removesuffix("/v1")
    error = first_event(server, "ek_unknown", own)  # a page sees no status of a WebSocket
    assert error["error"]["code"] == "invalid_client_secret"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"expires_after": {"seconds": 9}}, "expires_after.seconds"),
        ({"expires_after": {"seconds": 7201}}, "expires_after.seconds"),
        ({"origin": "app.example.org"}, "origin"),
        ({"session": {"type": "transcription"}}, "session.type"),
        ({"session": {"tools": [{"type": "function", "name": "f"}]}}, "session.tools"),
        ({"session": {"audio": {"output": {"voice": "nobody"}}}}, "session.audio.output.voice"),
        ({"model": "gpt-realtime"}, "model"),
    ],
)
def test_a_wrong_request_is_named(server: LiveServer, body: dict[str, Any], param: str) -> None:
    response = post(server, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_secret_expires() -> None:
    now = [1000.0]
    store = ClientSecrets(clock=lambda: now[0])
    value = store.add(ClientSecret("key-0", 1060.0, SessionConfig()))
    now[0] = 1059.9
    assert store.find(value) is not None
    now[0] = 1060.0
    with pytest.raises(AdmissionError, match="expired"):
        store.find(value)
    assert store.find("another-kind-of-key") is None


def test_the_number_of_secrets_is_bounded() -> None:
    now = [0.0]
    store = ClientSecrets(clock=lambda: now[0])
    for _ in range(MAX_SECRETS - 1):
        store._by_hash[len(store._by_hash).to_bytes(8)] = ClientSecret("", 10.0, SessionConfig())
    store.add(ClientSecret("", 20.0, SessionConfig()))
    with pytest.raises(AdmissionError, match="too many"):
        store.add(ClientSecret("", 20.0, SessionConfig()))
    now[0] = 10.0
    store.add(ClientSecret("", 20.0, SessionConfig()))
    assert len(store._by_hash) == 2


def test_the_openai_sdk_makes_and_uses_a_secret(server: LiveServer) -> None:
    openai = pytest.importorskip("openai")
    base_url = server.url.replace("ws://", "http://")
    made = openai.OpenAI(api_key=KEY, base_url=base_url).realtime.client_secrets.create(
        session={"type": "realtime", "model": "gpt-realtime", "output_modalities": ["text"]},
        expires_after={"anchor": "created_at", "seconds": 30},
    )
    assert made.session.output_modalities == ["text"]
    with openai.OpenAI(api_key=made.value, base_url=base_url).realtime.connect(model="gpt-realtime") as connection:
        message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello."}]}
        connection.conversation.item.create(item=message)
        connection.response.create()
        for event in connection:
            assert event.type != "error", event
            if event.type == "response.output_text.done":
                assert event.text == TEXT
                break
