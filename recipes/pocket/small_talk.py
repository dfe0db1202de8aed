"""Small talk, questions outside the curriculum, and sounds without speech."""

from __future__ import annotations

from random import Random

from recipes.pocket.curriculum import Intent, Item
from recipes.pocket.words import FIRST_NAMES, NOUNS


def _nothing(rng: Random) -> Item:
    del rng
    return Item("", {})


SMALL_TALK_INTENTS: tuple[Intent, ...] = (
    Intent("greeting", 1.0, _nothing),
    Intent("good_morning", 0.6, _nothing),
    Intent("good_evening", 0.6, _nothing),
    Intent("who_are_you", 1.5, _nothing),
    Intent("how_are_you", 1.0, _nothing),
    Intent("user_is_well", 0.6, _nothing),
    Intent("thanks", 1.0, _nothing),
    Intent("goodbye", 1.0, _nothing),
    Intent("help", 1.0, _nothing),
    Intent("are_you_human", 0.7, _nothing),
    Intent("praise", 0.5, _nothing),
    Intent("apology", 0.5, _nothing),
)


def _outside(rng: Random) -> Item:
    # No key: each phrasing uses some of the slots only, so no pair could be told from another; phrasings are held out.
    thing, other = rng.choice(NOUNS), rng.choice(NOUNS)
    name, second = rng.choice(FIRST_NAMES), rng.choice(FIRST_NAMES)
    return Item("", {"thing": thing, "other": other, "name": name, "second": second})


OUTSIDE_INTENTS: tuple[Intent, ...] = (
    Intent("unknown", 4.0, _outside),
    Intent("fragment", 1.0, _outside),
)

SOUND_REPLIES = ("Sorry, I did not hear you.", "Sorry, I could not understand that.")
