"""The shape of the curriculum: intents, their phrasings, and the split that keeps the test honest.

An `Intent` has phrasings of a question about items (an entity, operands, a word sequence), and replies. Only this
module decides how a spoken sentence may be used. A phrasing marked for testing is never spoken in training. Neither is
a pair (item, training phrasing) that the hash of both holds out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from recipes.pocket.phrasings import PHRASINGS, Phrasings

HELD_OUT_ONE_IN = 10  # pairs of (item, training phrasing) that only the test set may speak


@dataclass(frozen=True)
class Item:
    """What a question is about. `key` names it in the split ("" = no entity: only phrasings are held out)."""

    key: str
    slots: dict[str, str]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a spoken sentence uses of the split: the phrasing of an intent about one item."""

    intent: str
    key: str
    phrasing: str


@dataclass(frozen=True)
class Exchange:
    """One question and its answer, as text. `answers` are accepted normalized key answers; `style` is of the reply."""

    user: str
    reply: str
    answers: tuple[str, ...]
    style: str = "plain"
    sound: str = ""  # when set, the user makes this sound (silence, noise, ...) and `user` is empty
    asked: tuple[Asked, ...] = ()
    slots: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Dialogue:
    """Exchanges in order, all by one user."""

    intent: str
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True)
class Intent:
    """One kind of question. Its wordings are in `PHRASINGS` under its name.

    `decorate` allows polite forms and fillers around the phrasing.
    """

    name: str
    weight: float
    draw: Callable[[Random], Item]
    decorate: bool = True

    @property
    def phrasings(self) -> Phrasings:
        """Its wordings."""
        return PHRASINGS[self.name]


_BEFORE = ("um, ", "uh, ", "so, ", "well, ", "hey, ", "okay, ", "please tell me, ", "tell me, ", "excuse me, ", "now, ")
_AFTER = (", please", " please", ", do you know", ", if you can")


def held_out(intent: str, key: str, phrasing: str) -> bool:
    """Whether a (item, phrasing) pair is reserved for the test set; a pure function of the three."""
    if not key:
        return False
    digest = hashlib.blake2b(f"{intent}|{key}|{phrasing}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def choose_phrasing(name: str, key: str, split: str, rng: Random) -> str | None:
    """A phrasing of `PHRASINGS[name]` that a split may use about the item `key`; None when there is none.

    "train" is spoken training, and "test" is never spoken in training. "text" is written training. Stage 1 has every
    fact as text, so only the test phrasings are kept from it.
    """
    phrasings = PHRASINGS[name]
    known = (*phrasings.train, *phrasings.wider)
    if split == "train":
        allowed = [p for p in known if not held_out(name, key, p)]
    elif split == "test":
        allowed = [p for p in phrasings.train if held_out(name, key, p)] + list(phrasings.test)
    elif split == "text":
        allowed = list(known)
    else:
        raise ValueError(f"unknown split {split!r}; the splits are train, test and text")
    return rng.choice(allowed) if allowed else None


def decorated(text: str, rng: Random) -> str:
    """The question with a filler or a polite form around it, one time in three."""
    if rng.random() < 0.2:
        text = rng.choice(_BEFORE) + text
    if rng.random() < 0.15 and text.endswith("?"):
        text = text[:-1] + rng.choice(_AFTER) + "?"
    return text


def sentence(text: str) -> str:
    """The text with a capital first letter and a capital "I"."""
    return re.sub(r"\bi\b", "I", text[:1].upper() + text[1:])


def exchange(intent: Intent, split: str, rng: Random) -> Exchange:
    """Draws one question of the intent and its answer for a split."""
    while True:
        item = intent.draw(rng)
        phrasing = choose_phrasing(intent.name, item.key, split, rng)
        if phrasing is not None:
            break
    return complete(intent, item, phrasing, rng)


def complete(intent: Intent, item: Item, phrasing: str, rng: Random) -> Exchange:
    """The exchange that asks about the item with the phrasing."""
    user = phrasing.format(**item.slots)
    if intent.decorate:
        user = decorated(user, rng)
    reply = rng.choice(intent.phrasings.replies).format(**item.slots)
    asked = Asked(intent.name, item.key, phrasing)
    return Exchange(
        sentence(user), sentence(reply), item.answers or intent.phrasings.answers, asked=(asked,), slots=item.slots
    )


@dataclass(frozen=True)
class Conversing:
    """A kind of dialogue with several turns: `make` draws one for a split."""

    name: str
    weight: float
    make: Callable[[str, Random], Dialogue]


def ask(
    name: str,
    key: str,
    slots: dict[str, str],
    reply: str,
    answers: tuple[str, ...],
    split: str,
    rng: Random,
    style: str = "plain",
) -> Exchange | None:
    """A turn inside a dialogue; None when the split has no phrasing left for this item, and another must be drawn."""
    phrasing = choose_phrasing(name, key, split, rng)
    if phrasing is None:
        return None
    asked = (Asked(name, key, phrasing),)
    return Exchange(sentence(phrasing.format(**slots)), sentence(reply), answers, style, asked=asked, slots=slots)


def until(make: Callable[[], tuple[Exchange | None, ...]]) -> tuple[Exchange, ...]:
    """Draws turns until the split allows all of them."""
    while True:
        turns = make()
        complete_turns = tuple(turn for turn in turns if turn is not None)
        if len(complete_turns) == len(turns):
            return complete_turns


def pick(intents: Sequence[Intent], rng: Random) -> Intent:
    """An intent drawn by weight."""
    return rng.choices(intents, [intent.weight for intent in intents])[0]
