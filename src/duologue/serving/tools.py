"""Function tools of a real-time session: which ones are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duologue.serving.objects import ProtocolError, no_tool_choice, no_tools


def check_tools(
    calls_tools: bool, tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any], where: str
) -> None:
    """Checks the tools of a session or a response.

    Args:
        calls_tools: see `Models.calls_tools`.
        where: path of the object that holds them.

    Raises:
        ProtocolError: the models call no tools, or a tool is no function with a name, or the choice is none of them.
    """
    param = f"{where}.tools"
    try:
        if not calls_tools:
            no_tools([dict(tool) for tool in tools])
            param = f"{where}.tool_choice"
            no_tool_choice(choice if isinstance(choice, str) else dict(choice))
            return
        names = [tool.get("name") for tool in tools]
        if any(tool.get("type") != "function" for tool in tools) or not all(isinstance(name, str) for name in names):
            raise ValueError("each tool must be a function with a name")
        param = f"{where}.tool_choice"
        named = None if isinstance(choice, str) else choice.get("name")
        if choice not in ("auto", "none", "required") and named not in names:
            raise ValueError("tool_choice must be 'auto', 'none', 'required' or one of the functions")
    except ValueError as error:
        raise ProtocolError(f"{param}: {error}", param=param) from None
