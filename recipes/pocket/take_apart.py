"""Puts the parts of a trained pocket where the recipe looks for them, so that its training can go on.

    python -m recipes.pocket.take_apart --model src/duologue/pocket --runs runs/pocket

It undoes `assemble.py`: the frozen tokenizer and its recognition head, the vocabulary and the vocoder are final; flow
and language model are the start of the steps `flow-voice` and `chat`. A vocabulary without styles gets those of the
curriculum. `recipes.pocket.run --further` runs it first.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from duologue.language.backbone import load_provenance, save_provenance
from duologue.vocabulary import Vocabulary
from recipes.pocket.synthesis import STYLE_NAMES

# Folder of the model -> folder of the runs.
PLACES = {
    "tokenizer": "frozen/tokenizer",
    "recognizer": "frozen/recognizer",
    "vocabulary": "vocabulary",
    "decoder/vocoder": "vocoder/final/vocoder",
    "decoder/flow": "flow/final/flow",
    "language": "pretrain/final/language",
}


def take_apart(model: Path, runs: Path) -> None:
    """Copies the parts, byte for byte, and adds the styles.

    Raises:
        ValueError: the model lacks a part, or its vocabulary has no room for the styles.
    """
    for part in PLACES:
        if not (model / part).is_dir():
            raise ValueError(f"{model} has no {part}; give a folder that recipes.pocket.assemble made")
    for part, place in PLACES.items():
        shutil.copytree(model / part, runs / place, dirs_exist_ok=True)
    vocabulary, language = Vocabulary.load(model / "vocabulary"), runs / PLACES["language"]
    if not vocabulary.config.styles:
        vocabulary = vocabulary.with_styles(STYLE_NAMES)
        vocabulary.save(runs / PLACES["vocabulary"])
        save_provenance(language, replace(load_provenance(language), vocabulary=vocabulary.hash))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("src/duologue/pocket"), help="folder of the trained pocket")
    parser.add_argument("--runs", type=Path, default=Path("runs/pocket"))
    args = parser.parse_args()
    try:
        take_apart(args.model, args.runs)
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
