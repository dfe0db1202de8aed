"""Chat messages from the ids of a prompt: what a text model is shown of a spoken conversation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from duologue.interleave import Kind
from duologue.language.text_models import ChatMessage
from duologue.language.tools import ToolCall, ToolResult, read_tool_text
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import ROLE_TOKENS, Vocabulary


def read_turns(prompt_ids: Sequence[int], vocabulary: Vocabulary) -> list[Turn]:
    """Returns the turns of a prompt of `Vocabulary.prompt_ids`, without the template's own instruction and the opening
    of the reply."""
    roles = {vocabulary.control_id(name): role for role, name in ROLE_TOKENS.items()}
    found: list[tuple[Role, list[int]]] = []
    for token in prompt_ids:
        if token in roles:
            found.append((roles[token], []))
        elif found and vocabulary.kind(token) in (Kind.TEXT, Kind.SPEECH):
            found[-1][1].append(token)
    if found and found[-1][0] is Role.ASSISTANT:
        found.pop()
    template = vocabulary.template
    own = [vocabulary.encode_text(text) for text in (template.text_instruction, template.speech_instruction) if text]
    turns = []
    for role, ids in found:
        opening = vocabulary.encode_text(template.reply_marker if role is Role.ASSISTANT else template.role_break)
        if opening and ids[: len(opening)] == opening:
            ids = ids[len(opening) :]
        if role is not Role.SYSTEM or ids not in own:
            is_text = all(vocabulary.kind(token) is Kind.TEXT for token in ids)
            turns.append(Turn(role, Modality.TEXT if is_text else Modality.INTERLEAVED, tuple(ids)))
    return turns


async def chat_messages(
    turns: Sequence[Turn],
    vocabulary: Vocabulary,
    recognize: Callable[[tuple[int, ...]], Awaitable[str]],
    heard: Callable[[Sequence[Turn], tuple[int, ...]], str],
) -> list[ChatMessage]:
    """Returns turns as messages of the chat completions API; turns without words are left out.

    Args:
        recognize: returns the text of the speech codes of a user's turn.
        heard: returns what the user heard of a reply, from the turns before it and its ids.
    """
    messages: list[ChatMessage] = []
    for index, turn in enumerate(turns):
        kinds = [vocabulary.kind(token) for token in turn.ids]
        text_ids = [token for token, kind in zip(turn.ids, kinds, strict=True) if kind is Kind.TEXT]
        text = vocabulary.decode_text(text_ids)
        if (tool := read_tool_text(text)) is not None:
            _add_tool(messages, tool)
            continue
        if turn.role is Role.ASSISTANT:
            text = heard(turns[:index], turn.ids)
        elif Kind.SPEECH in kinds:
            speech = [token for token, kind in zip(turn.ids, kinds, strict=True) if kind is Kind.SPEECH]
            text = f"{await recognize(tuple(vocabulary.speech_codes(speech)))} {text}"
        if text := text.strip():
            role = "user" if turn.role is Role.OBSERVATION else str(turn.role)
            if role == "user" and messages and messages[-1]["role"] == "user":  # the reply between was not heard
                text = f"{messages.pop()['content']}\n{text}"
            messages.append({"role": role, "content": text})
    return messages


def _add_tool(messages: list[ChatMessage], tool: ToolCall | ToolResult) -> None:
    """Adds a call to the assistant's message before it, and a result as a message of its own."""
    if isinstance(tool, ToolResult):
        messages.append({"role": "tool", "tool_call_id": tool.call_id, "content": tool.output})
        return
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": tool.name, "arguments": tool.arguments}
    calls = messages[-1].setdefault("tool_calls", [])
    calls.append({"id": tool.call_id, "type": "function", "function": function})
