"""Sentences of the replies, for the recognizer of the evaluation that knows only them (`curriculum.json`).

    python -m recipes.pocket.replies --pronunciations runs/pocket/pronunciations.json \\
        --out runs/pocket/corpus/test/curriculum.json

The sentences are replies to questions in the wordings of the training, at its frequencies, and every fact. Their words
in random order follow, so that every word of the curriculum is possible anywhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from duologue.config import to_mapping, write_json
from duologue.evaluation.curriculum import Curriculum, english_sentences
from recipes.pocket.everything import any_dialogue, facts
from recipes.pocket.pronunciations import pronounce
from recipes.pocket.repeating import free_words

_TO_ARPABET = {"ax": "AH"}  # the one phone of flite that the recogniser has another name for


def replies(num_dialogues: int, seed: int = 0) -> list[str]:
    """Replies of random dialogues, facts, and free words."""
    rng = Random(f"replies|{seed}")
    said = [turn.reply for _ in range(num_dialogues) for turn in any_dialogue("train", rng).exchanges]
    return [*said, *facts(), *(free_words(rng, 2, 8) for _ in range(num_dialogues // 10))]


def arpabet(phones: list[str]) -> str:
    """Phones of flite in the notation of the recognizer's dictionary."""
    return " ".join(_TO_ARPABET.get(phone, phone.upper()) for phone in phones)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pronunciations", type=Path, required=True, help="a table of words; other words are looked up"
    )
    parser.add_argument("--dialogues", type=int, default=40000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    texts = replies(args.dialogues)
    words = sorted({word for sentence in english_sentences(texts) for word in sentence})
    table: dict[str, list[str]] = json.loads(args.pronunciations.read_text())
    spoken = {word: arpabet(table.get(word) or pronounce(word)) for word in words}
    write_json(args.out, to_mapping(Curriculum(tuple(texts), spoken)))
    print(f"{args.out}: {len(texts)} texts, {len(words)} words")


if __name__ == "__main__":
    main()
