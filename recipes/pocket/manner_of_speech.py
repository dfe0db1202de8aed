"""Style on request: faster, slower, higher, lower, louder, softer, alone or as a follow-up."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from recipes.pocket.curriculum import (
    Conversing,
    Dialogue,
    Exchange,
    Intent,
    ask,
    choose_phrasing,
    complete,
    exchange,
    pick,
    until,
)
from recipes.pocket.numbers import NUMBER_INTENTS
from recipes.pocket.questions import FACT_INTENTS
from recipes.pocket.repeating import REPEAT_INTENTS

# style -> how it is asked for together with a command
_ADVERBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "faster": (
        ("quickly", "fast", "very fast", "quickly please", "as fast as you can", "in a fast voice"),
        ("rapidly",),
    ),
    "slower": (
        ("slowly", "very slowly", "slowly please", "in a slow voice", "nice and slowly", "slow"),
        ("at a slow pace",),
    ),
    "higher": (
        ("in a high voice", "with a high voice", "in a very high voice", "high"),
        ("with a voice that is high",),
    ),
    "lower": (("in a low voice", "with a low voice", "in a deep voice", "low"), ("with a voice that is deep",)),
    "louder": (
        ("loudly", "in a loud voice", "with a loud voice", "very loudly", "loud"),
        ("at the top of your voice",),
    ),
    "softer": (("softly", "quietly", "in a soft voice", "very quietly", "in a quiet voice"), ("with a quiet voice",)),
}
_SECOND = ("faster", "slower", "higher", "lower")  # styles with an "even" step

_AGAIN_IN_STYLE = (
    "say it again {x}.",
    "say that again {x}.",
    "please say it again {x}.",
    "can you say that {x}?",
    "{x}, please.",
    "now {x}.",
    "repeat that {x}.",
)
_AGAIN_IN_STYLE_TEST = ("could you repeat it {x}?", "once more, but {x}.")
_EVEN = (
    "even {x}.",
    "even {x}, please.",
    "now even {x}.",
    "say it even {x}.",
    "can you say it even {x}?",
    "still {x}.",
)
_EVEN_TEST = ("and even {x} than that?", "a bit {x} again.")

# What is said in a style: commands that read well with an adverb behind them, and short answers to say again.
_COMMANDS: tuple[Intent, ...] = tuple(
    intent for intent in NUMBER_INTENTS + REPEAT_INTENTS if intent.name in ("count", "count_to", "say")
)
_SPOKEN: tuple[Intent, ...] = FACT_INTENTS + NUMBER_INTENTS + REPEAT_INTENTS


def _command_in_style(split: str, rng: Random) -> Dialogue:
    """ "Count to five slowly." """
    style = rng.choice(list(_ADVERBS))
    train, test = _ADVERBS[style]

    def turns() -> tuple[Exchange | None, ...]:
        intent = rng.choice(_COMMANDS)
        item = intent.draw(rng)
        phrasing = choose_phrasing(intent.name, item.key, intent.phrasings, intent.test_phrasings, split, rng)
        adverb = choose_phrasing(f"in_{style}", item.key, train, test, split, rng)
        if phrasing is None or adverb is None:
            return (None,)
        plain = complete(replace(intent, decorate=False), item, phrasing, rng)
        user = f"{plain.user[:-1]} {adverb}{plain.user[-1]}"
        if intent.name == "say":  # the words and the way of saying them must be kept apart
            user = f"{plain.user[:-1]}, {adverb}{plain.user[-1]}"
        return (replace(plain, user=user, style=style),)

    return Dialogue(f"style_{style}", until(turns))


def _again_in_style(split: str, rng: Random) -> Dialogue:
    """ "Say it again faster." "Even faster!" """
    style = rng.choice(list(_ADVERBS))

    def turns() -> tuple[Exchange | None, ...]:
        first = exchange(pick(_SPOKEN, rng), split, rng)
        key = first.reply
        name = f"again_{style}"
        slots = {"x": style}
        made: list[Exchange | None] = [
            first,
            ask(name, key, _AGAIN_IN_STYLE, _AGAIN_IN_STYLE_TEST, slots, first.reply, first.answers, split, rng, style),
        ]
        if style in _SECOND and rng.random() < 0.5:
            twice = f"{style}2"
            made.append(
                ask(f"even_{style}", key, _EVEN, _EVEN_TEST, slots, first.reply, first.answers, split, rng, twice)
            )
        return tuple(made)

    return Dialogue(f"again_{style}", until(turns))


STYLE_DIALOGUES: tuple[Conversing, ...] = (
    Conversing("command_in_style", 6.0, _command_in_style),
    Conversing("again_in_style", 8.0, _again_in_style),
)
