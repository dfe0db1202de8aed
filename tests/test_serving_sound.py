"""Audio routes: speech, transcriptions, completions. The weights are random, so only formats are checked."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from duologue.conversation.chatbot import Chatbot, load, model_folder
from duologue.serving.encoders import FILE_FORMATS, SAMPLE_RATE, FileEncoder, FileFormat, encode
from duologue.serving.transcriptions import TranscribedUtterance, subtitles
from duologue.sound_files import load_audio
from tests.serving import Running, running
from tests.tiny import write_tiny_chatbot

QUESTION = model_folder() / "question.wav"
SAID = "Hello, how are you?"


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_tokens=60))


@pytest.fixture(scope="module")
def server(bot: Chatbot) -> Iterator[Running]:
    with running(bot, max_request_audio_s=20.0, audio_buffer_s=20.0, max_input_chars=300) as it:
        yield it


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as it:
        yield it


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Server-sent events, without the closing [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def fault(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def wav_bytes(wav: np.ndarray[Any, Any], sample_rate: int, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wav, sample_rate, format=kind)
    return file.getvalue()


def question_bytes() -> bytes:
    return QUESTION.read_bytes()


# Sound files.


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_streamed_files_equal_finished_files(file_format: FileFormat) -> None:
    seconds, rate = 2.0, 22_050
    wav = (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)
    encoder = FileEncoder(file_format)
    pieces = [encoder.step(wav[at : at + 5000]) for at in range(0, len(wav), 5000)]
    grown = b"".join([*pieces, encoder.step(np.zeros(0, np.float32), last=True)])
    assert sum(map(bool, pieces)) >= 2, "nothing came before the end"
    whole = encode(wav, file_format)
    if file_format == "pcm":
        assert grown == whole
        assert len(whole) == 2 * encoder.num_samples == 2 * SAMPLE_RATE * seconds
        return
    heard, rate = load_audio(whole)
    assert rate == SAMPLE_RATE
    assert len(heard) / rate == pytest.approx(seconds, abs=0.1)
    assert np.abs(heard).max() == pytest.approx(0.3, abs=0.03)
    if file_format == "flac":  # libsndfile does not read FLAC of unknown length; the frames are the same
        assert (grown[:18], grown[42:]) == (whole[:18], whole[42:]) or grown[42:] == whole[42:]
        return
    again, _ = load_audio(grown)
    assert len(again) / rate == pytest.approx(seconds, abs=0.1)


# /v1/audio/speech


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_speech_in_every_format(client: httpx.Client, file_format: FileFormat) -> None:
    asked = {"model": "tts-1", "voice": "alloy", "input": SAID, "response_format": file_format}
    response = client.post("/v1/audio/speech", json=asked)
    assert response.status_code == 200
    beginnings = {"wav": b"RIFF", "flac": b"fLaC", "opus": b"OggS", "mp3": b"\xff", "aac": b"\xff\xf1"}
    assert response.content.startswith(beginnings.get(file_format, b""))
    if file_format == "wav":
        heard, rate = soundfile.read(io.BytesIO(response.content))
        assert rate == SAMPLE_RATE
        assert len(heard) > 0.05 * rate
    if file_format == "pcm":
        assert len(response.content) % 2 == 0
        assert response.headers["content-type"] == "audio/pcm"


def test_speed_changes_the_length(client: httpx.Client) -> None:
    def seconds(speed: float) -> float:
        asked = {"input": SAID, "response_format": "pcm", "speed": speed}
        return len(client.post("/v1/audio/speech", json=asked).content) / 2 / SAMPLE_RATE

    plain = seconds(1.0)
    assert seconds(2.0) == pytest.approx(plain / 2, abs=0.05)
    assert seconds(0.5) == pytest.approx(plain * 2, abs=0.05)


@pytest.mark.parametrize(
    "text",
    ["x" * 99, "\u4f60\u597d\u4e16\u754c" * 10, "Half an emoji \ud83d is cut.", "Said \U0001f600 **loud** at 10:45."],
    ids=["one word", "no blanks", "half a surrogate", "marks"],
)
def test_no_text_is_refused(client: httpx.Client, text: str) -> None:
    body = json.dumps({"input": text, "response_format": "pcm"})
    response = client.post("/v1/audio/speech", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert len(response.content) > 0.2 * 2 * SAMPLE_RATE


def test_half_an_emoji_in_a_chat(client: httpx.Client) -> None:
    asked = {"messages": [{"role": "user", "content": "Half an emoji \ud83d is cut."}], "user": "\udc00"}
    response = client.post(
        "/v1/chat/completions", content=json.dumps(asked), headers={"content-type": "application/json"}
    )
    assert response.status_code == 200, response.text


def test_speech_as_events(client: httpx.Client) -> None:
    asked = {"input": SAID, "response_format": "pcm", "stream_format": "sse"}
    events = events_of(client.post("/v1/audio/speech", json=asked))
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    sound = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    plain = client.post("/v1/audio/speech", json={"input": SAID, "response_format": "pcm"}).content
    assert sound == plain
    done = events[-1]
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"] > 0


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": ""}, "invalid_value", "input"),
        ({"input": "  "}, "invalid_value", "input"),
        ({"input": "x" * 301}, "input_too_long", "input"),
        ({"input": "\U0001f600 \x07"}, "invalid_value", "input"),
        ({"input": SAID, "voice": "nobody"}, "invalid_value", "voice"),
        ({"input": SAID, "response_format": "amr"}, "invalid_value", "response_format"),
        ({"input": SAID, "speed": 9}, "invalid_value", "speed"),
        ({"input": SAID, "speed": "fast"}, "invalid_value", "speed"),
        ({"input": 7}, "invalid_value", "input"),
        ({"input": SAID, "loudness": 3}, "unknown_parameter", "loudness"),
    ],
)
def test_invalid_speech_requests(client: httpx.Client, asked: dict[str, Any], code: str, param: str) -> None:
    assert fault(client.post("/v1/audio/speech", json=asked)) == (400, code, param)


# /v1/audio/transcriptions


def transcribe(client: httpx.Client, data: bytes | None = None, **fields: Any) -> httpx.Response:
    file = ("question.wav", question_bytes() if data is None else data)
    return client.post("/v1/audio/transcriptions", files={"file": file}, data={"model": "whisper-1", **fields})


def test_transcripts_in_every_format(client: httpx.Client) -> None:
    plain = transcribe(client)
    assert plain.status_code == 200
    text = plain.json()["text"]
    wav, rate = load_audio(QUESTION)
    assert plain.json()["usage"] == {"type": "duration", "seconds": pytest.approx(len(wav) / rate, abs=0.01)}
    assert transcribe(client, response_format="text").text == f"{text}\n"
    verbose = transcribe(client, response_format="verbose_json", language="en").json()
    assert verbose["text"] == text
    assert verbose["duration"] == pytest.approx(len(wav) / rate, abs=0.01)
    assert " ".join(segment["text"] for segment in verbose["segments"]) == text
    assert transcribe(client, response_format="vtt").text.startswith("WEBVTT\n")
    assert transcribe(client, response_format="srt").status_code == 200
    events = events_of(transcribe(client, stream="true"))
    assert "".join(event.get("delta", "") for event in events) == text
    assert events[-1]["type"] == "transcript.text.done"
    assert events[-1]["text"] == text


def test_speech_in_a_long_file_is_found(client: httpx.Client) -> None:
    wav, rate = load_audio(QUESTION)
    pause = np.zeros(int(1.5 * rate), np.float32)
    data = wav_bytes(np.concatenate([pause, wav, pause, wav, pause]), rate, "FLAC")
    segments = transcribe(client, data, response_format="verbose_json").json()["segments"]
    first = len(pause) / rate
    second = first + (len(wav) + len(pause)) / rate
    assert [segment["start"] for segment in segments] == [
        pytest.approx(first, abs=0.5),
        pytest.approx(second, abs=0.5),
    ]


def test_silence_gives_an_empty_transcript(client: httpx.Client) -> None:
    assert transcribe(client, wav_bytes(np.zeros(16_000), 16_000)).json()["text"] == ""


def test_subtitles_of_two_utterances() -> None:
    spoken = [TranscribedUtterance(0.5, 2.25, "hello"), TranscribedUtterance(3661.0, 3662.5, "there")]
    assert subtitles(spoken, "srt").split("\n") == [
        "1", "00:00:00,500 --> 00:00:02,250", "hello", "",
        "2", "01:01:01,000 --> 01:01:02,500", "there", "",
    ]  # fmt: skip
    assert subtitles(spoken, "vtt").startswith("WEBVTT\n\n00:00:00.500 --> 00:00:02.250\nhello\n\n01:01:01.000")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": "diarized_json"}, "invalid_value", "response_format"),
        ({"language": "xx"}, "invalid_value", "language"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"include": "logprobs"}, "unsupported_parameter", "include"),
        ({"timestamp_granularities[]": "word"}, "invalid_value", "timestamp_granularities[]"),
        ({"mood": "good"}, "unknown_parameter", "mood"),
        ({"stream": "true", "response_format": "srt"}, "invalid_value", "response_format"),
    ],
)
def test_invalid_transcription_requests(client: httpx.Client, fields: dict[str, Any], code: str, param: str) -> None:
    assert fault(transcribe(client, **fields)) == (400, code, param)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"not sound at all", question_bytes()[:40], b"OggS" + bytes(100)])
def test_files_without_audio_are_refused(client: httpx.Client, data: bytes) -> None:
    assert fault(transcribe(client, data)) == (400, "invalid_audio", "file")


def test_long_files_are_refused(client: httpx.Client) -> None:
    long = wav_bytes(np.zeros(21 * 16_000, np.int16), 16_000, "FLAC")
    assert len(long) < 100_000
    assert fault(transcribe(client, long)) == (400, "audio_too_long", "file")


# /v1/chat/completions


def ask(client: httpx.Client, content: Any = "Hello", **more: Any) -> httpx.Response:
    return client.post(
        "/v1/chat/completions", json={"model": "gpt-audio", "messages": [{"role": "user", "content": content}], **more}
    )


def input_audio(data: bytes | None = None) -> dict[str, Any]:
    encoded = base64.b64encode(question_bytes() if data is None else data).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}


SPOKEN = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}


def test_a_text_answer(client: httpx.Client) -> None:
    answer = ask(client, max_completion_tokens=20).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["audio"] is None
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert 0 < usage["completion_tokens"] <= 20
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_spoken_answer_to_a_spoken_question_and_the_next_turn(client: httpx.Client) -> None:
    first = ask(client, [input_audio(), {"type": "text", "text": "please"}], **SPOKEN, seed=3)
    assert first.status_code == 200, first.text
    message = first.json()["choices"][0]["message"]
    assert message["content"] is None
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(message["audio"]["data"])))
    assert rate == SAMPLE_RATE
    assert len(heard) > 0.05 * rate
    assert first.json()["usage"]["prompt_tokens_details"]["audio_tokens"] > 10
    assert first.json()["usage"]["completion_tokens_details"]["audio_tokens"] > 0
    before = [{"role": "user", "content": "Hello"}, message, {"role": "user", "content": "And then?"}]
    second = client.post("/v1/chat/completions", json={"messages": before})
    assert second.status_code == 200, second.text
    spoken = first.json()["usage"]["completion_tokens_details"]["audio_tokens"]
    assert second.json()["usage"]["prompt_tokens_details"]["audio_tokens"] == spoken


def test_the_same_seed_gives_the_same_answer(client: httpx.Client) -> None:
    texts = [ask(client, seed=seed, temperature=1.0).json()["choices"][0]["message"]["content"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_as_events(client: httpx.Client) -> None:
    asked = {"seed": 1, "temperature": 1.0, "stream": True, "stream_options": {"include_usage": True}}
    written = events_of(ask(client, **asked))
    whole = ask(client, seed=1, temperature=1.0).json()
    assert written[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [event["choices"][0]["delta"] for event in written if event["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert written[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert written[-1]["choices"] == []
    assert written[-1]["usage"] == whole["usage"]


def test_a_spoken_answer_as_events(client: httpx.Client) -> None:
    asked = {"modalities": ["audio", "text"], "audio": {"format": "pcm16"}, "seed": 2, "stream": True}
    response = ask(client, **asked)
    assert response.text.endswith("data: [DONE]\n\n")
    deltas = [event["choices"][0]["delta"].get("audio", {}) for event in events_of(response)]
    assert deltas[0]["id"].startswith("audio_")
    sound = b"".join(base64.b64decode(delta["data"]) for delta in deltas if "data" in delta)
    whole = ask(client, **{**asked, "stream": False}).json()["choices"][0]["message"]["audio"]
    # Two answers: the load of the machine decides how many tokens a block takes, and rounding depends on that.
    streamed, at_once = (np.frombuffer(data, "<i2").astype(int) for data in (sound, base64.b64decode(whole["data"])))
    np.testing.assert_allclose(streamed, at_once, rtol=0, atol=1e-4 * 32768)
    assert "".join(delta.get("transcript", "") for delta in deltas) == whole["transcript"]
    assert any("expires_at" in delta for delta in deltas)


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "invalid_value", "messages"),
        ({"n": 2}, "invalid_value", "n"),
        ({"tools": [{"type": "function", "function": {"name": "get_weather"}}]}, "invalid_value", "tools"),
        ({"functions": [{"name": "get_weather"}]}, "invalid_value", "functions"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "invalid_value", "tool_choice"),
        ({"stop": ["."]}, "invalid_value", "stop"),
        ({"frequency_penalty": 0.5}, "invalid_value", "frequency_penalty"),
        ({"logit_bias": {"1": 5}}, "invalid_value", "logit_bias"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
        ({"audio": {"format": "amr"}}, "invalid_value", "audio.format"),
        ({"modalities": ["video"]}, "invalid_value", "modalities.0"),
        ({**SPOKEN, "audio": {"voice": "nobody"}}, "invalid_value", "audio.voice"),
    ],
)
def test_invalid_completion_requests(client: httpx.Client, asked: dict[str, Any], code: str, param: str) -> None:
    assert fault(ask(client, **asked)) == (400, code, param)


@pytest.mark.parametrize("data", ["%%%", "", base64.b64encode(b"no sound").decode()])
def test_invalid_audio_is_named_by_its_path(client: httpx.Client, data: str) -> None:
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    place = "messages.0.content.1.input_audio.data"
    assert fault(ask(client, [{"type": "text", "text": "What?"}, part])) == (400, "invalid_audio", place)


def test_unknown_audio_ids_are_refused(client: httpx.Client) -> None:
    messages = [{"role": "assistant", "audio": {"id": "audio_0"}}, {"role": "user", "content": "Go on"}]
    assert fault(ask(client, messages=messages)) == (400, "audio_not_found", "messages.0.audio.id")


def test_a_too_long_question_is_refused(client: httpx.Client) -> None:
    texts = [{"type": "text", "text": "seven plus five " * 18}] * 30
    assert fault(ask(client, texts)) == (400, "context_length_exceeded", "messages")
