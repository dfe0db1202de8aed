"""The recorded questions that ship with pocket, for demo, evaluation and tests: rendered once, kept as files.

python -m recipes.pocket.recorded_questions --out src/duologue/pocket
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile

from duologue.config import write_json
from recipes.pocket.synthesis import SAMPLE_RATE, Request, render_one

# File, question, voice, accepted answers.
QUESTIONS = (
    ("question.wav", "What is the capital of France?", "flite-awb", ["paris"]),
    ("questions/capital.flac", "What is the capital of Germany?", "flite-kal16", ["berlin"]),
    ("questions/sum.flac", "What is eight plus six?", "flite-awb", ["fourteen"]),
    ("questions/opposite.flac", "What is the opposite of big?", "festival-slt-hts", ["small"]),
    ("questions/day.flac", "What day comes after Thursday?", "flite-slt", ["friday"]),
    ("questions/name.flac", "Who are you?", "festival-kal", ["duologue"]),
    ("questions/repeat.flac", "Repeat after me: yellow window river.", "flite-kal16", ["yellow window river"]),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (args.out / "questions").mkdir(parents=True, exist_ok=True)
    for path, text, voice, _ in QUESTIONS:
        soundfile.write(args.out / path, render_one(Request(text, voice)), SAMPLE_RATE)
        print(f"{args.out / path}: {text}")
    listed = [{"file": path, "text": text, "answers": answers} for path, text, _, answers in QUESTIONS]
    write_json(args.out / "questions.json", {"questions": listed})


if __name__ == "__main__":
    main()
