"""The start of the Mandarin language model: pocket's, with the rows of another vocabulary of text.

    python -m recipes.mandarin.start --vocabulary runs/mandarin/vocabulary --out runs/mandarin/start

All speech rows stay, because the speech tokenizer does. A new text id starts as the mean of the ids that spelled it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from duologue.vocabulary import Vocabulary
from recipes.pocket.carry_over import carry_language


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("src/duologue/pocket"), help="folder of the trained pocket")
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    carry_language(args.model, Vocabulary.load(args.vocabulary), args.model / "tokenizer", args.out)


if __name__ == "__main__":
    main()
