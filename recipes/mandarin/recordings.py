"""Questions and replies of the Mandarin recipe as WAV files, in the layout of LLaMA-Omni.

    python -m recipes.mandarin.recordings --out runs/mandarin/source --turns 4000 --test-turns 200

It writes `train.json`, which `duologue data import` reads, and `test.jsonl` with accepted answers. `texts.txt` has all
texts of the training. `questions/` and `replies/` hold the sound; a reply has its text beside it. espeak-ng speaks, and
pypinyin tells it how the characters sound. Recordings of people would lie in the same places.
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path
from random import Random

import soundfile
from pypinyin import Style, lazy_pinyin
from tqdm import tqdm

from duologue.training.pretrain import write_lines
from recipes.mandarin.questions import Question, questions
from recipes.pocket.synthesis import SAMPLE_RATE, Request, render

_LANGUAGE = "espeak-cmn-latn-pinyin"
REPLY_VOICE = f"{_LANGUAGE}+f2"
_VARIANTS = ("f1", "f2", "f3", "f5", "m1", "m2", "m3", "m4", "m6", "m7", "Annie", "linda")
VOICES = tuple(f"{_LANGUAGE}+{variant}" for variant in _VARIANTS)
UNSEEN_VOICES = (f"{_LANGUAGE}+f4", f"{_LANGUAGE}+m5")  # of the test alone
_RATE, _PITCH = (0.85, 1.15), (-3.0, 3.0)


def write_source(out: Path, num_turns: int, num_test: int, seed: int, workers: int) -> None:
    """Renders the questions of training and test with all replies.

    Args:
        num_test: new questions. Half as many of the training are asked again, by voices that it has not heard.
    """
    rng = Random(f"mandarin|{seed}")
    train = [_asked(question, VOICES, rng) for question in _drawn(questions(test=False), num_turns, rng, again=True)]
    test = [
        _asked(question, UNSEEN_VOICES if place % 2 else VOICES, rng)
        for place, question in enumerate(_drawn(questions(test=True), num_test, rng, again=False))
    ]
    known = _drawn(questions(test=False), num_test // 2, rng, again=True)
    test += [_asked(question, UNSEEN_VOICES, rng) for question in known]
    replies = sorted({question.reply for question, _ in train})
    requests = [request for _, request in chain(train, test)]
    paths = [f"questions/{place:05d}.wav" for place in range(len(requests))]
    requests += [Request(_pinyin(reply), REPLY_VOICE) for reply in replies]
    paths += [f"replies/{place:05d}.wav" for place in range(len(replies))]
    for folder in ("questions", "replies"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    rendered = render(requests, workers)
    for path, samples in tqdm(zip(paths, rendered, strict=True), total=len(paths), desc="Mandarin", unit="clip"):
        soundfile.write(out / path, samples, SAMPLE_RATE)
    spoken = dict(zip(replies, paths[len(train) + len(test) :], strict=True))
    for reply, path in spoken.items():
        (out / path).with_suffix(".txt").write_text(reply, encoding="utf-8")
    dialogues = [
        {
            "id": f"mandarin-{place:05d}",
            "conversation": [
                {"from": "human", "text": question.text, "speech": path},
                {"from": "gpt", "text": question.reply, "speech": spoken[question.reply]},
            ],
        }
        for place, ((question, _), path) in enumerate(zip(train, paths, strict=False))
    ]
    (out / "train.json").write_text(json.dumps(dialogues, ensure_ascii=False), encoding="utf-8")
    lines = [
        {
            "kind": question.kind,
            "new": place < num_test,
            "text": question.text,
            "answer": question.answer,
            "voice": request.voice,
            "wav": path,
        }
        for place, ((question, request), path) in enumerate(zip(test, paths[len(train) :], strict=False))
    ]
    write_lines(out / "test.jsonl", lines)
    texts = chain.from_iterable((question.text, question.reply) for question, _ in train)
    (out / "texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def _drawn(kinds: dict[str, list[Question]], count: int, rng: Random, again: bool) -> list[Question]:
    """Questions of all kinds in turn. A kind that is used up begins `again` or is left out."""
    left = {kind: rng.sample(found, len(found)) for kind, found in kinds.items()}
    drawn: list[Question] = []
    while len(drawn) < count and left:
        for kind in list(left)[: count - len(drawn)]:
            drawn.append(left[kind].pop())
            if not left[kind] and again:
                left[kind] = rng.sample(kinds[kind], len(kinds[kind]))
            elif not left[kind]:
                del left[kind]
    return drawn


def _asked(question: Question, voices: tuple[str, ...], rng: Random) -> tuple[Question, Request]:
    rate, pitch = round(rng.uniform(*_RATE), 3), round(rng.uniform(*_PITCH), 2)
    return question, Request(_pinyin(question.text), rng.choice(voices), rate, pitch, round(rng.uniform(-4.0, 3.0), 1))


def _pinyin(text: str) -> str:
    """Syllables with the number of their tone: "你好。" -> "ni3 hao3 。"."""
    return " ".join(lazy_pinyin(text, style=Style.TONE3, neutral_tone_with_five=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mandarin/source"))
    parser.add_argument("--turns", type=int, default=4000, help="questions of the training, each with its reply")
    parser.add_argument(
        "--test-turns", type=int, default=200, help="new questions of the test; half as many known ones"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes that synthesize")
    args = parser.parse_args()
    write_source(args.out, args.turns, args.test_turns, args.seed, args.workers)


if __name__ == "__main__":
    main()
