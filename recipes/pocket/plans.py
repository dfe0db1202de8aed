"""What is rendered: the sentences of free speech, the dialogues of the training and the questions of the test.

Everything here is text and choice of voices, drawn from a seed; `corpus.py` makes audio and files of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from recipes.pocket.curriculum import Asked, Conversing, Dialogue, sentence
from recipes.pocket.everything import KINDS, any_dialogue, dialogue
from recipes.pocket.repeating import free_text
from recipes.pocket.synthesis import (
    REPLY_VOICE,
    STYLES,
    TRAINING_VOICES,
    UNSEEN_VOICES,
    USER_VOICES,
    Request,
    Voice,
    reply_request,
)

VALID_ONE_IN = 50


@dataclass(frozen=True)
class PlannedClip:
    """One clip before it is rendered. `role` is user, reply or free."""

    request: Request
    role: str
    split: str
    intent: str
    style: str = "plain"


@dataclass(frozen=True)
class PlannedDialogue:
    """One dialogue before it is rendered: a user clip for each exchange, all by one voice."""

    dialogue: Dialogue
    split: str
    users: tuple[PlannedClip, ...]
    replies: tuple[PlannedClip, ...]


# (split, rng) -> the request of one speaker, whose text and level are set for each of the questions
DrawSpeaker = Callable[[str, Random], Request]


def program_speaker(split: str, rng: Random) -> Request:
    """A speaker of a program's voice: one of training, one that the test shares with it, or one of the test alone."""
    voices = {"test": USER_VOICES, "test_unseen": UNSEEN_VOICES}.get(split, TRAINING_VOICES)
    return Request("", *draw_manner(voices, rng))


def draw_manner(voices: tuple[Voice, ...], rng: Random) -> tuple[str, float, float]:
    """A voice by weight (held-out voices evenly), with the speed and the pitch in semitones it keeps."""
    weights = [voice.weight if not voice.held_out else 1.0 for voice in voices]
    voice = rng.choices(voices, weights)[0]
    return voice.id, round(rng.uniform(0.8, 1.25), 3), round(min(4.0, max(-4.0, rng.gauss(0.0, 1.7))), 2)


def plan_free(seed: int, shard: int) -> Iterator[PlannedClip]:
    """Endless single sentences of one shard: 40 % questions, 30 % free words, 30 % the reply voice.

    Half of the latter are free words, written as a reply repeats them: what the language model otherwise speaks worst.
    """
    rng = Random(f"free|{seed}|{shard}")
    while True:
        split = "valid" if rng.randrange(VALID_ONE_IN) == 0 else "train"
        chance = rng.random()
        if chance < 0.40:
            drawn = any_dialogue("train", rng)
            text = rng.choice(drawn.exchanges).user
            if text:  # a sound is not free speech
                yield PlannedClip(Request(text, *draw_manner(TRAINING_VOICES, rng)), "user", split, drawn.intent)
        elif chance < 0.70:
            text = sentence(free_text(rng)) + ("?" if rng.random() < 0.1 else ".")
            yield PlannedClip(Request(text, *draw_manner(TRAINING_VOICES, rng)), "free", split, "free")
        else:
            style = "plain" if rng.random() < 0.75 else rng.choice(list(STYLES))
            name, text = "free", sentence(f" {free_text(rng)}.")
            if rng.random() < 0.5:
                drawn = any_dialogue("train", rng)
                sentences = re.findall(r"[^.?!]+[.?!]", rng.choice(drawn.exchanges).reply)
                name, text = drawn.intent, sentence(rng.choice(sentences).strip())
            yield PlannedClip(reply_request(text, style), "reply", split, name, style)


def plan_dialogues(
    seed: int,
    shard: int,
    num_exchanges: int,
    speaker: DrawSpeaker = program_speaker,
    reply_voice: str = REPLY_VOICE.id,
) -> list[PlannedDialogue]:
    """The dialogues of one shard, until they have `num_exchanges` questions or a few more."""
    rng = Random(f"dialogues|{seed}|{shard}")
    planned: list[PlannedDialogue] = []
    made = 0
    while made < num_exchanges:
        split = "valid" if rng.randrange(VALID_ONE_IN) == 0 else "train"
        drawn = any_dialogue("train", rng)
        planned.append(_spoken(drawn, split, speaker(split, rng), reply_voice, rng))
        made += len(drawn.exchanges)
    return planned


def plan_test(
    seed: int,
    num_exchanges: int,
    speaker: DrawSpeaker = program_speaker,
    reply_voice: str = REPLY_VOICE.id,
    splits: Sequence[str] = ("test", "test_unseen"),
) -> list[PlannedDialogue]:
    """Questions over all kinds of dialogue, each once; the dialogues go round the splits, each with its speakers."""
    rng = Random(f"test|{seed}")
    # kinds of dialogue gather several intents each
    weights = [(4.0 + kind.weight) * (2 if isinstance(kind, Conversing) else 1) for kind in KINDS]
    total = sum(weights)
    planned: list[PlannedDialogue] = []
    asked: set[tuple[str, ...]] = set()
    for kind, weight in zip(KINDS, weights, strict=True):
        wanted, made, tries = num_exchanges * weight / total, 0, 0
        while made < wanted and tries < 200:
            tries += 1
            drawn = dialogue(kind, "test", rng)
            questions = tuple(turn.user or f"{turn.sound} {tries}" for turn in drawn.exchanges)
            if questions in asked:
                continue
            asked.add(questions)
            split = splits[len(planned) % len(splits)]
            request = speaker(split, rng)
            request = replace(request, level=round(rng.uniform(-4.0, 3.0), 1))
            planned.append(_spoken(drawn, split, request, reply_voice, rng))
            made += len(drawn.exchanges)
    return planned


def used_pairs(planned: list[PlannedDialogue]) -> set[Asked]:
    """The (intent, item, phrasing) triples that the dialogues speak about an item."""
    return {asked for one in planned for turn in one.dialogue.exchanges for asked in turn.asked if asked.key}


def _spoken(drawn: Dialogue, split: str, speaker: Request, reply_voice: str, rng: Random) -> PlannedDialogue:
    users, replies = [], []
    for index, turn in enumerate(drawn.exchanges):
        if turn.sound:
            request = Request("", f"sound-{turn.sound}", seed=rng.randrange(2**31))
        else:
            request = replace(speaker, text=turn.user, seed=speaker.seed + index if speaker.seed else 0)
        users.append(PlannedClip(request, "user", split, drawn.intent))
        reply = reply_request(turn.reply, turn.style, reply_voice)
        replies.append(PlannedClip(reply, "reply", split, drawn.intent, turn.style))
    return PlannedDialogue(drawn, split, tuple(users), tuple(replies))
