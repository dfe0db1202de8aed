"""Displays of a conversation: level meters and transcript on a terminal, plain lines in a pipe, JSON for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from duologue.client.connection import ServerEvent
from duologue.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BAR_WIDTH = 16
QUIETEST_DB = -50.0
REDRAWS_PER_S = 12


class LevelMeter:
    """Measures the peak level of an audio stream."""

    def __init__(self) -> None:
        self.level = 0.0

    async def through(self, source: AsyncIterator[NDArray[np.int16]]) -> AsyncIterator[NDArray[np.int16]]:
        """Yields the chunks of the source and updates `level`."""
        async for pcm in source:
            self.level = float(np.abs(pcm.astype(np.int32)).max(initial=0)) / 32768
            yield pcm


class Display(Protocol):
    """Shows a conversation."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *_: object) -> None: ...

    def observe(self, event: ServerEvent) -> None: ...


class JsonDisplay:
    """Prints every event as one line of JSON. Audio is replaced by its number of bytes."""

    def __enter__(self) -> JsonDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def observe(self, event: ServerEvent) -> None:
        if event["type"] == "response.output_audio.delta":
            event = {**event, "delta": None, "num_bytes": len(event["delta"]) * 3 // 4}
        print(json.dumps(event), flush=True)


class TerminalDisplay:
    """Prints the transcript and, on a terminal, level meters below it."""

    def __init__(self, name: str, you: Callable[[], float], answer: Callable[[], float]) -> None:
        """Args:
        name: name of the model.
        you, answer: return the levels of microphone and loudspeaker, in [0, 1].
        """
        from rich.console import Console
        from rich.live import Live

        self._name, self._you, self._answer = name, you, answer
        self._state, self._said = "connecting", ""
        self._console: Console = Console(highlight=False, markup=False, emoji=False)
        self._live = Live(
            console=self._console, get_renderable=self._bars, refresh_per_second=REDRAWS_PER_S, transient=True
        )

    def __enter__(self) -> TerminalDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_answer("")
        if self._console.is_terminal:
            self._live.stop()

    def observe(self, event: ServerEvent) -> None:
        match event["type"]:
            case "session.updated":
                self._state = "listening"
            case "input_audio_buffer.speech_started":
                self._state = "hearing you"
            case "input_audio_buffer.speech_stopped":
                self._state = "thinking"
            case "conversation.item.input_audio_transcription.completed":
                self._print(f"you: {printable(event['transcript']).strip()}")
            case "response.output_audio_transcript.delta" | "response.output_text.delta":
                self._said += printable(event["delta"])
            case "response.output_audio.delta":
                self._state = "speaking"
            case "response.done":
                status = event["response"]["status"]
                self._state = "listening"
                self._end_answer("" if status == "completed" else f" ({status})")
            case "talk.interrupted":
                self._print(f"(interrupted after {event['played_ms'] / 1000:.1f} s)")
            case "talk.reconnecting":
                self._state = "reconnecting"
                number = f"{event['attempt']} of {event['attempts']}"
                self._end_answer(" (cut off)" if self._said.strip() else "")
                self._print(f"{event['reason']}; trying again in {event['retry_s']:g} s ({number})", to_stderr=True)
            case "talk.reconnected":
                self._state = "listening"
                news = "" if event["resumed"] else "; the server no longer has the earlier conversation"
                self._print(f"connected again{news}", to_stderr=True)
            case "error":
                self._print(f"the server: {printable(event['error']['message'])}", to_stderr=True)

    def _end_answer(self, remark: str) -> None:
        if self._said.strip() or remark:
            self._print(f"{self._name}: {self._said.strip()}{remark}")
        self._said = ""

    def _print(self, line: str, to_stderr: bool = False) -> None:
        if to_stderr and not self._console.is_terminal:
            print(line, file=sys.stderr, flush=True)
        else:
            self._console.print(line)

    def _bars(self) -> Text:
        from rich.text import Text

        bars = f"you {bar(self._you())}  {self._name} {bar(self._answer())}  {self._state}"
        return Text(f"{self._name}: {self._said.strip()}\n{bars}" if self._said.strip() else bars)


def bar(level: float) -> str:
    """Formats a level in [0, 1] as a bar of fixed width, on a decibel scale."""
    decibels = 20 * math.log10(max(level, 1e-6))
    filled = round(BAR_WIDTH * min(1.0, max(0.0, 1 - decibels / QUIETEST_DB)))
    return "█" * filled + "·" * (BAR_WIDTH - filled)
