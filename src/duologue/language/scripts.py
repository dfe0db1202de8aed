"""Text ids by written language: a filter that keeps replies in English or Chinese.

Ids are judged by their bytes. Digits, punctuation, spaces and symbols belong to both languages; letters belong to the
language of their script. An incomplete character counts as all its completions, so allowed ids can never spell a letter
of another script. Continuation bytes are judged with the id that began the character.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from typing import Literal

import numpy as np
import numpy.typing as npt

from duologue.interleave import Kind
from duologue.text import byte_letters
from duologue.vocabulary import Vocabulary

TextLanguage = Literal["en", "zh"]
TEXT_LANGUAGES = {"en": "Latin", "zh": "Han"}

# Han characters, and CJK punctuation and full-width forms, which English does not use either.
_HAN = ((0x2E80, 0x3040), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0xFF00, 0xFFF0), (0x20000, 0x32400))
_HALF_WIDTH = (0xFF65, 0xFFDD)  # katakana and hangul among them
_NO_LETTERS = 0xC0  # below it, Latin-1 has only symbols, ordinal signs and micro
_MAX_POSSIBLE = 0x1000  # incomplete characters with more completions are refused


def check_text_language(language: str) -> None:
    """Raises ValueError for an unsupported language."""
    if language not in TEXT_LANGUAGES:
        raise ValueError(f"text_language is {language!r}; the choices are {', '.join(TEXT_LANGUAGES)}")


def language_mask(vocabulary: Vocabulary, language: str) -> npt.NDArray[np.bool_]:
    """Returns bool (size,): false for text ids with letters of another language; other kinds are true.

    Raises:
        ValueError: an unsupported language.
    """
    check_text_language(language)
    script = TEXT_LANGUAGES[language]
    mask = np.ones(vocabulary.size, dtype=np.bool_)
    spell = _speller(vocabulary)
    styles = vocabulary.config.styles.values()
    for token in set(np.flatnonzero(vocabulary.kinds == Kind.TEXT).tolist()) - set(styles):
        mask[token] = fits(spell(int(token)), script)
    return mask


def fits(spelled: bytes, script: str) -> bool:
    """Returns whether UTF-8 bytes, cut anywhere, can occur in text of one script, "Latin" or "Han"."""
    start = 0
    while start < len(spelled) and start < 3 and spelled[start] & 0xC0 == 0x80:
        start += 1  # continuation bytes of an earlier character
    while start < len(spelled):
        length = _length(spelled[start])
        piece = spelled[start : start + length]
        if not length or any(byte & 0xC0 != 0x80 for byte in piece[1:]):
            return False
        low, high = (int(_code_point(piece + filler * (length - len(piece)))) for filler in (b"\x80", b"\xbf"))
        if high - low >= _MAX_POSSIBLE or not all(_belongs(point, script) for point in range(low, high + 1)):
            return False
        start += length
    return True


@functools.lru_cache(maxsize=2**17)
def _belongs(point: int, script: str) -> bool:
    if any(low <= point < high for low, high in _HAN):
        return script == "Han" and not _HALF_WIDTH[0] <= point < _HALF_WIDTH[1]
    if point >= 0x110000 or 0xD800 <= point < 0xE000:
        return True  # no character at all
    character = chr(point)
    category = unicodedata.category(character)
    if category[0] not in "LMN" or (_NO_LETTERS > point > 0x7F):
        return True
    name = unicodedata.name(character, "")
    if category[0] == "L" or category == "Nl":
        latin = name.startswith(("LATIN ", "MODIFIER LETTER", "ROMAN NUMERAL", "SMALL ROMAN NUMERAL"))
        return latin and script == "Latin"
    if category[0] == "M":
        return name.startswith(("COMBINING", "VARIATION SELECTOR"))
    return point < 0x80 or category == "No"


def _length(lead: int) -> int:
    """Returns the length in bytes of a character with this lead byte; 0 for none."""
    for length, low, high in ((1, 0x00, 0x80), (2, 0xC2, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0xF5)):
        if low <= lead < high:
            return length
    return 0


def _code_point(character: bytes) -> int:
    point = character[0] if len(character) == 1 else character[0] & (0x7F >> len(character))
    for byte in character[1:]:
        point = point << 6 | byte & 0x3F
    return point


def _speller(vocabulary: Vocabulary) -> functools.partial[bytes]:
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    description = json.loads(vocabulary.tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps(description["decoder"])
    return functools.partial(_spelled, vocabulary, letters if byte_level else None)


def _spelled(vocabulary: Vocabulary, letters: dict[str, int] | None, token: int) -> bytes:
    """Returns the bytes of a text id: byte-level letters, or SentencePiece pieces with bytes such as `<0xE4>`."""
    piece = vocabulary.tokenizer.id_to_token(token)
    assert piece is not None, "a text id has a piece"
    if letters is not None:
        return bytes(letters[letter] for letter in piece)
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()
