"""Duologue: a spoken chatbot that listens, thinks and answers aloud.

bot = duologue.load("pocket")
reply = bot.chat("question.wav")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duologue.conversation.chatbot import Chatbot, Reply, Session, load
    from duologue.conversation.events import (
        AudioDelta,
        EndReason,
        Event,
        Interrupted,
        ReplyDone,
        SpeechDelta,
        TextDelta,
        Timings,
    )
    from duologue.language.sampling import Sampling

__version__ = "0.2.0"
__all__ = [
    "AudioDelta",
    "Chatbot",
    "EndReason",
    "Event",
    "Interrupted",
    "Reply",
    "ReplyDone",
    "Sampling",
    "Session",
    "SpeechDelta",
    "TextDelta",
    "Timings",
    "load",
]
_CHATBOT = ("Chatbot", "Reply", "Session", "load")


def __getattr__(name: str) -> object:
    # Imported on first use, because torch and transformers take seconds to import.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = "language.sampling" if name == "Sampling" else "conversation.events"
    module = "conversation.chatbot" if name in _CHATBOT else place
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
