"""Types of the Realtime protocol: strict parsing, tolerance of foreign fields, and agreement with the SDK."""

import contextlib
import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from duologue.serving import protocol
from duologue.serving.objects import Message, Pcmu, ProtocolError, ResponseParams, SemanticVad, ServerVad, SessionConfig
from duologue.serving.protocol import CLIENT_EVENTS, ServerEvent, read_client_event
from duologue.serving.tools import check_tools

OWN = {"duologue.tokens", "duologue.timings"}
SESSION = SessionConfig(id="sess_1", model="pocket")
VAD = "session.audio.input.turn_detection"
PICTURE = {"type": "message", "role": "user", "content": [{"type": "input_image"}]}


def listening(**changes: object) -> dict[str, Any]:
    return {"audio": {"input": changes}}


def creating(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "conversation.item.create", "item": item}


def answering(**params: object) -> dict[str, Any]:
    return {"type": "response.create", "response": params}


def server_events() -> dict[str, type[ServerEvent]]:
    kinds = [kind for kind in vars(protocol).values() if isinstance(kind, type) and issubclass(kind, ServerEvent)]
    return {
        kind.model_fields["type"].default: kind for kind in kinds if isinstance(kind.model_fields["type"].default, str)
    }


def fault(event: object) -> ProtocolError:
    with pytest.raises(ProtocolError) as raised:
        read_client_event(event if isinstance(event, str | bytes) else json.dumps(event))
    return raised.value


def update_fault(changes: dict[str, Any]) -> ProtocolError:
    """The fault of an update on a server whose models call no tools."""

    def update() -> None:
        updated = SESSION.updated(changes)
        check_tools(False, updated.tools, updated.tool_choice, "session")

    with pytest.raises(ProtocolError) as raised:
        update()
    return raised.value


# Updates of a session.


def test_updates_change_only_given_fields() -> None:
    changed = SESSION.updated({"type": "realtime", "instructions": "Be brief."})
    assert changed == SESSION.model_copy(update={"instructions": "Be brief."})
    deeper = changed.updated(
        {"audio": {"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 200}}}}
    )
    assert deeper.audio.input.turn_detection == ServerVad(silence_duration_ms=200)
    deepest = deeper.updated({"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 0.9}}}})
    assert deepest.audio.input.turn_detection == ServerVad(silence_duration_ms=200, threshold=0.9)
    assert deepest.audio.output == SESSION.audio.output
    assert deepest.instructions == "Be brief."


def test_a_new_type_starts_with_its_defaults() -> None:
    changed = SESSION.updated({"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "low"}}}})
    assert changed.audio.input.turn_detection == SemanticVad(type="semantic_vad", eagerness="low")
    assert changed.updated({"audio": {"input": {"format": {"type": "audio/pcmu"}}}}).audio.input.format == Pcmu(
        type="audio/pcmu"
    )


def test_null_turns_off_or_keeps() -> None:
    on = SESSION.updated({"instructions": "x", "audio": {"input": {"transcription": {"model": "any"}}}})
    off = on.updated({"instructions": None, "audio": {"input": {"turn_detection": None, "transcription": None}}})
    assert off.audio.input.turn_detection is None
    assert off.audio.input.transcription is None
    assert off.instructions == "x"


def test_a_session_accepts_its_own_dump() -> None:
    changed = SESSION.updated({"audio": {"input": {"turn_detection": None}}})
    assert SESSION.updated(json.loads(changed.model_dump_json())) == changed


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "gpt-realtime-2.1", "tracing": "auto"},
        {"tracing": {"workflow_name": "x"}, "prompt": {"id": "pmpt_1"}, "reasoning": {"effort": "low"}},
        {"tools": [], "tool_choice": "auto"},
        {"tools": None, "tool_choice": "none", "parallel_tool_calls": False},
        {"audio": {"output": {"voice": {"id": "marin"}}, "input": {"noise_reduction": {"type": "near_field"}}}},
        {"output_modalities": ["text", "audio"]},
        {"include": ["item.input_audio_transcription.logprobs"]},
        {"id": "sess_other", "object": "realtime.session", "expires_at": 1},
    ],
)
def test_foreign_fields_are_accepted(changes: dict[str, Any]) -> None:
    changed = SESSION.updated(changes)
    assert changed.id == "sess_1"
    assert changed.output_modalities == ["audio"]


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"voice": "alloy"}, "session.voice", "unknown_parameter"),
        ({"temperature": 0.8}, "session.temperature", "unknown_parameter"),
        ({"type": "transcription"}, "session.type", "invalid_value"),
        ({"output_modalities": ["video"]}, "session.output_modalities.0", "invalid_value"),
        ({"output_modalities": []}, "session.output_modalities", "invalid_value"),
        ({"max_output_tokens": 0}, "session.max_output_tokens", "invalid_value"),
        ({"max_output_tokens": True}, "session.max_output_tokens", "invalid_value"),
        ({"truncation": {"type": "retention_ratio", "retention_ratio": 0.5}}, "session.truncation", "invalid_value"),
        ({"include": ["all"]}, "session.include.0", "invalid_value"),
        ({"audio": {"output": {"speed": 2}}}, "session.audio.output.speed", "invalid_value"),
        (listening(format={"type": "audio/pcm", "rate": 16000}), "session.audio.input.format.rate", "invalid_value"),
        (listening(format={"type": "audio/mp3"}), "session.audio.input.format.type", "invalid_value"),
        (listening(turn_detection={"type": "server_vad", "threshold": 1.5}), f"{VAD}.threshold", "invalid_value"),
        (listening(turn_detection={"type": "semantic_vad", "threshold": 0.5}), f"{VAD}.threshold", "unknown_parameter"),
        ({"audio": 5}, "session.audio", "invalid_value"),
        ({"tools": [{"type": "function", "name": "get_weather", "parameters": {}}]}, "session.tools", "invalid_value"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "session.tools", "invalid_value"),
        ({"tool_choice": "required"}, "session.tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "session.tool_choice", "invalid_value"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(changes: dict[str, Any], param: str, code: str) -> None:
    error = update_fault(changes)
    assert (error.param, error.code) == (param, code)
    assert param in error.message


def test_a_refusal_lists_the_choices() -> None:
    text = update_fault({"audio": {"input": {"turn_detection": {"type": "loud"}}}}).message
    assert "'server_vad', 'semantic_vad'" in text
    assert "'loud'" in text


# Events.


def test_every_event_of_a_client_is_read() -> None:
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello."}]}
    given: list[dict[str, Any]] = [
        {"type": "session.update", "session": {"type": "realtime"}},
        {"type": "input_audio_buffer.append", "audio": "AAAA"},
        {"type": "input_audio_buffer.commit"},
        {"type": "input_audio_buffer.clear", "event_id": "mine"},
        {"type": "conversation.item.create", "item": message, "previous_item_id": None},
        {"type": "conversation.item.retrieve", "item_id": "a"},
        {"type": "conversation.item.delete", "item_id": "a"},
        {"type": "conversation.item.truncate", "item_id": "a", "content_index": 0, "audio_end_ms": 10},
        {"type": "playback.ack", "item_id": "a", "played_ms": 10},
        {"type": "response.create"},
        {"type": "response.cancel", "response_id": "resp_1"},
    ]
    assert {event["type"] for event in given} == set(CLIENT_EVENTS)
    for event in given:
        read = read_client_event(json.dumps(event))
        assert type(read) is CLIENT_EVENTS[event["type"]]


@pytest.mark.parametrize(
    ("event", "param", "code"),
    [
        ({"type": "nope"}, "type", "unknown_event"),
        ({"no": "type"}, "type", "unknown_event"),
        ({"type": ["session.update"]}, "type", "unknown_event"),
        ({"type": "output_audio_buffer.clear"}, "type", "unsupported_event"),
        ({"type": "input_audio_buffer.append"}, "audio", "missing_required_parameter"),
        ({"type": "input_audio_buffer.append", "audio": 5}, "audio", "invalid_value"),
        ({"type": "input_audio_buffer.commit", "more": 1}, "more", "unknown_parameter"),
        (creating({"type": "mcp_call"}), "item.type", "invalid_value"),
        (creating({}), "item.type", "missing_required_parameter"),
        (creating({"type": "message", "role": "user"}), "item.content", "missing_required_parameter"),
        (creating(PICTURE), "item.content.0.type", "invalid_value"),
        ({"type": "conversation.item.truncate", "item_id": "a", "audio_end_ms": -1}, "audio_end_ms", "invalid_value"),
        ({"type": "playback.ack", "item_id": "a", "played_ms": -1}, "played_ms", "invalid_value"),
        (answering(metadata={"a": 1}), "response.metadata.a", "invalid_value"),
        (answering(conversation="other"), "response.conversation", "invalid_value"),
        (answering(input=[{"type": "item_reference"}]), "response.input.0.id", "missing_required_parameter"),
        ([], None, "invalid_json"),
        ("{", None, "invalid_json"),
        ("[" * 50_000, None, "invalid_json"),
        (b"{}", None, "invalid_message"),
        ({"type": "session.update", "session": json.loads("[" * 40 + "]" * 40)}, None, "invalid_value"),
    ],
)  # fmt: skip
def test_a_bad_event_is_refused(event: object, param: str | None, code: str) -> None:
    error = fault(event)
    assert (error.param, error.code) == (param, code)


def test_the_clients_own_id_comes_back() -> None:
    assert fault({"type": "nope", "event_id": "mine"}).event_id == "mine"
    assert fault({"type": "nope", "event_id": 7}).event_id is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
FIELDS = ["session", "audio", "item", "item_id", "response", "content_index", "audio_end_ms", "event_id", "input"]


@settings(max_examples=60)
@given(st.sampled_from(sorted(CLIENT_EVENTS)), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5))
def test_any_json_is_read_or_refused(name: str, fields: dict[str, Any]) -> None:
    with contextlib.suppress(ProtocolError):
        event = read_client_event(json.dumps({"type": name, **fields}))
        if isinstance(event, protocol.SessionUpdate):
            SESSION.updated(event.session)


# The SDK's types are the last word.


def sdk_models(union: Any) -> dict[str, type[BaseModel]]:
    """Classes of an annotated union of the SDK, by their type."""
    kinds = get_args(get_args(union)[0])
    return {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in kinds}


def test_events_of_the_server_are_the_sdks() -> None:
    types = pytest.importorskip("openai.types.realtime")
    theirs = sdk_models(types.RealtimeServerEvent)
    ours = server_events()
    assert set(ours) - set(theirs) == OWN
    for name in set(ours) - OWN:
        fields, known = ours[name].model_fields, theirs[name].model_fields
        assert set(fields) <= set(known), name
        needed = {field for field, info in known.items() if info.is_required()}
        assert needed <= set(fields), name


def test_events_of_clients_are_the_sdks() -> None:
    types = pytest.importorskip("openai.types.realtime")
    theirs = sdk_models(types.RealtimeClientEvent)
    assert set(theirs) - set(CLIENT_EVENTS) == {"output_audio_buffer.clear"}
    assert set(CLIENT_EVENTS) - set(theirs) == {"playback.ack"}
    for name, kind in CLIENT_EVENTS.items():
        if name not in theirs:
            continue
        assert set(kind.model_fields) == set(theirs[name].model_fields), name


def test_a_session_has_every_field_of_the_sdks() -> None:
    types = pytest.importorskip("openai.types.realtime")
    known = types.RealtimeSessionCreateRequest.model_fields
    assert set(known) == set(SessionConfig.model_fields) - {"id", "object", "expires_at"}
    data = json.loads(protocol.SessionCreated(session=SESSION).to_json())
    parsed = types.SessionCreatedEvent.model_validate(data)
    assert parsed.session.audio.input.turn_detection.type == "server_vad"
    asked = types.RealtimeResponseCreateParams.model_fields
    assert set(asked) == set(ResponseParams.model_fields)


def test_a_message_is_the_sdks() -> None:
    types = pytest.importorskip("openai.types.realtime")
    message = Message(type="message", id="item_1", role="assistant", status="completed", content=[])
    data = json.loads(protocol.ItemDone(item=message, previous_item_id=None).to_json())
    assert types.ConversationItemDone.model_validate(data).item.role == "assistant"
