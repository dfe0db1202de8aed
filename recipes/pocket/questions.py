"""Questions with one turn about facts: countries, calendar, opposites, animals, colors."""

from __future__ import annotations

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
    """A country of a continent: any country of the table in that continent is right."""
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


FACT_INTENTS: tuple[Intent, ...] = (
    Intent("capital", 12.0, _capital),
    Intent("country_of_capital", 9.0, _country),
    Intent("continent", 9.0, _continent),
    Intent("country_in_continent", 1.5, _member),
    Intent("next_day", 1.5, _next_day),
    Intent("previous_day", 1.5, _previous_day),
    Intent("next_month", 1.5, _next_month),
    Intent("previous_month", 1.5, _previous_month),
    Intent("next_season", 0.8, _next_season),
    Intent("previous_season", 0.8, _previous_season),
    Intent("days_in_month", 2.0, _days_in_month),
    Intent("season_of_month", 1.5, _season_of_month),
    Intent("opposite", 9.0, _opposite),
    Intent("animal_sound", 3.5, _sound),
    Intent("animal_young", 3.5, _young),
    Intent("parent_of_young", 2.0, _parent),
    Intent("colour", 4.0, _colour),
)
