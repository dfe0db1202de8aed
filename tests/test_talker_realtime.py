"""Real-time sessions with a text model: tools pass through, and the reply is cut like any other."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from duologue.language.talker import TalkerEngine
from duologue.language.text_models import open_text_model
from tests.live_server import LiveServer, question, scripted_bot, serving, talking
from tests.test_talker import ScriptedTalker
from tests.text_model_server import ScriptedEndpoint, call, endpoint, words
from tests.tiny import write_tiny_chatbot

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
LEAD_IN = [*words("Let me look."), *call("weather", '{"city": ', '"Paris"}')]


@pytest.fixture
def script() -> Iterator[ScriptedEndpoint]:
    with endpoint(LEAD_IN, words("It is sunny.")) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Replies so long that none ends by its length before it is interrupted."""
    return write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_tokens=600)


@pytest.fixture
def server(folder: Path, script: ScriptedEndpoint) -> Iterator[LiveServer]:
    bot, engine = scripted_bot(folder)
    made = bot.with_text_model(open_text_model(script.url), ScriptedTalker(bot.models.vocabulary))
    assert isinstance(made.models.engine, TalkerEngine)

    async def recognize(codes: Sequence[int]) -> str:
        return "How is the weather in Paris?"

    made.models = dataclasses.replace(made.models, engine=dataclasses.replace(made.models.engine, recognize=recognize))
    with serving(made, engine) as running:
        yield running


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events if not event["type"].endswith("transcript.delta")]


def test_a_call_is_sent_behind_the_spoken_lead_in_and_its_result_is_shown(
    server: LiveServer, script: ScriptedEndpoint
) -> None:
    with talking(server) as talk:
        talk.update(tools=[WEATHER], instructions="Be brief.")
        talk.write("How is the weather in Paris?")
        talk.send("response.create")
        events = talk.until("response.done")
        seen = list(dict.fromkeys(kinds(events)))
        after_sound = seen[seen.index("response.output_audio.done") :]
        assert "response.output_audio.delta" in seen
        assert after_sound.index("response.function_call_arguments.delta") < after_sound.index(
            "response.function_call_arguments.done"
        )
        arguments = next(event for event in events if event["type"].endswith("arguments.done"))
        assert (arguments["arguments"], arguments["call_id"], arguments["output_index"]) == (
            '{"city": "Paris"}',
            "call_0",
            1,
        )
        message, made = events[-1]["response"]["output"]
        assert message["content"][0]["transcript"] == "Let me look."
        assert (made["type"], made["name"], made["status"]) == ("function_call", "weather", "completed")
        assert events[-1]["response"]["status"] == "completed"

        result = {"type": "function_call_output", "call_id": "call_0", "output": '{"sky": "sunny"}'}
        talk.send("conversation.item.create", item=result)
        talk.send("response.create")
        last = talk.until("response.done")[-1]["response"]
        assert last["output"][0]["content"][0]["transcript"] == "It is sunny."
    first, second = script.requests
    assert first["tools"][0]["function"]["name"] == "weather"
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert second["messages"][2:] == [
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": '{"sky": "sunny"}'},
    ]


def test_a_call_without_words_opens_no_message(server: LiveServer, script: ScriptedEndpoint) -> None:
    script.answers[0] = call("weather", "{}")
    with talking(server) as talk:
        talk.update(tools=[WEATHER], tool_choice="required")
        talk.write("How is the weather?")
        talk.send("response.create")
        response = talk.until("response.done")[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["function_call"]
    assert response["status"] == "completed"
    assert script.requests[0]["tool_choice"] == "required"


def test_a_spoken_question_reaches_the_text_model_and_speech_stops_its_answer(
    server: LiveServer, script: ScriptedEndpoint
) -> None:
    script.answers[:] = [[*words("One two three four five six seven. Eight."), "WAIT"], words("Yes.")]
    with talking(server) as talk:
        talk.append(question())
        talk.until("response.output_audio.delta")
        talk.append(question())
        cancelled = talk.until("response.done")[-1]["response"]
        assert (cancelled["status"], cancelled["status_details"]["reason"]) == ("cancelled", "turn_detected")
        assert script.left.wait(60)
    assert script.requests[0]["messages"][1] == {"role": "user", "content": "How is the weather in Paris?"}


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "session.tools"),
        ({"tools": [{"type": "function"}]}, "session.tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "session.tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "session.tool_choice"),
    ],
)
def test_unusable_tools_are_refused(server: LiveServer, session: dict[str, Any], param: str) -> None:
    with talking(server) as talk:
        error = talk.ask("session.update", "error", session={"type": "realtime", **session})["error"]
    assert (error["code"], error["param"]) == ("invalid_value", param)


def test_openai_agents_call_a_function(server: LiveServer, script: ScriptedEndpoint) -> None:
    agents = pytest.importorskip("agents")
    realtime = pytest.importorskip("agents.realtime")
    import asyncio

    asked: list[str] = []

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "sunny"

    async def talk() -> list[str]:
        runner = realtime.RealtimeRunner(
            realtime.RealtimeAgent(name="guide", instructions="Be brief.", tools=[weather])
        )
        config = {"api_key": "unused", "url": f"{server.url}/realtime?model=tiny"}
        texts: list[str] = []
        async with await runner.run(model_config=config) as session, asyncio.timeout(120):
            await session.send_message("How is the weather in Paris?")
            async for event in session:
                if event.type == "history_updated":
                    texts = [
                        part.transcript
                        for item in event.history
                        if getattr(item, "role", "") == "assistant"
                        for part in item.content
                        if getattr(part, "transcript", None)
                    ]
                    if "It is sunny." in texts:
                        return texts
        return texts

    assert "It is sunny." in asyncio.run(talk())
    assert asked == ["Paris"]
    assert script.requests[1]["messages"][-1] == {"role": "tool", "tool_call_id": "call_0", "content": "sunny"}
