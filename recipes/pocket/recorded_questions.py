"""Renders the recorded questions that ship with pocket, for demo, evaluation and tests.

python -m recipes.pocket.recorded_questions --out src/duologue/pocket
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import soundfile

from duologue.config import load_config, write_json
from recipes.pocket.synthesis import SAMPLE_RATE, Request, render_one

LIST = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class RecordedQuestion:
    """One entry of the list: `file` in the output folder, its text, its `voice`, and the accepted answers."""

    file: str
    text: str
    voice: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class RecordedQuestions:
    """The whole list."""

    questions: tuple[RecordedQuestion, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (args.out / "questions").mkdir(parents=True, exist_ok=True)
    questions = load_config(LIST, RecordedQuestions).questions
    for one in questions:
        soundfile.write(args.out / one.file, render_one(Request(one.text, one.voice)), SAMPLE_RATE)
        print(f"{args.out / one.file}: {one.text}")
    listed = [{"file": one.file, "text": one.text, "answers": list(one.answers)} for one in questions]
    write_json(args.out / "questions.json", {"questions": listed})


if __name__ == "__main__":
    main()
