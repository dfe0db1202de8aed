"""Duologue: a spoken chatbot that listens, thinks and answers aloud.

bot = duologue.load("pocket")
reply = bot.chat("question.wav")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duologue.conversation.chatbot import Chatbot, Reply, Session, load

__version__ = "0.2.0"
__all__ = ["Chatbot", "Reply", "Session", "load"]


def __getattr__(name: str) -> object:
    # Imported on first use, because torch and transformers take seconds to import.
    if name in __all__:
        from duologue.conversation import chatbot

        return getattr(chatbot, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
