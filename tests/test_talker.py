"""A text model's answer is read aloud while it is being written, in the form of a spoken model's reply."""

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duologue.conversation.chatbot import Chatbot, load
from duologue.conversation.events import AudioDelta, EndReason, Event, Interrupted, ReplyDone, TextDelta
from duologue.interleave import INTERLEAVED, TEXT_ONLY, Kind, split
from duologue.language.messages import chat_messages, read_turns
from duologue.language.reading import ReadingEngine, say_prompt
from duologue.language.sampling import Sampling
from duologue.language.talker import NOT_HEARD, TalkerEngine, TextToTokenTalker, WrittenText
from duologue.language.text_models import CallReader, EndpointTextModel, TextModelError, open_text_model
from duologue.language.tools import ToolCall, ToolResult, ToolUse, read_tool_text
from duologue.rates import SPEAK_SAMPLE_RATE
from duologue.released.text import RELEASED_TEMPLATE
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import Vocabulary
from tests.text_model_server import call, endpoint, words
from tests.tiny import write_tiny_chatbot

SPEECH_PER_TEXT = 3
LONG = "The capital of France is Paris. Seven plus five is twelve. Hello, how are you? What is seven plus five?"
SAMPLING = Sampling(temperature=0.0, max_tokens=600)


@dataclasses.dataclass
class ScriptedTalker:
    """Speaks three speech ids for each text id."""

    vocabulary: Vocabulary
    pieces: list[str] = dataclasses.field(default_factory=list)

    async def speak(self, text: str, sampling: Sampling, request_id: str) -> AsyncGenerator[int, None]:
        self.pieces.append(text)
        for index in range(SPEECH_PER_TEXT * len(self.vocabulary.encode_text(text))):
            yield self.vocabulary.speech_id(index % 8)


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_tokens=600))


@pytest.fixture(scope="module")
def vocabulary(bot: Chatbot) -> Vocabulary:
    return bot.models.vocabulary


def talking(bot: Chatbot, url: str, heard: str = "What is seven plus five?") -> tuple[Chatbot, TalkerEngine]:
    """The tiny chatbot with a text model, a scripted talker and a scripted recognizer."""
    made = bot.with_text_model(open_text_model(url), ScriptedTalker(bot.models.vocabulary))
    assert isinstance(made.models.engine, TalkerEngine)

    async def recognize(codes: Sequence[int]) -> str:
        return heard

    engine = dataclasses.replace(made.models.engine, recognize=recognize)
    made.models = dataclasses.replace(made.models, engine=engine)
    return made, engine


def prompt(vocabulary: Vocabulary, text: str = "Hello?") -> list[int]:
    turn = Turn(Role.USER, Modality.TEXT, tuple(vocabulary.encode_text(text)))
    return vocabulary.prompt_ids(Conversation((turn,)))


def reply(
    engine: TalkerEngine, ids: list[int], schedule: Any = INTERLEAVED, sampling: Sampling = SAMPLING
) -> list[int]:
    async def work() -> list[int]:
        return [token async for token in engine.generate(ids, sampling, schedule, "one")]

    return asyncio.run(work())


def test_a_reply_has_the_text_of_the_text_model_in_the_runs_of_a_reply(bot: Chatbot, vocabulary: Vocabulary) -> None:
    with endpoint(words(LONG)) as script:
        _, engine = talking(bot, script.url)
        ids = reply(engine, prompt(vocabulary))
    parts = split(ids, vocabulary.kind)  # raises where a kind stands in a wrong place
    assert parts.state.ended
    assert vocabulary.decode_text(parts.text) == LONG
    spoken = engine.talker.pieces  # type: ignore[attr-defined]
    assert len(parts.speech) == SPEECH_PER_TEXT * sum(len(vocabulary.encode_text(piece)) for piece in spoken)
    request = script.requests[0]
    assert (request["model"], request["stream"]) == ("scripted", True)
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert request["messages"][1]["content"] == "Hello?"
    assert "tools" not in request


def test_speech_begins_while_the_text_is_being_written(bot: Chatbot, vocabulary: Vocabulary) -> None:
    text = "one two three four five six seven eight nine ten eleven twelve one two three"
    first = text.rsplit(" ", 3)[0]
    assert len(vocabulary.encode_text(first)) >= INTERLEAVED.text_run
    with endpoint([*words(first), {"content": " one"}, "WAIT", {"content": " two three"}]) as script:
        _, engine = talking(bot, script.url)

        async def work() -> list[Kind]:
            kinds: list[Kind] = []
            async for token in engine.generate(prompt(vocabulary), SAMPLING):
                kinds.append(vocabulary.kind(token))
                if kinds[-1] is Kind.SPEECH and kinds.count(Kind.SPEECH) == INTERLEAVED.speech_run:
                    assert not script.go_on.is_set()
                    script.go_on.set()
            return kinds

        kinds = asyncio.run(asyncio.wait_for(work(), 60))
    assert kinds.index(Kind.SPEECH) == INTERLEAVED.text_run


def test_a_session_hears_the_first_sound_before_the_answer_is_written(bot: Chatbot) -> None:
    with endpoint([*words(LONG), "WAIT", {"content": " Yes."}]) as script:
        made, _ = talking(bot, script.url)
        session = made.session()
        session.feed(np.full(16000, 0.01, np.float32))
        seen: list[Event] = []
        for event in session.events():
            seen.append(event)
            if isinstance(event, AudioDelta):
                script.go_on.set()
        done = seen[-1]
    assert isinstance(done, ReplyDone)
    assert done.text == f"{LONG} Yes."
    assert done.reason is EndReason.END
    assert script.requests[0]["messages"][-1] == {"role": "user", "content": "What is seven plus five?"}


def test_the_text_model_is_shown_what_the_user_heard(bot: Chatbot) -> None:
    with endpoint(words(LONG)) as script:
        made, _ = talking(bot, script.url)
        session = made.session()
        session.write("Hello?")

        async def cut() -> list[Event]:
            events: list[Event] = []
            async for event in session.reply():
                events.append(event)
                if isinstance(event, AudioDelta) and event.first_sample > 3 * SPEAK_SAMPLE_RATE:
                    session.interrupt(played_ms=2500)
            return events

        events = asyncio.run(cut())
        cut_text = next(event.text for event in events if isinstance(event, Interrupted))
        session.write("And then?")
        session.reply_now()
        session.write("Go on.")
        session.reply_now()
    assert 0 < len(cut_text) < len(LONG)
    shown = script.requests[1]["messages"]
    assert [message["role"] for message in shown] == ["system", "user", "assistant", "user"]
    assert LONG.startswith(shown[2]["content"])
    assert abs(len(shown[2]["content"]) - len(cut_text)) < 12
    assert script.requests[2]["messages"][4] == {"role": "assistant", "content": LONG}


def test_the_reply_of_another_session_that_begins_alike_is_not_taken(bot: Chatbot, vocabulary: Vocabulary) -> None:
    short = LONG[: LONG.index(" Hello")]
    with endpoint(words(LONG)) as script, endpoint(words(short)) as other:
        _, engine = talking(bot, script.url)
        mine = reply(engine, prompt(vocabulary, "Count."))
        heard = Turn(Role.ASSISTANT, Modality.INTERLEAVED, tuple(mine[: INTERLEAVED.text_run + 20]), interrupted=True)
        turns = [Turn(Role.USER, Modality.TEXT, tuple(vocabulary.encode_text(text))) for text in ("Count.", "Go on.")]
        asked = read_turns(vocabulary.prompt_ids(Conversation((turns[0], heard, turns[1]))), vocabulary)
        shown, _ = asyncio.run(engine.messages(asked))
        theirs = reply(dataclasses.replace(engine, text_model=open_text_model(other.url)), prompt(vocabulary, "Hello?"))
        assert theirs[: len(heard.ids)] == list(heard.ids)
        assert len(theirs) < len(mine)
        assert asyncio.run(engine.messages(asked))[0] == shown
    assert LONG.startswith(str(shown[2]["content"]))


def test_a_cancelled_reply_ends_the_request(bot: Chatbot, vocabulary: Vocabulary) -> None:
    with endpoint([*words(LONG), "WAIT"]) as script:
        _, engine = talking(bot, script.url)

        async def work() -> int:
            count = 0
            async for _ in engine.generate(prompt(vocabulary), SAMPLING, INTERLEAVED, "one"):
                count += 1
                if count == 20:
                    engine.cancel("one")
            return count

        assert asyncio.run(work()) == 20
        assert engine.running == 0
        assert script.left.wait(30)


def test_a_written_reply(bot: Chatbot, vocabulary: Vocabulary) -> None:
    with endpoint(words(LONG)) as script:
        _, engine = talking(bot, script.url)
        ids = reply(engine, prompt(vocabulary), TEXT_ONLY)
    assert vocabulary.decode_text(ids[:-1]) == LONG
    assert ids[-1] == vocabulary.end_id
    assert not engine.talker.pieces  # type: ignore[attr-defined]


@pytest.mark.parametrize("max_tokens", [10, 33, 39, 60, 100])
def test_a_reply_keeps_to_its_limit(bot: Chatbot, vocabulary: Vocabulary, max_tokens: int) -> None:
    with endpoint(words(LONG)) as script:
        _, engine = talking(bot, script.url)
        ids = reply(engine, prompt(vocabulary), sampling=Sampling(max_tokens=max_tokens))
    parts = split(ids, vocabulary.kind)
    assert len(ids) <= max_tokens
    assert parts.speech
    assert not parts.state.ended
    assert LONG.startswith(vocabulary.decode_text(parts.text))


def test_nothing_heard_asks_no_text_model(bot: Chatbot) -> None:
    with endpoint(words("Never.")) as script:
        made, _ = talking(bot, script.url, heard="")
        session = made.session()
        session.feed(np.full(16000, 0.01, np.float32))
        assert session.reply_now().text == NOT_HEARD
    assert not script.requests


def test_a_text_model_that_fails(bot: Chatbot, vocabulary: Vocabulary) -> None:
    with endpoint([]) as script:
        _, engine = talking(bot, script.url)
        with pytest.raises(TextModelError, match="scripted wrote nothing"):
            reply(engine, prompt(vocabulary))
        script.status = 500
        with pytest.raises(TextModelError, match="status 500"):
            reply(engine, prompt(vocabulary))
    with pytest.raises(TextModelError, match="did not answer"):
        reply(engine, prompt(vocabulary))
    with endpoint([7]) as script:
        _, engine = talking(bot, script.url)
        with pytest.raises(TextModelError, match="something else"):
            reply(engine, prompt(vocabulary))


def test_line_separators_of_unicode_are_part_of_the_text() -> None:
    text = "one\u2028two\x85three 字"
    with endpoint([{"content": text}]) as script:

        async def read() -> list[object]:
            return [part async for part in EndpointTextModel(script.url).stream([{"role": "user", "content": "Hi"}])]

        assert asyncio.run(read()) == [text]


def test_numbers_and_marks_are_spoken_as_words(bot: Chatbot, vocabulary: Vocabulary) -> None:
    with endpoint(words("It is **12** degrees.")) as script:
        _, engine = talking(bot, script.url)
        ids = reply(engine, prompt(vocabulary))
    assert engine.talker.pieces == ["It is twelve degrees."]  # type: ignore[attr-defined]
    assert vocabulary.decode_text(split(ids, vocabulary.kind).text) == "It is **12** degrees."


def test_pieces_end_with_sentences_then_clauses_then_words(vocabulary: Vocabulary) -> None:
    async def pieces(text: str, limit: int = 60) -> list[str]:
        written, found = WrittenText(vocabulary, limit=limit), []
        written.add(text)
        written.end()
        while piece := await written.take():
            found.append(piece)
        return found

    assert asyncio.run(pieces("Yes. Hello")) == ["Yes. Hello"]
    long = asyncio.run(pieces(LONG * 2, 40))
    assert "".join(long) == LONG * 2
    assert all(len(vocabulary.encode_text(piece.strip())) <= 40 for piece in long)
    assert long[0].rstrip().endswith((".", "?"))
    whole = "x" * 200
    assert "".join(asyncio.run(pieces(whole, 40))) == whole


def test_a_first_sentence_is_spoken_before_the_second_is_written(vocabulary: Vocabulary) -> None:
    async def work() -> str:
        written = WrittenText(vocabulary)
        taking = asyncio.create_task(written.take())
        for piece in ("Yes", ".", " It"):
            await asyncio.sleep(0)
            assert not taking.done()
            written.add(piece)
        return await taking

    assert asyncio.run(work()) == "Yes. "


def test_the_language_model_reads_aloud_and_so_does_a_text_to_token_model(bot: Chatbot, vocabulary: Vocabulary) -> None:
    with endpoint(words("Hello, how are you?")) as script:
        for talker in (None, TextToTokenTalker(bot.models.engine, vocabulary)):
            made = bot.with_text_model(open_text_model(script.url), talker)
            said = made.chat(text="Hello?")
            assert said.text == "Hello, how are you?"
            assert said.audio.size
    with pytest.raises(ValueError, match="a text model already"):
        made.with_text_model(open_text_model(script.url))


def test_a_given_text_is_read_without_the_text_model(bot: Chatbot, vocabulary: Vocabulary) -> None:
    with endpoint(words("Never.")) as script:
        _, engine = talking(bot, script.url)
        reading = ReadingEngine(engine, vocabulary, tuple(vocabulary.encode_text(LONG)))

        async def work() -> list[int]:
            return [token async for token in reading.generate(say_prompt(LONG, vocabulary), SAMPLING)]

        parts = split(asyncio.run(work()), vocabulary.kind)
    assert vocabulary.decode_text(parts.text) == LONG
    assert not script.requests


# Tools.


def test_a_text_models_calls(bot: Chatbot, vocabulary: Vocabulary) -> None:
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
    answer = [*words("One moment."), *call("weather", '{"city":', '"Paris"}'), *call("time", "{}", index=1)]
    with endpoint(answer, call("weather", "{}")) as script:
        _, engine = talking(bot, script.url)
        tools = ToolUse((tool,), {"type": "function", "name": "weather"})
        ids = reply(engine.with_tools(tools), prompt(vocabulary))
        alone = ToolUse((tool,))
        assert reply(engine.with_tools(alone), prompt(vocabulary)) == []
    assert vocabulary.decode_text(split(ids, vocabulary.kind).text) == "One moment."
    assert tools.calls == [ToolCall("call_0", "weather", '{"city":"Paris"}'), ToolCall("call_1", "time", "{}")]
    assert [each.name for each in alone.calls] == ["weather"]
    request = script.requests[0]
    assert request["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    assert request["tool_choice"] == {"type": "function", "function": {"name": "weather"}}


def test_calls_within_a_text_are_found_however_it_is_cut() -> None:
    text = (
        'One moment. <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call> <b> <tool_call>broken</tool_call>!'
    )
    for size in (1, 3, 7, 100):
        reader = CallReader()
        said = "".join(reader.push(text[at : at + size]) for at in range(0, len(text), size)) + reader.flush()
        assert said == "One moment.  <b> !"
        assert [(each.name, each.arguments) for each in reader.calls] == [("f", '{"x": 1}')]


def test_calls_and_results_are_shown_as_messages(vocabulary: Vocabulary) -> None:
    made, result = ToolCall("call_1", "f", '{"x": "ü"}'), ToolResult("call_1", "12 °C")
    assert (read_tool_text(made.to_text()), read_tool_text(result.to_text())) == (made, result)
    assert read_tool_text("{}") is None

    def turn(role: Role, text: str) -> Turn:
        return Turn(role, Modality.TEXT, tuple(vocabulary.encode_text(text)))

    turns = (turn(Role.USER, "Hi"), turn(Role.ASSISTANT, made.to_text()), turn(Role.OBSERVATION, result.to_text()))
    for owner in (vocabulary, Vocabulary(vocabulary.tokenizer, released(vocabulary))):
        shown = read_turns(owner.prompt_ids(Conversation(turns)), owner)
        assert [(each.role, each.ids) for each in shown] == [(each.role, each.ids) for each in turns]

    async def nothing(codes: tuple[int, ...]) -> str:
        return ""

    messages = asyncio.run(chat_messages(turns, vocabulary, nothing, lambda before, ids: ""))
    function = {"name": "f", "arguments": '{"x": "ü"}'}
    assert messages == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "12 °C"},
    ]


def released(vocabulary: Vocabulary) -> Any:
    return dataclasses.replace(vocabulary.config, template=RELEASED_TEMPLATE)


# Real models.


def test_a_place_that_holds_no_text_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither the URL"):
        open_text_model(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="cannot be loaded as a text model"):
        open_text_model(str(tmp_path))
    assert isinstance(open_text_model("http://127.0.0.1:1"), EndpointTextModel)


@pytest.mark.skipif("DUOLOGUE_SMOLLM2" not in os.environ, reason="DUOLOGUE_SMOLLM2 names its GGUF file")
def test_smollm2_answers_in_this_process() -> None:
    model = open_text_model(os.environ["DUOLOGUE_SMOLLM2"])

    async def ask() -> tuple[str, int]:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        pieces = [str(piece) async for piece in model.stream(messages)]
        return "".join(pieces), len(pieces)

    start = time.monotonic()
    text, num_pieces = asyncio.run(ask())
    assert text == "The capital of France is Paris."
    assert num_pieces > 3
    assert time.monotonic() - start < 120


def test_text_deltas_carry_the_ids(bot: Chatbot, vocabulary: Vocabulary) -> None:
    with endpoint(words("Hello, how are you?")) as script:
        made, _ = talking(bot, script.url)
        session = made.session()
        session.write("Hello?")
        deltas = [event for event in session.events() if isinstance(event, TextDelta)]
    ids = [token for delta in deltas for token in delta.ids]
    assert vocabulary.decode_text(ids) == "Hello, how are you?"
