"""Requests as the clients of OpenAI's API send them: neutral values, other names, and requests from browsers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from duologue.conversation.chatbot import Chatbot, load
from duologue.serving.transcriptions import language_code
from tests.serving import Running, running
from tests.tiny import write_tiny_chatbot

ORIGIN = "https://app.example.org"
QUESTION = {"model": "gpt-audio", "messages": [{"role": "user", "content": "Hello"}]}
OPENAI_VOICES = [
    "alloy",
    "ash",
    "ballad",
    "coral",
    "echo",
    "fable",
    "nova",
    "onyx",
    "sage",
    "shimmer",
    "verse",
    "marin",
    "cedar",
]  # openai 3.54.0, SpeechCreateParams.voice


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_tokens=20))


@pytest.fixture(scope="module")
def server(bot: Chatbot) -> Iterator[Running]:
    with running(bot, allowed_origins=(ORIGIN,)) as it:
        yield it


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as it:
        yield it


@pytest.mark.parametrize(
    "neutral",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "stop": []},
        {"frequency_penalty": None, "presence_penalty": None, "logit_bias": None, "stop": None},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": []},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": None, "functions": None, "function_call": "none"},
        {"top_logprobs": None, "logprobs": False, "n": 1, "prediction": None, "web_search_options": None},
        {"top_logprobs": 0, "logprobs": None, "n": None, "reasoning_effort": None, "verbosity": None},
        {"modalities": None, "audio": None, "stream": None, "stream_options": None, "response_format": None},
        {"reasoning_effort": "low", "verbosity": "medium", "prompt_cache_retention": "24h", "service_tier": "auto"},
        {"max_tokens": None, "temperature": None, "top_p": None, "seed": None, "metadata": None, "user": None},
    ],
    ids=lambda fields: ",".join(fields)[:60],
)
def test_neutral_fields_of_chat_clients_are_taken(client: httpx.Client, neutral: dict[str, Any]) -> None:
    response = client.post("/v1/chat/completions", json={**QUESTION, **neutral})
    assert response.status_code == 200, response.text


def test_an_answer_is_sent_back_as_the_sdk_dumps_it(client: httpx.Client) -> None:
    message = client.post("/v1/chat/completions", json=QUESTION).json()["choices"][0]["message"]
    dumped = {**message, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    messages = [*QUESTION["messages"], dumped, {"role": "user", "content": "And now?"}]
    response = client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 200, response.text


def test_a_refusal_names_the_tool(client: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    error = client.post("/v1/chat/completions", json={**QUESTION, "tools": [tool]}).json()["error"]
    assert "get_weather" in error["message"]
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}, *QUESTION["messages"]]
    refused = client.post("/v1/chat/completions", json={"messages": messages})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages.0.tool_calls")


@pytest.mark.parametrize("voice", OPENAI_VOICES)
def test_every_voice_of_openai_speaks(client: httpx.Client, voice: str) -> None:
    body = {"model": "tts-1", "input": "Hi", "voice": voice, "response_format": "pcm", "speed": None}
    response = client.post("/v1/audio/speech", json=body)
    assert response.status_code == 200, response.text
    assert response.content


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/v1/models/tiny", "/metrics"])
def test_head_answers_as_get_without_a_body(client: httpx.Client, path: str) -> None:
    response = client.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == client.get(path).headers["content-type"]


def test_the_preflight_of_openais_browser_sdk_passes(server: Running) -> None:
    own = ("arch", "lang", "os", "package-version", "retry-count", "runtime", "runtime-version")
    names = "authorization,content-type,openai-organization,openai-project,user-agent,"
    names += ",".join(f"x-stainless-{name}" for name in own)
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    with server.client(Origin=ORIGIN, **asked) as client:
        passed = client.options("/v1/chat/completions")
        assert passed.status_code == 200
        assert passed.headers["access-control-allow-origin"] == ORIGIN
        allowed = {name.strip().lower() for name in passed.headers["access-control-allow-headers"].split(",")}
        assert allowed >= set(names.split(","))
    with server.client(Origin="https://elsewhere.example.org", **asked) as client:
        assert "access-control-allow-origin" not in client.options("/v1/chat/completions").headers


def test_json_may_begin_with_a_byte_order_mark(client: httpx.Client) -> None:
    body = b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "Hello"}]}'
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((name, "en") for name in ("en", "en_US", "en-GB", "English", "eng", "ENGLISH")),
        *((name, "zh") for name in ("zh-Hans", "mandarin", "chinese", "zho")),
        ("klingon", "klingon"),
    ],
)
def test_languages_by_their_names(name: str, code: str) -> None:
    assert language_code(name) == code


@pytest.mark.parametrize("language", ["en_US", "english", "auto", ""])
def test_a_transcription_takes_the_language(bot: Chatbot, language: str) -> None:
    question = (Path(__file__).parent.parent / "src/duologue/pocket/question.wav").read_bytes()
    with running(bot) as server, server.client() as client:
        sent = {"files": {"file": ("question.wav", question)}, "data": {"model": "whisper-1", "language": language}}
        response = client.post("/v1/audio/transcriptions", **sent)  # type: ignore[arg-type]
        assert response.status_code in (200, 404), response.text
        assert "does not know" not in response.text
