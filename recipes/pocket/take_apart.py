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

import torch

from duologue.language.backbone import load_language, load_provenance, save_language
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
    """Copies the parts, byte for byte, and adds the styles to vocabulary and language model.

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
        start_styles(language, vocabulary)


@torch.no_grad()
def start_styles(folder: Path, vocabulary: Vocabulary) -> None:
    """Starts the row of each style from the words for it. Rows that are alike are told apart only after long training.

    Args:
        folder: language model, which is written anew for this vocabulary.
    """
    model, provenance = load_language(folder), load_provenance(folder)
    rows = model.get_input_embeddings().weight
    for name, row in vocabulary.config.styles.items():
        words = f" even {name[:-1]}" if name.endswith("2") else f" {name}"
        rows[row] = rows[vocabulary.encode_text(words)].mean(0)
    save_language(folder, model, replace(provenance, vocabulary=vocabulary.hash))


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
