"""Questions with one turn about facts: countries, calendar, opposites, animals, colours."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.pocket.curriculum import Intent, Item
from recipes.pocket.facts import ANIMALS, COLOURS, COUNTRIES, DAYS, MONTHS, OPPOSITES, SEASONS


def _capital(rng: Random) -> Item:
    country, capital, _ = rng.choice(COUNTRIES)
    return Item(country, {"country": country, "capital": capital}, (capital.lower(),))


def _country(rng: Random) -> Item:
    country, capital, _ = rng.choice(COUNTRIES)
    name = country.removeprefix("the ")
    return Item(capital, {"country": country, "capital": capital}, (name.lower(),))


def _continent(rng: Random) -> Item:
    country, _, continent = rng.choice(COUNTRIES)
    return Item(country, {"country": country, "continent": continent}, (continent.lower(),))


def _member(rng: Random) -> Item:
    """A country of a continent: any country of the table that lies there is right."""
    continent = rng.choice(sorted({entry[2] for entry in COUNTRIES}))
    inside = [entry[0] for entry in COUNTRIES if entry[2] == continent]
    answers = tuple(name.removeprefix("the ").lower() for name in inside)
    return Item(continent, {"continent": continent, "country": rng.choice(inside)}, answers)


def _after(names: tuple[str, ...], step: int) -> tuple[tuple[str, str], ...]:
    return tuple((name, names[(index + step) % len(names)]) for index, name in enumerate(names))


_MONTH_NAMES = tuple(month for month, _, _ in MONTHS)


def _ordered(kind: str, names: tuple[str, ...], step: int, rng: Random) -> Item:
    name, other = rng.choice(_after(names, step))
    return Item(name, {"kind": kind, "name": name, "other": other}, (other.lower(),))


def _next_day(rng: Random) -> Item:
    return _ordered("day", DAYS, 1, rng)


def _previous_day(rng: Random) -> Item:
    return _ordered("day", DAYS, -1, rng)


def _next_month(rng: Random) -> Item:
    return _ordered("month", _MONTH_NAMES, 1, rng)


def _previous_month(rng: Random) -> Item:
    return _ordered("month", _MONTH_NAMES, -1, rng)


def _next_season(rng: Random) -> Item:
    return _ordered("season", SEASONS, 1, rng)


def _previous_season(rng: Random) -> Item:
    return _ordered("season", SEASONS, -1, rng)


def _days_in_month(rng: Random) -> Item:
    month, days, _ = rng.choice(MONTHS)
    return Item(month, {"month": month, "days": days}, (days,))


def _season_of_month(rng: Random) -> Item:
    month, _, season = rng.choice(MONTHS)
    return Item(month, {"month": month, "season": season}, (season,))


def _opposite(rng: Random) -> Item:
    pair = rng.choice(OPPOSITES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    return Item(word, {"word": word, "other": other}, (other,))


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _sound(rng: Random) -> Item:
    animal, sound, _ = rng.choice(ANIMALS)
    return Item(animal, {"animal": article(animal), "sound": sound}, (sound,))


def _young(rng: Random) -> Item:
    animal, _, young = rng.choice(ANIMALS)
    return Item(animal, {"animal": article(animal), "bare": animal, "young": article(young)}, (young,))


# A question for the parent is only asked where a single animal of the table has that young.
_PARENTS = tuple((animal, its) for animal, _, its in ANIMALS if sum(its == young for _, _, young in ANIMALS) == 1)


def _parent(rng: Random) -> Item:
    animal, young = rng.choice(_PARENTS)
    return Item(young, {"animal": article(animal), "young": article(young)}, (animal,))


def _colour(rng: Random) -> Item:
    thing, verb, colour = rng.choice(COLOURS)
    return Item(thing, {"thing": thing, "verb": verb, "colour": colour}, (colour,))


def _ordering(name: str, after: bool) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Phrasings, test phrasings and replies of "what comes after" or "before" in a cycle called `name`."""
    word = "after" if after else "before"
    phrasings = (
        f"what {name} comes {word} {{name}}?",
        f"which {name} comes {word} {{name}}?",
        f"what is the {name} {word} {{name}}?",
        f"what's the {name} {word} {{name}}?",
        f"which {name} is {word} {{name}}?",
        f"tell me the {name} {word} {{name}}.",
        f"{word} {{name}}, which {name} comes?",
        f"name the {name} {word} {{name}}.",
    )
    direction = "follows" if after else "precedes"
    test = (f"which {name} {direction} {{name}}?", f"the {name} right {word} {{name}} is which one?")
    replies = (
        f"The {name} {word} {{name}} is {{other}}.",
        f"{{other}} comes {word} {{name}}.",
        "It is {other}.",
    )
    return phrasings, test, replies


def _cycle(name: str, intent: str, draw: Callable[[Random], Item], after: bool, weight: float) -> Intent:
    phrasings, test, replies = _ordering(name, after)
    return Intent(intent, weight, draw, phrasings, test, replies)


FACT_INTENTS: tuple[Intent, ...] = (
    Intent(
        "capital",
        12.0,
        _capital,
        (
            "what is the capital of {country}?",
            "what's the capital of {country}?",
            "tell me the capital of {country}.",
            "which city is the capital of {country}?",
            "do you know the capital of {country}?",
            "can you tell me the capital of {country}?",
            "name the capital of {country}.",
            "what is the capital city of {country}?",
            "i want to know the capital of {country}.",
            "{country}, what is its capital?",
        ),
        ("could you name the capital city of {country}?", "the capital of {country} is which city?"),
        ("The capital of {country} is {capital}.", "{capital} is the capital of {country}.", "It is {capital}."),
    ),
    Intent(
        "country_of_capital",
        9.0,
        _country,
        (
            "{capital} is the capital of which country?",
            "which country has the capital {capital}?",
            "what country is {capital} the capital of?",
            "of which country is {capital} the capital?",
            "in which country is {capital}?",
            "what country is {capital} in?",
            "where is {capital}?",
            "tell me the country of {capital}.",
        ),
        ("which country's capital is {capital}?", "name the country whose capital is {capital}."),
        ("{capital} is the capital of {country}.", "{capital} is in {country}.", "That is {country}."),
    ),
    Intent(
        "continent",
        9.0,
        _continent,
        (
            "which continent is {country} in?",
            "what continent is {country} in?",
            "on which continent is {country}?",
            "on what continent is {country}?",
            "tell me the continent of {country}.",
            "do you know which continent {country} is in?",
            "where in the world is {country}?",
            "{country} is in which continent?",
        ),
        ("what is the continent of {country}?", "to which continent does {country} belong?"),
        ("{country} is in {continent}.", "It is in {continent}.", "That is in {continent}."),
    ),
    Intent(
        "country_in_continent",
        1.5,
        _member,
        (
            "name a country in {continent}.",
            "tell me a country in {continent}.",
            "which country is in {continent}?",
            "can you name a country in {continent}?",
            "give me a country of {continent}.",
            "do you know a country in {continent}?",
        ),
        ("what is one country in {continent}?", "say the name of a country in {continent}."),
        ("{country} is in {continent}.", "One country in {continent} is {country}."),
    ),
    _cycle("day", "next_day", _next_day, True, 1.5),
    _cycle("day", "previous_day", _previous_day, False, 1.5),
    _cycle("month", "next_month", _next_month, True, 1.5),
    _cycle("month", "previous_month", _previous_month, False, 1.5),
    _cycle("season", "next_season", _next_season, True, 0.8),
    _cycle("season", "previous_season", _previous_season, False, 0.8),
    Intent(
        "days_in_month",
        2.0,
        _days_in_month,
        (
            "how many days are in {month}?",
            "how many days does {month} have?",
            "how many days are there in {month}?",
            "how long is {month}?",
            "tell me how many days {month} has.",
            "{month} has how many days?",
        ),
        ("what is the number of days in {month}?", "do you know how many days {month} has?"),
        ("{month} has {days} days.", "There are {days} days in {month}.", "It has {days} days."),
    ),
    Intent(
        "season_of_month",
        1.5,
        _season_of_month,
        (
            "which season is {month} in?",
            "what season is {month} in?",
            "in which season is {month}?",
            "tell me the season of {month}.",
            "{month} is in which season?",
            "is {month} in spring, summer, autumn or winter?",
        ),
        ("which season does {month} belong to?", "do you know the season of {month}?"),
        ("{month} is in {season}.", "It is in {season}.", "{month} belongs to {season}."),
    ),
    Intent(
        "opposite",
        9.0,
        _opposite,
        (
            "what is the opposite of {word}?",
            "what's the opposite of {word}?",
            "tell me the opposite of {word}.",
            "give me the opposite of {word}.",
            "which word is the opposite of {word}?",
            "do you know the opposite of {word}?",
            "the opposite of {word}?",
            "say the opposite of {word}.",
        ),
        ("what word means the opposite of {word}?", "{word} is the opposite of what?"),
        ("The opposite of {word} is {other}.", "{other} is the opposite of {word}.", "It is {other}."),
    ),
    Intent(
        "animal_sound",
        3.5,
        _sound,
        (
            "what sound does {animal} make?",
            "which sound does {animal} make?",
            "what does {animal} say?",
            "how does {animal} sound?",
            "tell me the sound of {animal}.",
            "what noise does {animal} make?",
            "do you know what {animal} says?",
        ),
        ("what is the sound of {animal}?", "which noise comes from {animal}?"),
        ("The sound of {animal} is {sound}.", "It says {sound}.", "{animal} says {sound}."),
    ),
    Intent(
        "animal_young",
        3.5,
        _young,
        (
            "what is a baby {bare} called?",
            "what's a baby {bare} called?",
            "what do you call a baby {bare}?",
            "what is the young of {animal}?",
            "how is a young {bare} called?",
            "tell me the name of a baby {bare}.",
            "what do we call a young {bare}?",
        ),
        ("what is the name for a baby {bare}?", "a baby {bare} has which name?"),
        ("A baby {bare} is {young}.", "It is called {young}.", "The young of {animal} is {young}."),
    ),
    Intent(
        "parent_of_young",
        2.0,
        _parent,
        (
            "which animal has {young}?",
            "{young} is the young of which animal?",
            "what animal does {young} grow into?",
            "whose baby is {young}?",
            "{young} is a baby what?",
            "what does {young} become?",
        ),
        ("which animal is {young} the young of?", "tell me whose baby {young} is."),
        ("{young} is the young of {animal}.", "That is {animal}.", "{young} becomes {animal}."),
    ),
    Intent(
        "colour",
        4.0,
        _colour,
        (
            "what color {verb} {thing}?",
            "which color {verb} {thing}?",
            "what is the color of {thing}?",
            "what's the color of {thing}?",
            "tell me the color of {thing}.",
            "do you know the color of {thing}?",
            "{thing}, what color is it?",
        ),
        ("which color does {thing} have?", "can you tell me what color {thing} {verb}?"),
        ("{thing} {verb} {colour}.", "It is {colour}.", "The color of {thing} is {colour}."),
    ),
)
