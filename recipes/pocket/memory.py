"""Memory over turns: follow-ups that need the turn before, and things told earlier."""

from __future__ import annotations

from random import Random

from recipes.pocket.curriculum import Conversing, Dialogue, Exchange, Intent, ask, exchange, pick, until
from recipes.pocket.facts import COUNTRIES, OPPOSITES
from recipes.pocket.manners import MANNERS_INTENTS
from recipes.pocket.numbers import NUMBER_INTENTS, spell
from recipes.pocket.questions import FACT_INTENTS
from recipes.pocket.words import FIRST_NAMES

_BY_NAME = {intent.name: intent for intent in FACT_INTENTS + NUMBER_INTENTS}
# What may stand between a thing told and the question for it.
_BETWEEN: tuple[Intent, ...] = FACT_INTENTS + NUMBER_INTENTS[:5] + MANNERS_INTENTS[:1]

_AND = (
    "and {x}?",
    "what about {x}?",
    "and what about {x}?",
    "how about {x}?",
    "and how about {x}?",
    "okay, and {x}?",
    "and for {x}?",
)
_AND_TEST = ("and now {x}?", "and the same for {x}?", "{x} as well?")


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
            made.append(
                ask(f"and_{name}", entity, _AND, _AND_TEST, {"x": entity}, reply, (answer.lower(),), split, rng)
            )
        return tuple(made)

    return Dialogue("follow_up_fact", until(turns))


_THEN = {
    "plus": (
        ("plus {b}?", "and plus {b}?", "plus {b} more?", "now add {b}.", "and {b} more?", "add {b} to that."),
        ("then add {b}.", "plus another {b}?"),
    ),
    "minus": (
        ("minus {b}?", "and minus {b}?", "now subtract {b}.", "less {b}?", "take {b} from that.", "now minus {b}?"),
        ("then subtract {b}.", "take away {b} now."),
    ),
    "times": (
        (
            "times {b}?",
            "and times {b}?",
            "now multiply by {b}.",
            "multiply that by {b}.",
            "now times {b}?",
            "{b} times?",
        ),
        ("then multiply by {b}.", "multiplied by {b}?"),
    ),
}


def _go_on_with_sum(split: str, rng: Random) -> Dialogue:
    """ "What is three plus four?" "Seven." "Times two?" "Seven times two is fourteen." """

    def turns() -> tuple[Exchange | None, ...]:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        value = a + b
        item_key = f"{min(a, b)},{max(a, b)}"
        plus = _BY_NAME["plus"]
        slots = {"a": spell(a), "b": spell(b)}
        reply = f"{spell(a)} plus {spell(b)} is {spell(value)}."
        made = [
            ask("plus", item_key, plus.phrasings, plus.test_phrasings, slots, reply, (spell(value),), split, rng),
        ]
        for _ in range(rng.choice((1, 1, 2))):
            operations = ["plus"] if value > 20 else ["plus", "minus", "times"]
            operation = rng.choice(operations)
            c = rng.randint(1, 5 if operation == "times" else 10)
            if operation == "minus":
                c = rng.randint(0, value)
            result = {"plus": value + c, "minus": value - c, "times": value * c}[operation]
            reply = f"{spell(value)} {operation} {spell(c)} is {spell(result)}."
            phrasings, tests = _THEN[operation]
            slots = {"b": spell(c)}
            key = f"{value},{c}"
            made.append(
                ask(f"then_{operation}", key, phrasings, tests, slots, reply, (spell(result),), split, rng),
            )
            value = result
        return tuple(made)

    return Dialogue("follow_up_sum", until(turns))


_WHAT_ASKED = (
    "what did i just ask?",
    "what did i ask?",
    "what was my question?",
    "what did i just ask you?",
    "can you tell me what i just asked?",
    "do you remember my question?",
    "what was my last question?",
)
_WHAT_ASKED_TEST = ("which question did i just ask?", "tell me again what i asked you.")
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
        return first, ask("asked", key, _WHAT_ASKED, _WHAT_ASKED_TEST, {}, reply, (answer.lower(),), split, rng)

    return Dialogue("what_did_i_ask", until(turns))


_AGAIN = (
    "say it again.",
    "please say it again.",
    "can you repeat that?",
    "repeat that, please.",
    "say that again, please.",
    "what did you say?",
    "once more, please.",
)
_AGAIN_TEST = ("could you say that once more?", "i did not hear that, say it again.")


def _again(split: str, rng: Random) -> Dialogue:
    """ "Say it again": the reply before, word for word."""

    def turns() -> tuple[Exchange | None, ...]:
        first = exchange(pick(_BETWEEN, rng), split, rng)
        again = ask("again", first.reply, _AGAIN, _AGAIN_TEST, {}, first.reply, first.answers, split, rng)
        return first, again

    return Dialogue("again", until(turns))


# (what is told, phrasings of telling, test ones, reply, phrasings of asking, test ones, reply, values)
_COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey")
_FOODS = (
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
)
_PETS = ("cat", "dog", "horse", "rabbit", "parrot", "turtle", "mouse", "goat", "fish", "hamster")
_CITIES = tuple(capital for _, capital, _ in COUNTRIES)
_THINGS = ("car", "bicycle", "boat", "house", "guitar", "piano", "garden", "watch", "camera", "hat", "tent", "kite")


class _Told:
    """A thing that the user tells and asks for later."""

    def __init__(
        self,
        name: str,
        values: tuple[str, ...],
        tell: tuple[tuple[str, ...], tuple[str, ...], str],
        recall: tuple[tuple[str, ...], tuple[str, ...], str],
    ) -> None:
        self.name, self.values, self.tell, self.recall = name, values, tell, recall

    def told(self, value: str, split: str, rng: Random) -> Exchange | None:
        phrasings, tests, reply = self.tell
        slots = {"x": value}
        answers = (value.lower(),)
        return ask(f"tell_{self.name}", value, phrasings, tests, slots, reply.format(x=value), answers, split, rng)

    def asked(self, value: str, split: str, rng: Random) -> Exchange | None:
        phrasings, tests, reply = self.recall
        answers = (value.lower(),)
        return ask(f"recall_{self.name}", value, phrasings, tests, {}, reply.format(x=value), answers, split, rng)


_MEMORIES = (
    _Told(
        "name",
        FIRST_NAMES,
        (
            (
                "my name is {x}.",
                "i am {x}.",
                "i'm {x}.",
                "hello, my name is {x}.",
                "hi, i am {x}.",
                "you can call me {x}.",
                "people call me {x}.",
            ),
            ("hello there, i'm called {x}.", "the name is {x}."),
            "Nice to meet you, {x}.",
        ),
        (
            (
                "what is my name?",
                "what's my name?",
                "do you remember my name?",
                "who am i?",
                "can you tell me my name?",
                "do you know my name?",
            ),
            ("what did i say my name was?", "say my name."),
            "Your name is {x}.",
        ),
    ),
    _Told(
        "colour",
        _COLOURS,
        (
            (
                "my favorite color is {x}.",
                "i like the color {x}.",
                "the color i like best is {x}.",
                "i love {x}, it is my favorite color.",
                "{x} is my favorite color.",
                "i think {x} is the best color.",
            ),
            ("of all colors i like {x} most.", "my best color is {x}."),
            "I see, your favorite color is {x}.",
        ),
        (
            (
                "what is my favorite color?",
                "what's my favorite color?",
                "which color do i like?",
                "do you remember my favorite color?",
                "what color do i like best?",
                "tell me my favorite color.",
            ),
            ("which color did i say i like?", "can you recall my favorite color?"),
            "Your favorite color is {x}.",
        ),
    ),
    _Told(
        "food",
        _FOODS,
        (
            (
                "i like to eat {x}.",
                "my favorite food is {x}.",
                "i love {x}.",
                "i really like {x}.",
                "the food i like best is {x}.",
                "i eat {x} every day.",
            ),
            ("nothing tastes better than {x}.", "i could eat {x} all day."),
            "I see, you like {x}.",
        ),
        (
            (
                "what do i like to eat?",
                "what is my favorite food?",
                "what's my favorite food?",
                "do you remember what i like to eat?",
                "which food do i like?",
                "tell me my favorite food.",
            ),
            ("what did i say i like to eat?", "can you recall my favorite food?"),
            "You like {x}.",
        ),
    ),
    _Told(
        "pet",
        _PETS,
        (
            (
                "i have a {x}.",
                "my pet is a {x}.",
                "i have a little {x}.",
                "i've got a {x}.",
                "we have a {x} at home.",
                "there is a {x} in my house.",
            ),
            ("i own a {x}.", "a {x} lives with me."),
            "How nice, you have a {x}.",
        ),
        (
            (
                "which animal do i have?",
                "what animal do i have?",
                "what pet do i have?",
                "do you remember my pet?",
                "what is my pet?",
                "tell me which pet i have.",
            ),
            ("which pet did i say i have?", "what kind of animal is my pet?"),
            "You have a {x}.",
        ),
    ),
    _Told(
        "thing",
        _THINGS,
        (
            (
                "i bought a {x}.",
                "i have a new {x}.",
                "yesterday i bought a {x}.",
                "i just got a new {x}.",
                "i bought myself a {x} today.",
                "look, i have a new {x}.",
            ),
            ("i went out and bought a {x}.", "today i got a {x}."),
            "How nice, a new {x}.",
        ),
        (
            (
                "what did i buy?",
                "what have i bought?",
                "do you remember what i bought?",
                "what is my new thing?",
                "can you tell me what i bought?",
                "which thing did i buy?",
            ),
            ("what did i say i bought?", "do you still know what i bought?"),
            "You bought a {x}.",
        ),
    ),
    _Told(
        "city",
        _CITIES,
        (
            (
                "i live in {x}.",
                "my home is in {x}.",
                "i am from {x}.",
                "i come from {x}.",
                "i'm living in {x}.",
                "my house is in {x}.",
            ),
            ("the city i live in is {x}.", "i moved to {x}."),
            "{x} is a nice place.",
        ),
        (
            (
                "where do i live?",
                "which city do i live in?",
                "where is my home?",
                "do you remember where i live?",
                "what city do i live in?",
                "can you tell me where i live?",
            ),
            ("where did i say i live?", "in which city is my home?"),
            "You live in {x}.",
        ),
    ),
)


def _remember(split: str, rng: Random) -> Dialogue:
    """Tell something, perhaps talk of another thing, ask for it."""
    memory = rng.choice(_MEMORIES)

    def turns() -> tuple[Exchange | None, ...]:
        value = rng.choice(memory.values)
        between = [exchange(pick(_BETWEEN, rng), split, rng) for _ in range(rng.choice((0, 0, 1, 2)))]
        return memory.told(value, split, rng), *between, memory.asked(value, split, rng)

    return Dialogue(f"remember_{memory.name}", until(turns))


def _remember_two(split: str, rng: Random) -> Dialogue:
    """Tell two things, ask for one or both."""
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
