"""Text for terminals and wires."""

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
