"""What replies can say, as a language model for the recogniser: every word of them, and which word follows which.

The open model of the recogniser was made from news. It has never read "Ulan Bator" or "chatbot" and takes "Tokyo is up
here" for likelier than "is Tokyo", in clear recordings too. A model over the curriculum hears those, and knows no
answer: of pairs of words it cannot tell which capital belongs to which country.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from duologue.config import parse_config, read_json
from duologue.evaluation.scoring import normalize

CURRICULUM_FILE = "curriculum.json"
_BEGIN, _END = "<s>", "</s>"
_DISCOUNT = 0.7  # of every count of a pair, given to the pairs that were not seen


@dataclass(frozen=True)
class Curriculum:
    """Attributes:
    texts: replies, as they are written; a text that comes often is likelier.
    pronunciations: phones of words in ARPAbet ("D UW AH L AO G"), for those that the recogniser does not know.
    """

    texts: tuple[str, ...]
    pronunciations: dict[str, str]


def load_curriculum(folder: str | Path) -> Curriculum | None:
    """The curriculum of a test set, or None where it has none. Raises ValueError for a file that is something else."""
    path = Path(folder) / CURRICULUM_FILE
    return parse_config(Curriculum, read_json(path), str(path)) if path.is_file() else None


def english_sentences(texts: Sequence[str]) -> list[list[str]]:
    """The normalised words of each text that is all in Latin letters; the recogniser knows no other language."""
    return [words.split() for words in map(normalize, texts) if words and words.isascii()]


def bigram_arpa(sentences: Sequence[Sequence[str]]) -> str:
    """A bigram model with absolute discounting, interpolated with single words, in ARPA format.

    Raises:
        ValueError: there is no sentence.
    """
    if not sentences:
        raise ValueError("a language model needs at least one sentence")
    followers: dict[str, Counter[str]] = defaultdict(Counter)
    for sentence in sentences:
        words = [_BEGIN, *sentence, _END]
        for word, following in pairwise(words):
            followers[word][following] += 1
    single: Counter[str] = sum((Counter(counts) for counts in followers.values()), Counter())
    all_words = single.total() + len(single)  # each word once more, so that rare ones are possible anywhere
    share = {word: (count + 1) / all_words for word, count in single.items()}
    unigrams, bigrams = [], []
    for word in sorted({*followers, *share}):
        counts = followers.get(word, Counter())
        held_back = _DISCOUNT * len(counts) / counts.total() if counts else 1.0
        alone = math.log10(share[word]) if word in share else -99.0
        unigrams.append(f"{alone:.4f} {word} {math.log10(held_back):.4f}")
        for following, count in sorted(counts.items()):
            probability = (count - _DISCOUNT) / counts.total() + held_back * share[following]
            bigrams.append(f"{math.log10(probability):.4f} {word} {following}")
    head = f"\\data\\\nngram 1={len(unigrams)}\nngram 2={len(bigrams)}\n"
    return "\n".join([head, "\\1-grams:", *unigrams, "", "\\2-grams:", *bigrams, "", "\\end\\", ""])
