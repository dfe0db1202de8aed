"""Failing or busy models: clients get an error in OpenAI's format, the log holds the cause, the server continues."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from duologue.conversation.chatbot import Chatbot, load, model_folder
from duologue.language.requests import EngineFull
from tests.serving import Running, running
from tests.tiny import write_tiny_chatbot

QUESTION = {"messages": [{"role": "user", "content": "Hello"}]}
SPOKEN = {**QUESTION, "modalities": ["text", "audio"]}
SAID = {"input": "Hello, how are you?", "response_format": "pcm"}


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_tokens=60))


@pytest.fixture(scope="module")
def server(bot: Chatbot) -> Iterator[Running]:
    with running(bot) as it:
        yield it


def break_engine(bot: Chatbot, monkeypatch: pytest.MonkeyPatch, error: Exception, after: int = 0) -> None:
    """Lets every reply of the engine fail after so many ids."""
    generate: Any = bot.models.engine.generate

    async def failing(*args: Any, **kwargs: Any) -> AsyncIterator[int]:
        count = 0
        async for token in generate(*args, **kwargs):
            if count == after:
                raise error
            count += 1
            yield token

    monkeypatch.setattr(bot.models.engine, "generate", failing)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", QUESTION), ("/v1/audio/speech", SAID)])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_full_engine(
    server: Running, bot: Chatbot, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], streamed: bool
) -> None:
    break_engine(bot, monkeypatch, EngineFull("the engine makes 4 replies at a time already"))
    how = {"stream": True} if "messages" in body else {"stream_format": "sse"}
    with server.client() as client:
        response = client.post(path, json={**body, **(how if streamed else {})})
    assert response.status_code == 429
    assert response.headers["Retry-After"]
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("server_busy", "rate_limit_error")
    assert error["message"] == "the engine makes 4 replies at a time already"


def test_server_errors_hide_details(
    server: Running, bot: Chatbot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken, server.client() as client:
        break_engine(bot, broken, RuntimeError("tensors of unequal sizes"))
        response = client.post("/v1/chat/completions", json=QUESTION)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "tensors" not in response.text
    assert "tensors of unequal sizes" in caplog.text
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=QUESTION).status_code == 200
    assert server.service.admission.num_active == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**QUESTION, "stream": True}),
        ("/v1/chat/completions", {**SPOKEN, "audio": {"format": "pcm16"}, "stream": True}),
        ("/v1/audio/speech", {**SAID, "input": "Hello. " * 60, "stream_format": "sse"}),
    ],
)
def test_a_late_error_is_the_last_event(
    server: Running, bot: Chatbot, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    # The first sound of a speech needs a block of 10 tokens; in a completion text comes first.
    break_engine(bot, monkeypatch, RuntimeError("tensors of unequal sizes"), 22 if "input" in body else 2)
    with server.client() as client:
        response = client.post(path, json={**body, "temperature": 0} if "messages" in body else body)
    if "input" in body and response.status_code == 500:  # the fault was quicker than the first sound
        assert response.json()["error"]["type"] == "server_error"
        assert "tensors" not in response.text
        return
    assert response.status_code == 200
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]
    assert len(events) >= 2
    assert events[-1]["error"]["code"] == "server_error"
    assert "tensors" not in response.text


def test_a_model_without_recognizer(bot: Chatbot) -> None:
    deaf = Chatbot(replace(bot.models, recognizer=None))
    with running(deaf) as server, server.client() as client:
        assert client.get("/v1/models/tiny").json()["transcribes"] is False
        file = ("q.wav", (model_folder() / "question.wav").read_bytes())
        response = client.post("/v1/audio/transcriptions", files={"file": file})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "no_recognizer"
