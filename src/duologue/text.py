"""Text for terminals and wires."""

from __future__ import annotations


def printable(text: str) -> str:
    """Replaces control characters by spaces. Untrained models can emit terminal escape sequences."""
    return "".join(char if char.isprintable() else " " for char in text)


def valid_unicode(text: str) -> str:
    """Replaces lone surrogates, which UTF-8 cannot encode, by U+FFFD. JSON can hold them: a client cut an emoji."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
