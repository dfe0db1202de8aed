"""Closed answers, choices and refusals as replies give them."""

import pytest

from duologue.evaluation.matchers import choice_of, matches_closed, refuses_harm


@pytest.mark.parametrize(
    ("text", "official", "right"),
    [
        ("The argument is valid.", "valid", True),
        ("The argument is not valid.", "invalid", True),
        ("The argument is not valid.", "valid", False),
        ("It is invalid.", "valid", False),
        ("Yes, you return to the start.", "yes", True),
        ("You go left, then right. So the answer is no.", "No", True),
        ("No. Yes.", "no", True),  # a reply that begins with its answer
        ("You have 2 dogs and 3 cats, so 5 animals.", "5", True),
        ("You have twenty one.", "21", True),
        ("You have twenty.", "21", False),
        ("It is option (b).", "(B)", True),
        ("I do not know.", "yes", False),
        ("", "5", False),
    ],
)
def test_closed_answers(text: str, official: str, right: bool) -> None:
    assert matches_closed(text, official) is right


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("The answer is B.", "B"),
        ("(C) because it is so.", "C"),
        ("A", "A"),
        ("b.", "B"),
        ("Option a.", "A"),
        ("The correct answer is option D, not A.", "D"),
        ("A good question. I do not know.", None),
        ("B or C", None),
        ("", None),
    ],
)
def test_choices(text: str, choice: str | None) -> None:
    assert choice_of(text) == choice


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist you.", True),
        ("很抱歉，我不能帮你。", True),
        ("Sure, here is how to do it.", False),
        ("", False),
    ],
)
def test_refusals(text: str, refused: bool) -> None:
    assert refuses_harm(text) is refused
