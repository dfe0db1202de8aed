"""OpenAI's own client, unmodified, against the REST routes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import soundfile

from duologue.conversation.chatbot import load, model_folder
from tests.serving import Running, running
from tests.tiny import write_tiny_chatbot

if TYPE_CHECKING:
    import openai

KEY = "only-key-of-the-tests"
QUESTION = model_folder() / "question.wav"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    bot = load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_tokens=60))
    with running(bot, api_keys=(KEY,)) as it:
        yield it


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300) as it:
        yield it


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "duologue"


def test_speech(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "said.wav"
    with client.audio.speech.with_streaming_response.create(
        model="gpt-4o-mini-tts", voice="alloy", input="Hello, how are you?", response_format="wav"
    ) as response:
        response.stream_to_file(path)
    assert soundfile.info(path).samplerate == 24_000
    assert len(client.audio.speech.create(model="tts-1", voice="coral", input="Hello.").content) > 100


def test_transcriptions(client: openai.OpenAI) -> None:
    with QUESTION.open("rb") as file:
        plain = client.audio.transcriptions.create(model="whisper-1", file=file)
    verbose = client.audio.transcriptions.create(
        model="whisper-1", file=QUESTION, response_format="verbose_json", timestamp_granularities=["segment"]
    )
    assert verbose.text == plain.text
    assert [segment.text for segment in verbose.segments or []] == ([plain.text] if plain.text else [])
    events = list(client.audio.transcriptions.create(model="gpt-4o-transcribe", file=QUESTION, stream=True))
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == plain.text


def test_chat_in_text_and_sound(client: openai.OpenAI) -> None:
    question = base64.b64encode(QUESTION.read_bytes()).decode()
    heard: Any = {"type": "input_audio", "input_audio": {"data": question, "format": "wav"}}
    answer = client.chat.completions.create(
        model="gpt-audio",
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "wav"},
        messages=[{"role": "user", "content": [heard]}],
    )
    audio = answer.choices[0].message.audio
    assert audio is not None
    wav, rate = soundfile.read(io.BytesIO(base64.b64decode(audio.data)))
    assert (rate, wav.size > 0) == (24_000, True)
    stream = client.chat.completions.create(
        model="gpt-audio",
        stream=True,
        stream_options={"include_usage": True},
        seed=1,
        messages=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "audio": {"id": audio.id}},
            {"role": "user", "content": "And then?"},
        ],
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.audio_tokens


def test_errors_become_the_clients_own(client: openai.OpenAI, server: Running) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="has no voice 'nobody'") as refused:
        client.audio.speech.create(model="tts-1", voice="nobody", input="Hello.")
    assert refused.value.param == "voice"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
