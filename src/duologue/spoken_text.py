"""Text to be spoken: what cannot be spoken is left out, numbers become words, and long text is split.

Word and character boundaries are those of Unicode (UAX 29), through the package `regex`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import pairwise

import regex

_LINKS = regex.compile(r"!?\[([^\[\]\n]*)\]\([^()\s]+\)")
_FENCES = regex.compile(r"^[ \t]*(?:```|~~~)[^\n]*$", regex.MULTILINE)
_LINE_MARKS = regex.compile(r"^[ \t]*(?:#{1,6}|[-*+]|>)[ \t]+", regex.MULTILINE)
_EMPHASIS = regex.compile(r"(?<!\w)(\*{1,3}|_{1,3}|~~|`+)(?=\S)([^\n]+?)(?<=\S)\1(?!\w|\.\w)")
_UNSPOKEN = regex.compile(
    r"[\p{Cc}--[\t\n\r]]|[\p{Cf}--[\u200c\u200d]]|\p{Co}|\p{Cn}"
    r"|\p{Regional_Indicator}+|[0-9#*]\ufe0f?\u20e3"
    r"|[\p{Extended_Pictographic}--[©®™]][\ufe0f\u200d\p{Emoji_Modifier}\p{Extended_Pictographic}]*|[\ufe0e\ufe0f\u20e3]",
    regex.VERSION1,
)
# A sentence ends with a mark and a blank, unless the mark follows an initial. The marks of some scripts need no blank.
_SENTENCES = regex.compile(r"(?<=[.!?;:…](?<!\b\p{Lu}\.)[\"'”’)\]]*)\s+|(?<=[。！？；：｡])|\n+")
_BLANKS = regex.compile(r"\s+")
_WORDS = regex.compile(r"\b", regex.WORD)
_CHARACTERS = regex.compile(r"\X")
_BREAKS = (_SENTENCES, _BLANKS, _WORDS, _CHARACTERS)

_NUMBER = regex.compile(
    r"(?<![\w.,:/-])(?P<currency>[$€£])?(?:(?P<hour>[01]?\d|2[0-3]):(?P<minute>[0-5]\d)"
    r"|(?P<year>\d{4})-(?P<month>0[1-9]|1[0-2])-(?P<day>0[1-9]|[12]\d|3[01])"
    r"|(?P<ordinal>\d{1,6})(?:st|nd|rd|th)|(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,15}(?:\.\d+)?)(?:\s?(?P<unit>%|°C|°F|km/h|(?:km|cm|mm|kg|mg|lb|oz|ft|mph|kB|MB|GB|TB|kHz|MHz|GHz|Hz|kW|ms|ml|m|g)\b))?)"
    r"(?![\w%]|[.,:/-]\w)"
)
# "May 5, 1984" and "5 May 1984"; the year may be absent.
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_MONTH = "|".join(f"{month}|{month[:3]}\\.?" for month in _MONTHS)
_DATE = regex.compile(
    rf"\b(?:(?P<month>{_MONTH})\s(?P<day>[12]\d|3[01]|0?[1-9])(?:st|nd|rd|th)?(?:,?\s(?P<year>[12]\d{{3}}))?"
    rf"|(?P<day>[12]\d|3[01]|0?[1-9])(?:st|nd|rd|th)?\s(?P<month>{_MONTH})(?:,?\s(?P<year>[12]\d{{3}}))?)\b(?![.,:/-]\d)"
)
_CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP"}
# Singular and plural.
_UNITS = {
    "%": ("percent", "percent"),
    "°C": ("degree Celsius", "degrees Celsius"),
    "°F": ("degree Fahrenheit", "degrees Fahrenheit"),
    "km/h": ("kilometer per hour", "kilometers per hour"),
    "mph": ("mile per hour", "miles per hour"),
    "lb": ("pound", "pounds"),
    "oz": ("ounce", "ounces"),
    "ft": ("foot", "feet"),
    **{
        unit: (name, f"{name}s")
        for unit, name in (
            ("km", "kilometer"),
            ("cm", "centimeter"),
            ("mm", "millimeter"),
            ("m", "meter"),
            ("kg", "kilogram"),
            ("mg", "milligram"),
            ("g", "gram"),
            ("ml", "milliliter"),
            ("kB", "kilobyte"),
            ("MB", "megabyte"),
            ("GB", "gigabyte"),
            ("TB", "terabyte"),
            ("kW", "kilowatt"),
            ("ms", "millisecond"),
        )
    },
    "Hz": ("hertz", "hertz"),
    "kHz": ("kilohertz", "kilohertz"),
    "MHz": ("megahertz", "megahertz"),
    "GHz": ("gigahertz", "gigahertz"),
}


def speakable(text: str) -> str:
    """Leaves out emoji, control characters and the marks of Markdown. The rest of the text is unchanged."""
    text = _LINE_MARKS.sub("", _FENCES.sub("", _LINKS.sub(r"\1", text)))
    for _ in range(3):  # marks inside marks
        text = _EMPHASIS.sub(r"\2", text)
    return str(_UNSPOKEN.sub("", text))


def write_out_numbers(text: str, language: str = "en") -> str:
    """Writes numbers, ordinals, amounts of money, percentages, units, dates and clock times as words.

    Digits in versions, addresses and codes stay as they are. Only English text is changed.
    """

    if language != "en":
        return text
    from num2words import num2words

    def date(match: regex.Match[str]) -> str:
        name = match["month"].rstrip(".")
        month = next(each for each in _MONTHS if each.startswith(name))
        spoken = f"{month} {num2words(int(match['day']), to='ordinal')}"
        return f"{spoken}, {num2words(int(match['year']), to='year')}" if match["year"] else spoken

    def words(match: regex.Match[str]) -> str:
        if match["year"]:
            day = num2words(int(match["day"]), to="ordinal")
            return f"{_MONTHS[int(match['month']) - 1]} {day}, {num2words(int(match['year']), to='year')}"
        if match["hour"]:
            minute = int(match["minute"])
            spoken = [num2words(int(match["hour"]))]
            if minute:
                spoken.append(("oh " if minute < 10 else "") + num2words(minute))
            return " ".join(spoken) if minute else f"{spoken[0]} o'clock"
        if match["ordinal"]:
            return str(num2words(int(match["ordinal"]), to="ordinal"))
        digits = match["number"].replace(",", "")
        number = Decimal(digits)  # keeps the zeros at the end
        if match["currency"]:
            amount = num2words(number, to="currency", currency=_CURRENCIES[match["currency"]])
            return str(amount.removesuffix(", zero cents").removesuffix(", zero pence"))
        if match["unit"]:
            return f"{num2words(number)} {_UNITS[match['unit']][digits != '1']}"
        return str(num2words(number))

    return str(_NUMBER.sub(words, _DATE.sub(date, text)))


def with_end(text: str) -> str:
    """Adds a full stop to text that ends in a letter or a digit. Without one, a model may not stop speaking."""
    if not text or not text[-1].isalnum():
        return text
    return text + ("。" if regex.match(r"[\p{Han}\p{Hiragana}\p{Katakana}]", text[-1]) else ".")


def chunks(text: str, count: Callable[[str], int], limit: int) -> list[str]:
    """Splits a text into spans of it, each as long as `limit` allows.

    A text is split between sentences, a longer sentence between words, and a longer word between characters. Blanks at
    the edges of a span are left out.

    Args:
        text: the text.
        count: returns the number of ids of a text.
        limit: maximum ids per span.
    """

    def fits(start: int, end: int) -> bool:
        return count(text[start:end].strip()) <= limit

    def split(start: int, end: int, breaks: Sequence[regex.Pattern[str]]) -> list[tuple[int, int]]:
        if fits(start, end) or end - start < 2:
            return [(start, end)]
        places = [each.end() for each in breaks[0].finditer(text, start, end)] if breaks else range(start, end)
        edges = [start, *sorted({place for place in places if start < place < end}), end]
        spans: list[tuple[int, int]] = []
        for piece in pairwise(edges):
            if spans and fits(spans[-1][0], piece[1]):
                spans[-1] = (spans[-1][0], piece[1])
            else:
                spans += [piece] if fits(*piece) else split(*piece, breaks[1:])
        return spans

    stripped = (text[start:end].strip() for start, end in split(0, len(text), _BREAKS))
    return [span for span in stripped if span]
