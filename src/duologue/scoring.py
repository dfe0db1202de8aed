"""Is the answer right: normalization of text and the search for accepted answers in a reply.

Used on the text of a reply (S->T) and on what a recognizer reads in its sound (S->S) alike, and by the training.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth"}
_ORDINALS |= {"eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
_LARGEST = 999_999
_UNITS = {word: value for value, word in enumerate(_SMALL)}
_ROUND = {word: value * 10 for value, word in enumerate(_TENS) if word}
# Spellings that recognizers choose between freely, and that Whisper's normalizer keeps apart.
_SPELLINGS = {"ok": "okay", "mum": "mom", "cannot": "can not", "alright": "all right"}


@cache
def _normalizers() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Returns Whisper's normalizers of English and of other languages; their library is an extra."""
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    english = EnglishTextNormalizer()
    # Whisper's own rule joins "one, two, three" to "123" and keeps "1, 2, 3" apart.
    english.standardize_numbers = lambda text: text
    return english, BasicTextNormalizer()


@lru_cache(maxsize=4096)
def normalize(text: str, language: str = "en") -> str:
    """Words with single spaces as recognizers are compared: Whisper's normalizer, but with English numbers in words.

    "It's 3,021 km!" -> "it is three thousand twenty one km"; "one hundred and five" -> "one hundred five". Chinese
    becomes simplified, with its numbers in characters: "10和15" -> "十和十五".

    Source: whisper-normalizer's `EnglishTextNormalizer` (arXiv 2212.04356, appendix C), for other languages than "en"
    its `BasicTextNormalizer`.
    """
    english, basic = _normalizers()
    if language == "zh":
        text = _chinese(unicodedata.normalize("NFKC", text))
    if language != "en":
        return str(basic(text)).strip()
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'").replace("_", " ")
    text = "".join(char for char in unicodedata.normalize("NFD", text) if not unicodedata.combining(char))
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?<!\w)[-−](?=\d)", " minus ", text)
    text = re.sub(r"[$]\s*(\d+)", r"\1 dollars", text).replace("%", " percent ")
    text = re.sub(r"(?<=\d)[.](?=\d)", " point ", text)
    text = re.sub(r"\b(\d+)(?:st|nd|rd|th)\b", lambda found: f" {_ordinal(_in_words(found[1]))} ", text)
    text = re.sub(r"\d+", lambda found: f" {_in_words(found[0])} ", text)
    words = " ".join(_SPELLINGS.get(word, word) for word in re.findall(r"\w+", str(english(text)))).split()
    kept = [
        word
        for index, word in enumerate(words)
        if not (word == "and" and 0 < index < len(words) - 1 and _inside_number(words[index - 1], words[index + 1]))
    ]
    return " ".join(kept)


def is_correct(reply_text: str, answers: Sequence[str], language: str = "en") -> bool:
    """Whether one of the accepted answers stands in the reply: all its words next to each other, in order.

    A number answers only as a whole: "seven" is not in "thirty seven", nor "twenty" in "twenty one". Chinese is
    compared by characters. Raises `ValueError` when there is no answer to look for.
    """
    wanted = [_units(_tokens(answer, language)) for answer in answers]
    if not wanted or not all(wanted):
        raise ValueError(f"answers must be non-empty texts, not {list(answers)!r}")
    reply = _units(_tokens(reply_text, language))
    return any(
        reply[start : start + len(answer)] == answer
        for answer in wanted
        for start in range(len(reply) - len(answer) + 1)
    )


def word_errors(reference: str, hypothesis: str, language: str = "en") -> tuple[int, int]:
    """(edits, reference words) between two texts, normalized here: substitutions, deletions and insertions of words.

    For "zh" these are characters, so that the quotient is the character error rate (CER).
    """
    expected, heard = _tokens(reference, language), _tokens(hypothesis, language)
    row = list(range(len(heard) + 1))
    for index, word in enumerate(expected, start=1):
        diagonal, row[0] = row[0], index
        for column, other in enumerate(heard, start=1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (word != other))
    return row[-1], len(expected)


def error_rate(texts: Iterable[tuple[str, str, str]]) -> float:
    """Errors over the reference words of all (reference, hypothesis, language): WER, for Chinese CER.

    References without words do not count; without any word the rate is 0.
    """
    counts = [(edits, words) for edits, words in (word_errors(*one) for one in texts) if words]
    return sum(edits for edits, _ in counts) / max(sum(words for _, words in counts), 1)


def _tokens(text: str, language: str) -> list[str]:
    """The normalized text in what is compared: characters of Chinese, words of other languages."""
    normalized = normalize(text, language)
    return list(normalized.replace(" ", "")) if language == "zh" else normalized.split()


def _chinese(text: str) -> str:
    """Simplified characters, with numbers in characters. Whisper writes "10" and traditional characters at will."""
    from cn2an import transform

    return str(transform(_simplifier()(text), "an2cn"))


@cache
def _simplifier() -> Callable[[str], str]:
    """Traditional to simplified characters; its tables are read once."""
    from opencc import OpenCC

    convert: Callable[[str], str] = OpenCC("t2s").convert
    return convert


def _ordinal(words: str) -> str:
    *before, last = words.split()
    ordinal = _ORDINALS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return " ".join([*before, ordinal])


def _in_words(digits: str) -> str:
    number = int(digits)
    if number > _LARGEST or (len(digits) > 1 and digits[0] == "0"):
        return " ".join(_SMALL[int(digit)] for digit in digits)
    return _spell(number)


def _spell(number: int) -> str:
    if number < 20:
        return _SMALL[number]
    if number < 100:
        rest = f" {_SMALL[number % 10]}" if number % 10 else ""
        return _TENS[number // 10] + rest
    for size, word in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {_spell(number % size)}" if number % size else ""
            return f"{_spell(number // size)} {word}{rest}"
    raise ValueError(f"{number} cannot be spelled; numbers from 0 to {_LARGEST} are known")


def _inside_number(before: str, after: str) -> bool:
    return before in ("hundred", "thousand") and (after in _UNITS or after in _ROUND)


def _units(words: list[str]) -> list[str | int]:
    """The words with every run that is one number replaced by its value, so that numbers compare as wholes."""
    units: list[str | int] = []
    index = 0
    while index < len(words):
        value, used = _number(words[index:])
        units.append(value if used else words[index])
        index += max(1, used)
    return units


def _number(words: list[str]) -> tuple[int, int]:
    """(value, number of words) of the longest number the words begin with; (0, 0) when there is none."""
    value, used = _below_hundred(words)
    if used and value and value < 10 and words[used : used + 1] == ["hundred"]:
        rest, more = _below_hundred(words[used + 1 :])
        rest, more = (rest, more) if rest else (0, 0)
        value, used = value * 100 + rest, used + 1 + more
    if used and value and words[used : used + 1] == ["thousand"]:
        rest, more = _number(words[used + 1 :])
        rest, more = (rest, more) if 0 < rest < 1000 else (0, 0)
        value, used = value * 1000 + rest, used + 1 + more
    return value, used


def _below_hundred(words: list[str]) -> tuple[int, int]:
    if not words:
        return 0, 0
    if words[0] in _ROUND:
        tens = _ROUND[words[0]]
        unit = _UNITS.get(words[1], 0) if len(words) > 1 else 0
        return (tens + unit, 2) if 0 < unit < 10 else (tens, 1)
    if words[0] in _UNITS:
        return _UNITS[words[0]], 1
    return 0, 0
