"""Text for terminals and wires, and its heard part."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """Replaces control characters by spaces. Untrained models can emit terminal escape sequences."""
    return "".join(char if char.isprintable() else " " for char in text)


def shortened(text: str, most: int = 60) -> str:
    """Returns the text, or its beginning and an ellipsis if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def valid_unicode(text: str) -> str:
    """Replaces lone surrogates, which UTF-8 cannot encode, by U+FFFD. JSON can hold them: a client cut an emoji."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def valid_strings(value: Any) -> Any:
    """Applies `valid_unicode` to all strings in plain values, keys included."""
    if isinstance(value, str):
        return valid_unicode(value)
    if isinstance(value, dict):
        return {valid_strings(key): valid_strings(one) for key, one in value.items()}
    return [valid_strings(one) for one in value] if isinstance(value, list) else value


def heard_text(text: str, share: float) -> str:
    """Returns the beginning of a transcript for this share of the speech, cut at a word: an estimate.

    Words are assumed to be spread evenly over the speech.
    """
    size = min(round(len(text) * share), len(text))
    while 0 < size < len(text) and _in_word(text[size - 1]) and _in_word(text[size]):
        size -= 1
    return text[:size].rstrip()


def _in_word(character: str) -> bool:
    """Returns whether a character belongs to a script that separates words by spaces."""
    return character == "'" or (character.isalnum() and ord(character) < 0x2E80)


def byte_letters() -> list[str]:
    """Returns the character of each byte in byte-level BPE: itself if printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
