"""Free word sequences to say and to repeat."""

from __future__ import annotations

import re
from random import Random

from recipes.pocket.curriculum import Intent, Item
from recipes.pocket.facts import COUNTRIES
from recipes.pocket.words import ADJECTIVES, FIRST_NAMES, NOUNS, NUMBER_WORDS, OPEN_WORDS, VERBS

_PLACES = tuple(name for country, capital, _ in COUNTRIES for name in (country.removeprefix("the "), capital))


def free_word(rng: Random) -> str:
    """One word of the open list, sometimes a name, a place or a number."""
    chance = rng.random()
    if chance < 0.05:
        return rng.choice(FIRST_NAMES)
    if chance < 0.10:
        return rng.choice(_PLACES)
    if chance < 0.18:
        return rng.choice(NUMBER_WORDS)
    return rng.choice(OPEN_WORDS)


def free_words(rng: Random, low: int, high: int) -> str:
    """A random sequence of words without grammar."""
    return " ".join(free_word(rng) for _ in range(rng.randint(low, high)))


_PATTERNS = (
    "the {adjective} {noun} can {verb} the {noun2}",
    "my {noun} and your {noun2} are {adjective}",
    "{name} wants to {verb} a {adjective} {noun}",
    "there are {number} {adjective} things in the {noun}",
    "please {verb} the {noun} before the {noun2}",
    "we {verb} {number} times under the {adjective} {noun}",
    "{name} and {name2} {verb} near the {noun}",
    "do you {verb} with the {adjective} {noun}",
    "i will {verb} the {noun} tomorrow",
    "the {noun} of {name} is very {adjective}",
    "did {name} {verb} in {place} with the {noun}",
    "some {adjective} {noun} was behind the {noun2} in {place}",
)


def free_sentence(rng: Random) -> str:
    """A grammatical sentence without meaning."""
    text = rng.choice(_PATTERNS).format(
        adjective=rng.choice(ADJECTIVES),
        noun=rng.choice(NOUNS),
        noun2=rng.choice(NOUNS),
        verb=rng.choice(VERBS),
        name=rng.choice(FIRST_NAMES),
        name2=rng.choice(FIRST_NAMES),
        number=rng.choice(NUMBER_WORDS),
        place=rng.choice(_PLACES),
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def free_text(rng: Random) -> str:
    """A text for free speech: mostly sequences of 2 to 12 words, else nonsense sentences."""
    if rng.random() < 0.35:
        return free_sentence(rng)
    return free_words(rng, 2, 12)


def _sequence(rng: Random) -> Item:
    words = free_sentence(rng) if rng.random() < 0.2 else free_words(rng, 1, 7)
    return Item(words.lower(), {"words": words}, (words.lower(),))


REPEAT_INTENTS: tuple[Intent, ...] = (
    Intent("repeat", 22.0, _sequence, decorate=False),
    Intent("say", 14.0, _sequence, decorate=False),
)
