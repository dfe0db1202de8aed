"""Memory over turns: follow-ups that need the turn before, and facts that the user stated earlier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from recipes.pocket.curriculum import Conversing, Dialogue, Exchange, Intent, ask, exchange, pick, until
from recipes.pocket.facts import COUNTRIES, OPPOSITES
from recipes.pocket.numbers import NUMBER_INTENTS, spell
from recipes.pocket.phrasings import PHRASINGS
from recipes.pocket.questions import FACT_INTENTS
from recipes.pocket.small_talk import SMALL_TALK_INTENTS
from recipes.pocket.words import FIRST_NAMES

_BY_NAME = {intent.name: intent for intent in FACT_INTENTS + NUMBER_INTENTS}
# What may stand between a thing told and the question for it.
_BETWEEN: tuple[Intent, ...] = FACT_INTENTS + NUMBER_INTENTS[:5] + SMALL_TALK_INTENTS[:1]


def _next_entity(split: str, rng: Random) -> Dialogue:
    """ "What is the capital of France?" "Paris." "And Spain?" """
    name = rng.choice(("capital", "capital", "continent", "opposite"))

    def turns() -> tuple[Exchange | None, ...]:
        made: list[Exchange | None] = [exchange(_BY_NAME[name], split, rng)]
        for _ in range(rng.choice((1, 1, 2))):
            if name == "opposite":
                pair = rng.choice(OPPOSITES)
                entity, answer = pair if rng.random() < 0.5 else pair[::-1]
                reply = f"The opposite of {entity} is {answer}."
            else:
                entity, capital, continent = rng.choice(COUNTRIES)
                answer = capital if name == "capital" else continent
                reply = (
                    f"The capital of {entity} is {capital}." if name == "capital" else f"{entity} is in {continent}."
                )
            made.append(ask(f"and_{name}", entity, {"x": entity}, reply, (answer.lower(),), split, rng))
        return tuple(made)

    return Dialogue("follow_up_fact", until(turns))


def _go_on_with_sum(split: str, rng: Random) -> Dialogue:
    """ "What is three plus four?" "Seven." "Times two?" "Seven times two is fourteen." """

    def turns() -> tuple[Exchange | None, ...]:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        value = a + b
        item_key = f"{min(a, b)},{max(a, b)}"
        slots = {"a": spell(a), "b": spell(b)}
        reply = f"{spell(a)} plus {spell(b)} is {spell(value)}."
        made = [
            ask("plus", item_key, slots, reply, (spell(value),), split, rng),
        ]
        for _ in range(rng.choice((1, 1, 2))):
            operations = ["plus"] if value > 20 else ["plus", "minus", "times"]
            operation = rng.choice(operations)
            c = rng.randint(1, 5 if operation == "times" else 10)
            if operation == "minus":
                c = rng.randint(0, value)
            result = {"plus": value + c, "minus": value - c, "times": value * c}[operation]
            reply = f"{spell(value)} {operation} {spell(c)} is {spell(result)}."
            slots = {"b": spell(c)}
            key = f"{value},{c}"
            made.append(
                ask(f"then_{operation}", key, slots, reply, (spell(result),), split, rng),
            )
            value = result
        return tuple(made)

    return Dialogue("follow_up_sum", until(turns))


# how a question is told back, by intent
_TOLD_BACK = {
    "capital": ("You asked for the capital of {country}.", "country"),
    "continent": ("You asked for the continent of {country}.", "country"),
    "opposite": ("You asked for the opposite of {word}.", "word"),
    "colour": ("You asked for the color of {thing}.", "thing"),
    "days_in_month": ("You asked for the days in {month}.", "month"),
    "animal_sound": ("You asked for the sound of {animal}.", "animal"),
    "plus": ("You asked for {a} plus {b}.", "a"),
    "minus": ("You asked for {a} minus {b}.", "a"),
    "times": ("You asked for {a} times {b}.", "a"),
}


def _what_did_i_ask(split: str, rng: Random) -> Dialogue:
    name = rng.choice(list(_TOLD_BACK))
    told, slot = _TOLD_BACK[name]

    def turns() -> tuple[Exchange | None, ...]:
        first = exchange(_BY_NAME[name], split, rng)
        answer = f"{first.slots['a']} {name} {first.slots['b']}" if slot == "a" else first.slots[slot]
        reply = told.format(**first.slots)
        key = ",".join(first.slots.values())
        return first, ask("asked", key, {}, reply, (answer.lower(),), split, rng)

    return Dialogue("what_did_i_ask", until(turns))


def _again(split: str, rng: Random) -> Dialogue:
    """ "Say it again": the reply before, word for word."""

    def turns() -> tuple[Exchange | None, ...]:
        first = exchange(pick(_BETWEEN, rng), split, rng)
        again = ask("again", first.reply, {}, first.reply, first.answers, split, rng)
        return first, again

    return Dialogue("again", until(turns))


@dataclass(frozen=True)
class _Told:
    """A fact that the user states (`tell_NAME` in the phrasings) and asks for later (`recall_NAME`)."""

    name: str
    values: Sequence[str]

    def told(self, value: str, split: str, rng: Random) -> Exchange | None:
        return self._turn(f"tell_{self.name}", value, {"x": value}, split, rng)

    def asked(self, value: str, split: str, rng: Random) -> Exchange | None:
        return self._turn(f"recall_{self.name}", value, {}, split, rng)

    def _turn(self, name: str, value: str, slots: dict[str, str], split: str, rng: Random) -> Exchange | None:
        (reply,) = PHRASINGS[name].replies
        return ask(name, value, slots, reply.format(x=value), (value.lower(),), split, rng)


_MEMORIES = (
    _Told("name", FIRST_NAMES),
    _Told("colour", ["red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey"]),
    _Told(
        "food",
        [
            "apples",
            "bread",
            "cheese",
            "chocolate",
            "fish",
            "honey",
            "noodles",
            "pizza",
            "rice",
            "salad",
            "soup",
            "cake",
        ],
    ),
    _Told("pet", ["cat", "dog", "horse", "rabbit", "parrot", "turtle", "mouse", "goat", "fish", "hamster"]),
    _Told(
        "thing",
        ["car", "bicycle", "boat", "house", "guitar", "piano", "garden", "watch", "camera", "hat", "tent", "kite"],
    ),
    _Told("city", tuple(capital for _, capital, _ in COUNTRIES)),
)


def _remember(split: str, rng: Random) -> Dialogue:
    """The user states a fact, possibly changes the subject, and asks for it."""
    memory = rng.choice(_MEMORIES)

    def turns() -> tuple[Exchange | None, ...]:
        value = rng.choice(memory.values)
        between = [exchange(pick(_BETWEEN, rng), split, rng) for _ in range(rng.choice((0, 0, 1, 2)))]
        return memory.told(value, split, rng), *between, memory.asked(value, split, rng)

    return Dialogue(f"remember_{memory.name}", until(turns))


def _remember_two(split: str, rng: Random) -> Dialogue:
    """The user states two facts and asks for one or both."""
    first, second = rng.sample(_MEMORIES, 2)

    def turns() -> tuple[Exchange | None, ...]:
        one, two = rng.choice(first.values), rng.choice(second.values)
        asked = [first.asked(one, split, rng), second.asked(two, split, rng)]
        if rng.random() < 0.6:
            asked = [rng.choice(asked)]
        rng.shuffle(asked)
        return first.told(one, split, rng), second.told(two, split, rng), *asked

    return Dialogue("remember_two", until(turns))


MEMORY_DIALOGUES: tuple[Conversing, ...] = (
    Conversing("follow_up_fact", 6.0, _next_entity),
    Conversing("follow_up_sum", 6.0, _go_on_with_sum),
    Conversing("what_did_i_ask", 3.0, _what_did_i_ask),
    Conversing("again", 3.0, _again),
    Conversing("remember", 6.0, _remember),
    Conversing("remember_two", 3.0, _remember_two),
)
