"""Draws `conversation.svg`, the animated picture of the README: a spoken question and pocket's answer.

The waveforms are those of `docs/sounds/`, at the speed of the sound. The words and the number of tokens come from

    duologue chat --json -o answer.wav | python docs/images/conversation.py

and the pause before the answer is the median time to first audio in `benchmarks/results/latency.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import soundfile

DOCS = Path(__file__).parent.parent
RESULTS = DOCS.parent / "benchmarks" / "results"
QUESTION = "What is the capital of France?"  # the text of the bundled question
BARS_PER_S = 25
WIDTH, HEIGHT, LEFT, BAR = 720, 250, 20, 5
HOLD_S = 2.5  # the whole picture stays before it begins again


def bars(path: Path) -> list[float]:
    """Peak levels of 40 ms each, the loudest is 1."""
    wav, sample_rate = soundfile.read(path, dtype="float32")
    size = sample_rate // BARS_PER_S
    peaks = np.abs(np.resize(wav, (len(wav) // size, size))).max(axis=1)
    return (peaks / peaks.max()).tolist()


def appear(element: str, at_s: float, total_s: float) -> str:
    """An element that becomes visible at one moment of every cycle."""
    share = at_s / total_s
    animation = (
        f'<animate attributeName="opacity" values="0;1" keyTimes="0;{share:.4f}" calcMode="discrete" '
        f'dur="{total_s:.2f}s" repeatCount="indefinite"/>'
    )
    name = element[1:].split(" ", 1)[0]
    return f"{element}{animation}</{name}>"


def row(levels: list[float], y: int, color: str, begin_s: float, total_s: float) -> list[str]:
    """One waveform, a bar at a time."""
    found = []
    for index, level in enumerate(levels):
        height = max(2.0, 56 * level)
        x = LEFT + index * (BAR + 2)
        bar = f'<rect x="{x}" y="{y - height / 2:.1f}" width="{BAR}" height="{height:.1f}" rx="2" fill="{color}">'
        found.append(appear(bar, begin_s + index / BARS_PER_S, total_s))
    return found


def draw(turn: dict[str, object], first_audio_s: float) -> str:
    """The picture as SVG."""
    question, answer = bars(DOCS / "sounds" / "question.flac"), bars(DOCS / "sounds" / "answer.flac")
    question_s, answer_s = len(question) / BARS_PER_S, len(answer) / BARS_PER_S
    begin_s = question_s + first_audio_s
    total_s = begin_s + answer_s + HOLD_S
    tokens = turn["speech_tokens"]
    words = str(turn["text"]).split()
    num_tokens = len(tokens) if isinstance(tokens, list) else 0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#10141c"/>',
        f'<text x="{LEFT}" y="32" font-size="13" fill="#8fa3bf">you</text>',
        *row(question, 68, "#5aa9e6", 0.0, total_s),
        appear(f'<text x="{LEFT}" y="118" font-size="16" fill="#e8eef7">{QUESTION}', question_s, total_s),
        f'<text x="{LEFT}" y="148" font-size="13" fill="#8fa3bf">pocket</text>',
        *row(answer, 184, "#7bd389", begin_s, total_s),
    ]
    x = float(LEFT)
    for index, word in enumerate(words):
        text = f'<text x="{x:.0f}" y="236" font-size="16" fill="#e8eef7">{word}'
        parts.append(appear(text, question_s + first_audio_s * (index + 1) / len(words), total_s))
        x += 9.2 * len(word) + 7
    note = f"first sound {first_audio_s:.2f} s after the question, {num_tokens} speech tokens"
    end = f'<text x="{WIDTH - LEFT}" y="236" font-size="12" text-anchor="end" fill="#8fa3bf">{note}'
    parts.append(appear(end, begin_s, total_s))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Reads the answer from standard input and writes the picture."""
    (turn,) = json.load(sys.stdin)["turns"]
    latency = json.loads((RESULTS / "latency.json").read_text(encoding="utf-8"))
    first_audio_s = latency["results"]["first_audio_s"]["median"]
    (DOCS / "images" / "conversation.svg").write_text(draw(turn, first_audio_s), encoding="utf-8")


if __name__ == "__main__":
    main()
