"""Numbers as words, and the questions about them: sums, comparisons, counting."""

from __future__ import annotations

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


NUMBER_INTENTS: tuple[Intent, ...] = (
    Intent("plus", 14.0, _plus),
    Intent("minus", 10.0, _minus),
    Intent("times", 14.0, _times),
    Intent("larger", 4.0, _larger),
    Intent("smaller", 3.0, _smaller),
    Intent("count", 4.0, _count),
    Intent("count_to", 2.5, _count_to),
    Intent("next_number", 3.0, _next),
    Intent("previous_number", 3.0, _previous),
)
