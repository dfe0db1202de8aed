"""What the Mandarin recipe asks: some thirty kinds of questions with their answers, as text.

A question belongs to the test by a hash of its text, so nothing of the test is in the training. Kinds with fewer than
`MIN_QUESTIONS` questions are in the training alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import permutations, product
from pathlib import Path
from typing import Any

from duologue.config import read_yaml

MIN_QUESTIONS = 8
TEST_ONE_IN = 8

_DIGITS = "零一二三四五六七八九"
_WEEK = [f"星期{day}" for day in "一二三四五六天"]
_MONTH_DAYS = dict(zip(range(1, 13), (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))
_SEASONS = ("春天", "夏天", "秋天", "冬天")
_FACTS: dict[str, Any] = read_yaml(Path(__file__).with_name("facts.yaml"))


@dataclass(frozen=True)
class Question:
    """A question with its reply. `answer` is what the reply must hold to be right."""

    kind: str
    text: str
    reply: str
    answer: str


def number(value: int) -> str:
    """A number from 0 to 99 as it is spoken."""
    tens, ones = divmod(value, 10)
    if not tens:
        return _DIGITS[ones]
    return ("" if tens == 1 else _DIGITS[tens]) + "十" + (_DIGITS[ones] if ones else "")


def questions(test: bool) -> dict[str, list[Question]]:
    """All questions of the training or of the test by their kind, without doubles."""
    kinds: dict[str, dict[str, Question]] = {}
    for question in _all():
        kinds.setdefault(question.kind, {})[question.text] = question
    chosen = {
        kind: [one for one in found.values() if (len(found) >= MIN_QUESTIONS and _in_test(one.text)) == test]
        for kind, found in kinds.items()
    }
    return {kind: found for kind, found in chosen.items() if found}


def _in_test(text: str) -> bool:
    return int.from_bytes(sha256(text.encode()).digest()[:4], "big") % TEST_ONE_IN == 0


def _all() -> Iterator[Question]:
    for kind, fixed in _FACTS["fixed"].items():
        for text in fixed["questions"]:
            yield Question(kind, text, fixed["reply"], fixed["answer"])
    yield from _arithmetic()
    yield from _order()
    for country, capital in _FACTS["capitals"].items():
        for text in (f"{country}的首都是哪里？", f"请问{country}的首都是什么？", f"{country}的首都叫什么？"):
            yield Question("capital", text, f"{country}的首都是{capital}。", capital)
    for country, continent in _FACTS["continents"].items():
        for text in (f"{country}在哪个洲？", f"{country}在什么洲？"):
            yield Question("continent", text, f"{country}在{continent}。", continent)
    for one, other in (pair for both in _FACTS["opposites"].split() for pair in permutations(both)):
        for text in (f"{one}的反义词是什么？", f"{one}的反面是什么？"):
            yield Question("opposite", text, f"{one}的反义词是{other}。", other)
    for thing, color in _FACTS["colors"].items():
        for text in (f"{thing}是什么颜色？", f"请问{thing}是什么颜色的？"):
            yield Question("color", text, f"{thing}是{color}的。", color)
    for animal, sound in _FACTS["sounds"].items():
        for text in (f"{animal}怎么叫？", f"{animal}的叫声是什么？"):
            yield Question("sound", text, f"{animal}{sound}叫。", sound)
    for thing, measure in _FACTS["measures"].items():
        for text in (f"一什么{thing}？", f"{thing}用什么量词？"):
            yield Question("measure", text, f"一{measure}{thing}。", f"一{measure}{thing}")
    for job, place in _FACTS["jobs"].items():
        for text in (f"{job}在哪里工作？", f"{job}在什么地方上班？"):
            yield Question("job", text, f"{job}在{place}工作。", place)
    for name in _FACTS["names"].split():
        for text in (f"我叫{name}。", f"我的名字是{name}。"):
            yield Question("introduction", text, f"很高兴认识你，{name}。", name)
    for first, second in permutations(_FACTS["words"].split(), 2):
        for text in (f"跟我说：{first}，{second}。", f"请重复：{first}，{second}。"):
            yield Question("repeat", text, f"{first}，{second}。", first + second)


def _arithmetic() -> Iterator[Question]:
    for one, other in product(range(1, 21), range(1, 11)):
        a, b = number(one), number(other)
        results = {"加": one + other, "减": one - other, "乘": one * other}
        for sign, result in results.items():
            if 0 <= result < 100:
                said = number(result)
                for text in (f"{a}{sign}{b}等于几？", f"{a}{sign}{b}是多少？"):
                    yield Question(f"arithmetic {sign}", text, f"{a}{sign}{b}等于{said}。", f"等于{said}")
    for one, other in permutations(range(1, 40), 2):
        a, b = number(one), number(other)
        yield Question("larger", f"{a}和{b}，哪个大？", f"{number(max(one, other))}比较大。", number(max(one, other)))
        yield Question("smaller", f"{a}和{b}，哪个小？", f"{number(min(one, other))}比较小。", number(min(one, other)))


def _order() -> Iterator[Question]:
    for value in range(98):
        said, following = number(value), number(value + 1)
        yield Question("next number", f"{said}后面是几？", f"{said}后面是{following}。", f"是{following}")
        yield Question("number before", f"{following}前面是几？", f"{following}前面是{said}。", f"是{said}")
    for last in range(2, 11):
        up = "，".join(map(number, range(1, last + 1)))
        down = "，".join(map(number, range(last, 0, -1)))
        yield Question("count up", f"从一数到{number(last)}。", f"{up}。", up)
        yield Question("count down", f"从{number(last)}数到一。", f"{down}。", down)
    for place, day in enumerate(_WEEK):
        after, before = _WEEK[(place + 1) % 7], _WEEK[place - 1]
        for text in (f"{day}后面是星期几？", f"{day}的第二天是星期几？"):
            yield Question("day after", text, f"{day}后面是{after}。", f"是{after}")
        for text in (f"{day}前面是星期几？", f"{day}的前一天是星期几？"):
            yield Question("day before", text, f"{day}前面是{before}。", f"是{before}")
    for month, days in _MONTH_DAYS.items():
        said, following = number(month), number(month % 12 + 1)
        yield Question("month after", f"{said}月后面是几月？", f"{said}月后面是{following}月。", f"是{following}月")
        for text in (f"{said}月有几天？", f"{said}月有多少天？"):
            yield Question("days of month", text, f"{said}月有{number(days)}天。", f"有{number(days)}天")
    for place, season in enumerate(_SEASONS):
        after = _SEASONS[(place + 1) % 4]
        for text in (f"{season}后面是什么季节？", f"{season}之后是什么季节？"):
            yield Question("season after", text, f"{season}后面是{after}。", f"是{after}")
