"""Natural English for free speech: the sentences of Debian's `fortunes`, cleaned, and new ones chained from them.

`fortunes` is a package of short quotations. A sentence is kept when every synthesizer reads it the same way: plain
words with plain punctuation, no digits, no abbreviations, no words in capitals.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from random import Random

FORTUNES = Path("/usr/share/games/fortunes")
# Pictures, verses and program listings.
LEFT_OUT = frozenset({"art", "ascii-art", "translate-me", "zippy", "perl", "linuxcookie", "knghtbrd"})
WORDS = (3, 30)
LONGEST = 160  # characters; about 12 s
HELD_OUT_PERCENT = 3

_WORD = re.compile(r"^[A-Za-z]+(?:['-][A-Za-z]+)*$")
_ENDS = re.compile(r"(?<=[.?!])[\"']?\s+(?=[\"']?[A-Z])")
_ABBREVIATIONS = frozenset(
    [
        "mr",
        "mrs",
        "ms",
        "dr",
        "st",
        "prof",
        "vs",
        "etc",
        "inc",
        "jr",
        "sr",
        "gen",
        "col",
        "lt",
        "sgt",
        "rev",
        "hon",
        "co",
        "corp",
        "ltd",
        "dept",
        "vol",
        "ch",
        "pp",
        "fig",
        "ed",
        "op",
        "cit",
        "al",
        "viz",
        "esq",
    ]
)


def fortune_sentences(folder: Path = FORTUNES) -> list[str]:
    """All clean sentences of the files of `folder`, sorted, each once.

    Raises `RuntimeError` when the folder is missing.
    """
    if not folder.is_dir():
        raise RuntimeError(f"{folder} is missing; natural text needs the Debian package fortunes")
    kept: set[str] = set()
    for file in sorted(folder.iterdir()):
        if file.suffix or file.name in LEFT_OUT or not file.is_file():
            continue
        kept.update(clean_sentences(file.read_text(encoding="utf-8", errors="replace")))
    return sorted(kept)


def clean_sentences(text: str) -> list[str]:
    """The sentences of fortunes (separated by lines of `%`) that every synthesizer reads the same way."""
    found = []
    for fortune in re.split(r"\n%\n?", text):
        said = re.split(r"\n\s*--", fortune)[0]  # what follows names the author
        for paragraph in re.split(r"\n\s*\n", said):
            for piece in _ENDS.split(" ".join(paragraph.split())):
                sentence = clean(piece)
                if sentence is not None:
                    found.append(sentence)
    return found


def clean(piece: str) -> str | None:
    """One sentence in plain words and plain punctuation, or None when it is no such sentence."""
    text = piece.strip().replace('"', "").replace("``", "").replace("''", "")
    text = re.sub(r"\s*--+\s*", ", ", text).replace(" - ", ", ")
    text = re.sub(r"^[^A-Za-z]+", "", text)
    text = re.sub(r"(?<![A-Za-z])'|'(?![A-Za-z])", "", text)
    text = re.sub(r"\s+([,.;:?!])", r"\1", text)
    if not re.fullmatch(r"[A-Z][A-Za-z ,;:'-]*[.?!]", text) or len(text) > LONGEST:
        return None
    words = re.split(r"[ ,;:]+", text[:-1].strip(" ,;:"))
    if not WORDS[0] <= len(words) <= WORDS[1]:
        return None
    for word in words:
        if not _WORD.match(word) or word.lower() in _ABBREVIATIONS:
            return None
        if word.isupper() and word not in ("I", "A", "O"):
            return None
        if len(word) == 1 and word.lower() not in "aio":
            return None
        if re.search(r"[a-z][A-Z]", word) or (len(word) > 1 and not re.search(r"[aeiouyAEIOUY]", word)):
            return None
    return text


def is_held_out(text: str) -> bool:
    """Whether a sentence is kept for validation: 3 of 100, by the hash of its words."""
    words = " ".join(re.findall(r"[a-z']+", text.lower()))
    return int(sha256(words.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


class ChainedText:
    """New sentences from old ones: each word follows the two before it somewhere in `sentences`.

    They are locally natural and no table can hold them.
    """

    def __init__(self, sentences: Iterable[str]) -> None:
        self._next: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._starts: list[tuple[str, str]] = []
        for sentence in sentences:
            words = sentence.split()
            self._starts.append((words[0], words[1]))
            for index in range(len(words) - 2):
                self._next[words[index], words[index + 1]].append(words[index + 2])

    def draw(self, rng: Random) -> str:
        """One sentence of the usual length."""
        while True:
            words = list(rng.choice(self._starts))
            while len(words) < WORDS[1] and words[-1][-1] not in ".?!":
                followers = self._next.get((words[-2], words[-1]))
                if not followers:
                    break
                words.append(rng.choice(followers))
            text = " ".join(words)
            if len(words) >= WORDS[0] and text[-1] in ".?!" and len(text) <= LONGEST and not is_held_out(text):
                return text
