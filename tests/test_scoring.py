"""Normalisation and the search for answers."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duologue.scoring import error_rate, is_correct, normalize, word_errors
from recipes.pocket.everything import KINDS, dialogue
from recipes.pocket.numbers import spell


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's Paris!", "it is paris"),
        ("I cannot, I can't.", "i can not i can not"),
        ("1, 2, 3", "one two three"),
        ("5% of $12", "five percent of twelve dollars"),
        ("the 2nd, the 20th", "the second the twentieth"),
        ("2.5 km", "two point five km"),
        ("uh, hello", "hello"),
        ("  The CAPITAL  of   France... ", "the capital of france"),
        ("7 + 5 = 12", "seven five twelve"),
        ("3,021 km", "three thousand twenty one km"),
        ("one hundred and five", "one hundred five"),
        ("salt and pepper", "salt and pepper"),
        ("two hundred and a half", "two hundred and a half"),
        ("twenty-one", "twenty one"),
        ("-4", "minus four"),
        ("Bogotá’s 'colour'", "bogota is color"),
        ("007", "zero zero seven"),
        ("你好，世界。", "你好 世界"),
        ("", ""),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.text(max_size=60))
def test_normalize_twice_is_once(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@given(st.integers(0, 999_999))
def test_digits_and_words_are_the_same_number(number: int) -> None:
    assert normalize(str(number)) == spell(number)
    assert is_correct(f"The answer is {number}.", [spell(number)])
    assert is_correct(f"The answer is {spell(number)}.", [str(number)])


@pytest.mark.parametrize(
    ("reply", "answers", "right"),
    [
        ("The capital of France is Paris.", ["paris"], True),
        ("It is London.", ["paris"], False),
        ("Parisians live there.", ["paris"], False),
        ("That is 12.", ["twelve"], True),
        ("That is thirty seven.", ["seven"], False),
        ("That is twenty one.", ["twenty"], False),
        ("That is one hundred seven.", ["one hundred"], False),
        ("Seven plus five is twelve.", ["twelve"], True),
        ("One, two, three.", ["one two three"], True),
        ("One, three, two.", ["one two three"], False),
        ("One, two, three, four.", ["two three"], True),
        ("New, but old Delhi.", ["new delhi"], False),
        ("It is in north America!", ["north america"], True),
        ("Lion or bear.", ["bear", "tiger"], True),
        ("", ["bear"], False),
        ("Nineteen, twenty, twenty one.", ["nineteen twenty twenty one"], True),
        ("An elephant is gray.", ["grey"], True),
    ],
)
def test_is_correct(reply: str, answers: list[str], right: bool) -> None:
    assert is_correct(reply, answers) is right


@pytest.mark.parametrize("answers", [[], [""], ["paris", "?!"]])
def test_an_empty_answer_is_refused(answers: list[str]) -> None:
    with pytest.raises(ValueError, match="answers must be non-empty"):
        is_correct("Paris.", answers)


def test_words_of_other_languages_stay() -> None:
    assert normalize("Uh, l'été 3!", "fr") == "uh l été 3"
    assert word_errors("eins zwei", "eins 2", "de") == (1, 2)


def test_every_reply_of_the_curriculum_is_right_and_most_others_are_wrong() -> None:
    rng = Random(4)
    turns = [turn for kind in KINDS for _ in range(30) for turn in dialogue(kind, "train", rng).exchanges]
    assert all(is_correct(turn.reply, turn.answers) for turn in turns)
    others = rng.sample(turns, len(turns))
    wrong = sum(is_correct(other.reply, turn.answers) for turn, other in zip(turns, others, strict=True))
    assert wrong < 0.1 * len(turns)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "edits"),
    [
        ("The cat sat.", "the cat sat", 0),
        ("the cat sat", "a cat", 2),
        ("seven", "7", 0),
        ("one two three four", "1, 2, 3, 4.", 0),
        ("", "two words", 2),
        ("one two three", "one three two", 2),
    ],
)
def test_word_errors(reference: str, hypothesis: str, edits: int) -> None:
    assert word_errors(reference, hypothesis) == (edits, len(reference.split()))


def test_chinese_is_compared_by_characters() -> None:
    assert word_errors("今天天气很好。", "今天 天汽很好", "zh") == (1, 6)
    assert word_errors("今天天气很好。", "", "zh") == (6, 6)
    assert is_correct("中国的首都是北京。", ["北京"], "zh")
    assert error_rate([("one two", "one", "en"), ("...", "more", "en"), ("一二", "一三", "zh")]) == 0.5
    assert error_rate([]) == 0.0
    assert word_errors("法国有十二个。", "法國有12個", "zh") == (0, 6)
    assert is_correct("等于20。", ["二十"], "zh")
    assert not is_correct("中国的首都是南京。", ["北京"], "zh")
