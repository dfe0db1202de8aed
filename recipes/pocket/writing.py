"""Pocket's written training data: the facts of the curriculum as statements in every direction, and dialogues as text.

Written data may use every pair of an item and a phrasing; the test holds out only spoken pairs.

    python -m recipes.pocket.writing --out FOLDER --dialogues 150000 --seed 1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from recipes.pocket.curriculum import Dialogue, Intent, exchange, pick
from recipes.pocket.everything import any_dialogue, facts
from recipes.pocket.numbers import NUMBER_INTENTS
from recipes.pocket.repeating import REPEAT_INTENTS

VALID_ONE_IN = 50
# Copying words and calculating need the most practice, and a written example is a third as long as one that is heard.
PRACTICE: tuple[tuple[float, tuple[Intent, ...]], ...] = ((0.25, REPEAT_INTENTS), (0.25, NUMBER_INTENTS))


def write_facts(folder: Path) -> None:
    """`facts.txt`, one statement a line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.txt").write_text("\n".join(facts()) + "\n", encoding="utf-8")


def write_dialogues(folder: Path, count: int, seed: int) -> None:
    """`dialogues-00000.jsonl` as the audio corpus has it, without clips."""
    rng = Random(f"writing|{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "dialogues-00000.jsonl").open("w", encoding="utf-8") as file:
        number = 0
        while number < count:
            drawn = _draw(rng)
            if any(not turn.user for turn in drawn.exchanges):  # a sound cannot be written
                continue
            turns: list[dict[str, object]] = []
            for turn in drawn.exchanges:
                turns.append({"role": "user", "text": turn.user})
                said = {"role": "assistant", "text": turn.reply, "style": turn.style}
                turns.append({**said, "answers": list(turn.answers)})
            split = "valid" if rng.randrange(VALID_ONE_IN) == 0 else "train"
            row = {"id": f"writing-{number:06d}", "intent": drawn.intent, "split": split, "language": "en"}
            file.write(json.dumps({**row, "turns": turns}) + "\n")
            number += 1


def _draw(rng: Random) -> Dialogue:
    chance = rng.random()
    for share, intents in PRACTICE:
        if chance < share:
            intent = pick(intents, rng)
            return Dialogue(intent.name, (exchange(intent, "text", rng),))
        chance -= share
    return any_dialogue("text", rng)


def main(argv: list[str] | None = None) -> None:
    """Command line of the writing."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pocket.writing", description="Write what pocket reads.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dialogues", type=int, default=150000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    write_dialogues(args.out, args.dialogues, args.seed)
    write_facts(args.out)  # last: its file says that all is there


if __name__ == "__main__":
    main()
