"""Numbers as words, and the questions about them: sums, comparisons, counting."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.pocket.curriculum import Intent, Item

_SMALL_WORDS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
"""
_TENS_WORDS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = _SMALL_WORDS.split()
_TENS = _TENS_WORDS.split()


def spell(number: int) -> str:
    """A whole number below one million in words, without hyphens and without "and"."""
    if number < 0:
        return "minus " + spell(-number)
    if number < 20:
        return _SMALL[number]
    if number < 100:
        return _TENS[number // 10] + (f" {_SMALL[number % 10]}" if number % 10 else "")
    if number < 1000:
        return spell(number // 100) + " hundred" + (f" {spell(number % 100)}" if number % 100 else "")
    if number < 1_000_000:
        return spell(number // 1000) + " thousand" + (f" {spell(number % 1000)}" if number % 1000 else "")
    raise ValueError(f"{number} is too large to spell; numbers below one million are known")


def _two(a: int, b: int, answer: int, unordered: bool = False) -> Item:
    key = f"{min(a, b)},{max(a, b)}" if unordered else f"{a},{b}"
    return Item(key, {"a": spell(a), "b": spell(b), "c": spell(answer)}, (spell(answer),))


def _plus(rng: Random) -> Item:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return _two(a, b, a + b, unordered=True)


def _minus(rng: Random) -> Item:
    a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)), reverse=True)
    return _two(a, b, a - b)


def _times(rng: Random) -> Item:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if max(a, b) > 12 and rng.random() < 0.5:  # the small table is asked more often
        a, b = rng.randint(0, 12), rng.randint(0, 12)
    return _two(a, b, a * b, unordered=True)


def _larger(rng: Random) -> Item:
    a, b = rng.sample(range(100 if rng.random() < 0.5 else 21), 2)
    return _two(a, b, max(a, b), unordered=True)


def _smaller(rng: Random) -> Item:
    a, b = rng.sample(range(100 if rng.random() < 0.5 else 21), 2)
    return _two(a, b, min(a, b), unordered=True)


def counting(a: int, b: int) -> str:
    """The numbers from a to b in either direction, as words with commas."""
    step = 1 if b >= a else -1
    return ", ".join(spell(n) for n in range(a, b + step, step))


def _count(rng: Random) -> Item:
    a = rng.choice((0, 1, 1, 1, 1, rng.randint(1, 15)))
    b = a + rng.randint(2, 9)
    if rng.random() < 0.4:
        a, b = b, a
    words = counting(a, b)
    return Item(f"{a},{b}", {"a": spell(a), "b": spell(b), "list": words}, (words.replace(",", ""),))


def _count_to(rng: Random) -> Item:
    b = rng.randint(3, 12)
    words = counting(1, b)
    return Item(f"1,{b}", {"b": spell(b), "list": words}, (words.replace(",", ""),))


def _next(rng: Random) -> Item:
    a = rng.randint(0, 99)
    return Item(str(a), {"a": spell(a), "c": spell(a + 1)}, (spell(a + 1),))


def _previous(rng: Random) -> Item:
    a = rng.randint(1, 100)
    return Item(str(a), {"a": spell(a), "c": spell(a - 1)}, (spell(a - 1),))


def _operation(
    name: str, weight: float, word: str, draw: Callable[[Random], Item], extra: tuple[str, ...], test: str
) -> Intent:
    phrasings = (
        f"what is {{a}} {word} {{b}}?",
        f"what's {{a}} {word} {{b}}?",
        f"how much is {{a}} {word} {{b}}?",
        f"{{a}} {word} {{b}}?",
        f"tell me {{a}} {word} {{b}}.",
        f"what does {{a}} {word} {{b}} make?",
        f"can you tell me what {{a}} {word} {{b}} is?",
        *extra,
    )
    replies = (f"{{a}} {word} {{b}} is {{c}}.", "That is {c}.", "The answer is {c}.")
    tests = (f"could you work out {{a}} {word} {{b}}?", test)
    return Intent(name, weight, draw, phrasings, tests, replies)


NUMBER_INTENTS: tuple[Intent, ...] = (
    _operation(
        "plus", 14.0, "plus", _plus, ("add {a} and {b}.", "what is the sum of {a} and {b}?"), "sum {a} and {b}."
    ),
    _operation(
        "minus",
        10.0,
        "minus",
        _minus,
        ("subtract {b} from {a}.", "take {b} away from {a}."),
        "what is {a} take away {b}?",
    ),
    _operation(
        "times",
        14.0,
        "times",
        _times,
        ("multiply {a} by {b}.", "multiply {a} and {b}."),
        "find the product of {a} and {b}.",
    ),
    Intent(
        "larger",
        4.0,
        _larger,
        (
            "which is larger, {a} or {b}?",
            "which is bigger, {a} or {b}?",
            "what is larger, {a} or {b}?",
            "which number is larger, {a} or {b}?",
            "what's bigger, {a} or {b}?",
            "tell me which is larger, {a} or {b}.",
        ),
        ("is {a} or {b} the larger number?", "of {a} and {b}, which one is larger?"),
        ("{c} is larger.", "The larger one is {c}."),
    ),
    Intent(
        "smaller",
        3.0,
        _smaller,
        (
            "which is smaller, {a} or {b}?",
            "what is smaller, {a} or {b}?",
            "which number is smaller, {a} or {b}?",
            "which is less, {a} or {b}?",
            "what's smaller, {a} or {b}?",
            "tell me which is smaller, {a} or {b}.",
        ),
        ("is {a} or {b} the smaller number?", "of {a} and {b}, which one is smaller?"),
        ("{c} is smaller.", "The smaller one is {c}."),
    ),
    Intent(
        "count",
        4.0,
        _count,
        (
            "count from {a} to {b}.",
            "can you count from {a} to {b}?",
            "please count from {a} to {b}.",
            "could you count from {a} to {b}?",
            "i want you to count from {a} to {b}.",
            "let's count from {a} to {b}.",
        ),
        ("start at {a} and count to {b}.", "say the numbers from {a} to {b}."),
        ("{list}.",),
    ),
    Intent(
        "count_to",
        2.5,
        _count_to,
        (
            "count to {b}.",
            "can you count to {b}?",
            "please count to {b}.",
            "could you count to {b}?",
            "count up to {b}.",
            "let me hear you count to {b}.",
        ),
        ("would you count to {b} for me?", "i'd like you to count to {b}."),
        ("{list}.",),
    ),
    Intent(
        "next_number",
        3.0,
        _next,
        (
            "what comes after {a}?",
            "which number comes after {a}?",
            "what number comes after {a}?",
            "what is the number after {a}?",
            "what's the next number after {a}?",
            "tell me the number after {a}.",
        ),
        ("which number follows {a}?", "after {a}, which number comes?"),
        ("{c} comes after {a}.", "It is {c}."),
    ),
    Intent(
        "previous_number",
        3.0,
        _previous,
        (
            "what comes before {a}?",
            "which number comes before {a}?",
            "what number comes before {a}?",
            "what is the number before {a}?",
            "what's the number just before {a}?",
            "tell me the number before {a}.",
        ),
        ("which number precedes {a}?", "before {a}, which number comes?"),
        ("{c} comes before {a}.", "It is {c}."),
    ),
)
