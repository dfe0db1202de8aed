"""Asks the test of the Mandarin recipe aloud. The model's own recognizer reads question and answer.

    python -m recipes.mandarin.evaluate --model runs/mandarin/chat/final --source runs/mandarin/source

It prints the right answers in text and sound with 95 % intervals, by kind too, and the character error rates of what
the recognizer reads. It is no independent judge, but Whisper base does not understand espeak-ng's Mandarin.
`replies.jsonl` in the folder of the model has all replies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from duologue.config import read_json_lines
from duologue.conversation.answer import answer, tokenize
from duologue.evaluation.intervals import wilson
from duologue.models import Models
from duologue.scoring import error_rate, is_correct
from duologue.sound_files import load_audio
from duologue.training.pretrain import write_lines
from recipes.mandarin.recordings import UNSEEN_VOICES, VOICES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder with a recognizer of Mandarin")
    parser.add_argument("--source", type=Path, required=True, help="folder of recipes.mandarin.recordings")
    args = parser.parse_args()
    models = Models.load(args.model, engine="plain")
    if models.recognizer is None:
        parser.exit(1, f"{args.model} has no recognizer; docs/new-language.md says how to make one\n")
    questions = [line for _, line in read_json_lines(args.source / "test.jsonl")]
    lines = [_ask(models, question, args.source) for question in tqdm(questions, desc="questions")]
    write_lines(args.model / "replies.jsonl", lines)
    new = [line for line in lines if line["new"]]
    for name, asked in (
        ("new questions, voices heard in training", [line for line in new if line["voice"] in VOICES]),
        ("new questions, voices never heard", [line for line in new if line["voice"] in UNSEEN_VOICES]),
        ("questions of the training, voices never heard", [line for line in lines if not line["new"]]),
    ):
        print(f"{name}, right in the text: {_share_right(asked, 'reply')}")
        print(f"{name}, right in the sound: {_share_right(asked, 'sound')}")
    for kind in dict.fromkeys(line["kind"] for line in new):
        print(f"  {kind}, new: {_share_right([line for line in new if line['kind'] == kind], 'reply')}")
    for name, said, heard in (("questions", "text", "heard"), ("replies", "reply", "sound")):
        rate = error_rate((line[said], line[heard], "zh") for line in lines)
        print(f"character errors of the recognizer on the {name}: {rate:.1%}")


def _ask(models: Models, question: dict[str, Any], source: Path) -> dict[str, Any]:
    """The question with the reply, and what the recognizer reads in both."""
    reply = answer(models, *load_audio(source / question["wav"]))
    again = tokenize(models, reply.audio, reply.sample_rate) if reply.audio.size else []
    sound = models.transcribe(tuple(again)) if again else ""
    return {**question, "heard": reply.heard or "", "reply": reply.text, "sound": sound}


def _share_right(lines: Sequence[dict[str, Any]], place: str) -> str:
    right = sum(is_correct(line[place], [line["answer"]], "zh") for line in lines)
    low, high = wilson(right, len(lines))
    return f"{right} of {len(lines)}, {right / len(lines):.0%} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    main()
