"""Asks the test of the Mandarin recipe aloud, and reads the answers' sound with Whisper base.

    python -m recipes.mandarin.evaluate --model runs/mandarin/chat/final --source runs/mandarin/source

It prints the right answers in text and sound, and three character error rates: of the recognizer on the questions, of
Whisper base on the questions, and of the replies' sound against their text. `replies.jsonl` beside the model has all
replies.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from duologue.config import read_json_lines
from duologue.conversation.answer import answer
from duologue.evaluation.intervals import wilson
from duologue.evaluation.recognition import open_recognizer
from duologue.models import Models
from duologue.scoring import is_correct, word_errors
from duologue.sound_files import load_audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--source", type=Path, required=True, help="folder of recipes.mandarin.recordings")
    parser.add_argument("--recognizer", type=Path, help="folder of Whisper base; see duologue evaluate pocket")
    args = parser.parse_args()
    recognizer, reason = open_recognizer(args.recognizer)
    if recognizer is None:
        parser.exit(1, f"{reason}\n")
    models = Models.load(args.model, engine="plain")
    right: Counter[tuple[str, bool]] = Counter()
    errors: Counter[str] = Counter()
    lines = []
    questions = [line for _, line in read_json_lines(args.source / "test.jsonl")]
    for question in tqdm(questions, desc="questions"):
        wav, rate = load_audio(args.source / question["wav"])
        reply = answer(models, wav, rate)
        sound = recognizer.transcribe(reply.audio, reply.sample_rate, "zh") if reply.audio.size else ""
        whisper = recognizer.transcribe(wav, rate, "zh")
        unseen = question["voice"].rpartition("+")[2] in ("f4", "m5")
        right["text", unseen] += is_correct(reply.text, [question["answer"]], "zh")
        right["sound", unseen] += is_correct(sound, [question["answer"]], "zh")
        right["asked", unseen] += 1
        for name, said, heard in (
            ("recognizer", question["text"], reply.heard or ""),
            ("Whisper", question["text"], whisper),
            ("agreement", reply.text, sound),
        ):
            wrong, of = word_errors(said, heard, "zh")
            errors.update({name: wrong, f"{name} of": of})
        lines.append({**question, "reply": reply.text, "heard": reply.heard, "sound": sound, "whisper": whisper})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (args.model / "replies.jsonl").write_text(text, encoding="utf-8")
    for unseen, voices in ((False, "voices of the training"), (True, "voices never heard")):
        asked = right["asked", unseen]
        for place in ("text", "sound"):
            low, high = wilson(right[place, unseen], asked)
            share = right[place, unseen] / asked
            print(f"right in the {place}, {voices}: {share:.1%} ({low:.1%} to {high:.1%}), {asked} questions")
    for name in _rates(errors):
        print(f"character errors, {name}: {errors[name] / errors[f'{name} of']:.1%}")


def _rates(errors: Iterable[str]) -> list[str]:
    return [name for name in errors if not name.endswith(" of")]


if __name__ == "__main__":
    main()
