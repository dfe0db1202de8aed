"""The text tokenizer of pocket: a byte-level BPE trained on the curriculum.

    python -m recipes.pocket.text --texts FILE... --out FOLDER [--vocab-size N]

The vocabulary is small, because every row costs weights. It is coarse, because text has to stay ahead of speech: a full
run of text tokens must take at least a full run of speech tokens to say. A word with its blank is therefore one token
wherever the size allows, and runs of Han characters may join.

The rule was measured on 4 h of free speech, with fast renditions, on clips with more text than one run. With 2560 ids 5
% of them break the rule, with 4096 three of 771, with 5120 none of 280. Keeping punctuation at its word costs ids and
is worse at each of these sizes.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from duologue.vocabulary import Vocabulary
from recipes.pocket.synthesis import STYLE_NAMES

VOCAB_SIZE = 5120
MAX_TOKEN_BYTES = 24

WORDS = "|".join(
    (
        r"\p{Han}+",
        r" ?[\p{L}\p{M}&&[^\p{Han}]][\p{L}\p{M}'’\-&&[^\p{Han}]]*",
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def train_text_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids, 256 of which are the bytes: it encodes every text without loss.

    The result depends on the word counts, not on the order of the texts.

    Raises:
        ValueError: fewer ids than bytes.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256, one id for every byte, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Trains on files with one text per line, and writes the whole vocabulary."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pocket.text", description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the vocabulary")
    parser.add_argument("--codebook-size", type=int, default=4096, help="speech tokens of the tokenizer beside it")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    options = parser.parse_args(argv)
    lines = (line.rstrip("\n") for path in options.texts for line in path.open(encoding="utf-8"))
    tokenizer = train_text_tokenizer(lines, options.vocab_size)
    vocabulary = Vocabulary.extend(tokenizer, options.codebook_size, multiple_of=64).with_styles(STYLE_NAMES)
    vocabulary.save(options.out)
    print(f"{options.out}: {tokenizer.get_vocab_size()} text ids, {vocabulary.size} in all")


if __name__ == "__main__":
    main()
