"""The recorded questions that ship with pocket, for the demo and the tests: rendered once, kept as files.

python -m recipes.pocket.recorded_questions --out src/duologue/pocket
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile

from recipes.pocket.synthesis import SAMPLE_RATE, Request, render_one

DEMO = ("question.wav", "What is the capital of Japan?", "flite-awb")
QUESTIONS = (
    ("capital.flac", "What is the capital of France?", "flite-kal16"),
    ("sum.flac", "What is seven plus five?", "flite-awb"),
    ("opposite.flac", "What is the opposite of hot?", "festival-slt-hts"),
    ("day.flac", "What day comes after Monday?", "flite-slt"),
    ("name.flac", "Who are you?", "flite-rms"),
    ("repeat.flac", "Repeat after me: yellow window river.", "flite-kal16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (args.out / "questions").mkdir(parents=True, exist_ok=True)
    for path, (_, text, voice) in [
        (args.out / DEMO[0], DEMO),
        *((args.out / "questions" / question[0], question) for question in QUESTIONS),
    ]:
        soundfile.write(path, render_one(Request(text, voice)), SAMPLE_RATE)
        print(f"{path}: {text}")


if __name__ == "__main__":
    main()
