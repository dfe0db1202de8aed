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

_STYLES = ("faster", "slower", "higher", "lower", "louder", "softer")
_SECOND = ("faster", "slower", "higher", "lower")  # styles with an "even" step

# What is said in a style: commands that read well with an adverb behind them, and short answers to say again.
_COMMANDS: tuple[Intent, ...] = tuple(
    intent for intent in NUMBER_INTENTS + REPEAT_INTENTS if intent.name in ("count", "count_to", "say")
)
_SPOKEN: tuple[Intent, ...] = FACT_INTENTS + NUMBER_INTENTS + REPEAT_INTENTS


def _command_in_style(split: str, rng: Random) -> Dialogue:
    """ "Count to five slowly." """
    style = rng.choice(_STYLES)

    def turns() -> tuple[Exchange | None, ...]:
        intent = rng.choice(_COMMANDS)
        item = intent.draw(rng)
        phrasing = choose_phrasing(intent.name, item.key, split, rng)
        adverb = choose_phrasing(f"in_{style}", item.key, split, rng)
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
    style = rng.choice(_STYLES)

    def turns() -> tuple[Exchange | None, ...]:
        first = exchange(pick(_SPOKEN, rng), split, rng)
        key = first.reply
        name = f"again_{style}"
        slots = {"x": style}
        made: list[Exchange | None] = [
            first,
            ask(name, key, slots, first.reply, first.answers, split, rng, style),
        ]
        if style in _SECOND and rng.random() < 0.5:
            twice = f"{style}2"
            made.append(ask(f"even_{style}", key, slots, first.reply, first.answers, split, rng, twice))
        return tuple(made)

    return Dialogue(f"again_{style}", until(turns))


STYLE_DIALOGUES: tuple[Conversing, ...] = (
    Conversing("command_in_style", 6.0, _command_in_style),
    Conversing("again_in_style", 8.0, _again_in_style),
)
