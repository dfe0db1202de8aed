"""Function tools of a text model: their definitions, the model's calls, and both as text in a turn of a conversation.

A call is a written turn of the assistant, a result is a turn of the role `observation`. Both begin with a control
character that text models do not write.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

_MARK = "\x1d"  # group separator


@dataclass(frozen=True)
class ToolCall:
    """A call of a function; `arguments` is JSON as the model wrote it."""

    call_id: str
    name: str
    arguments: str

    def to_text(self) -> str:
        """Returns the text of its turn."""
        return _MARK + json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class ToolResult:
    """The output of a call."""

    call_id: str
    output: str

    def to_text(self) -> str:
        """Returns the text of its turn."""
        return _MARK + json.dumps(asdict(self), ensure_ascii=False)


@dataclass(eq=False)
class ToolUse:
    """The tools of one reply, and the calls that the model made in it.

    Attributes:
        definitions: functions in the form of the Realtime protocol: type, name, description, parameters.
        choice: "auto", "none", "required" or the function to call.
        calls: filled while the reply is produced.
    """

    definitions: tuple[dict[str, Any], ...]
    choice: str | dict[str, Any] = "auto"
    parallel: bool = True
    calls: list[ToolCall] = field(default_factory=list)

    def request(self) -> dict[str, Any]:
        """Returns the fields of a chat completion request."""
        if not self.definitions:
            return {}
        names = ("name", "description", "parameters", "strict")
        tools = [
            {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}
            for tool in self.definitions
        ]
        choice = self.choice
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice.get("name", "")}}
        return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": self.parallel}


def read_tool_text(text: str) -> ToolCall | ToolResult | None:
    """Returns the call or result that the text of a turn holds; None for other text."""
    if not text.startswith(_MARK):
        return None
    try:
        values = json.loads(text[len(_MARK) :])
        return ToolCall(**values) if "name" in values else ToolResult(**values)
    except (ValueError, TypeError):
        return None
