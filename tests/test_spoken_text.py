"""Text that is to be spoken is never altered; what cannot be spoken is left out, and numbers become words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duologue.spoken_text import chunks, speakable, with_end, write_out_numbers
from duologue.text import printable, valid_strings, valid_unicode


def words(text: str) -> int:
    return len(text.split())


def test_long_texts_are_split_into_sentences() -> None:
    assert chunks("One two. Three four! Five?", words, 4) == ["One two. Three four!", "Five?"]
    assert chunks("a b c d e f g", words, 3) == ["a b c", "d e f", "g"]
    assert chunks("  \n ", words, 3) == []
    assert chunks("你好。今天怎么样？", len, 6) == ["你好。", "今天怎么样？"]
    assert chunks("by J. R. R. Tolkien", words, 4) == ["by J. R. R.", "Tolkien"]


@pytest.mark.parametrize(
    "text",
    [
        "It is 99.97 at 10:45, says v1.2.3 of J. R. R. Tolkien; see https://example.org/a?b=c.",
        "你好。今天怎么样？我很好。",
        "สวัสดีครับวันนี้อากาศดีมาก",
        "今日はいい天気ですね。散歩に行きましょう",
        "d41d8cd98f00b204e9800998ecf8427e" * 3,
        "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    ],
)
@pytest.mark.parametrize("limit", [1, 5, 12, 1000])
def test_pieces_are_spans_of_the_text_in_order(text: str, limit: int) -> None:
    pieces, at = chunks(text, len, limit), 0
    assert all(0 < len(piece) <= limit for piece in pieces if len(piece) > 1)
    for piece in pieces:
        found = text.index(piece, at)
        assert not text[at:found].strip()  # nothing but blanks between two pieces
        at = found + len(piece)
    assert not text[at:].strip()


@given(st.text(max_size=60), st.integers(1, 20))
def test_nothing_is_lost_from_any_text(text: str, limit: int) -> None:
    assert "".join("".join(chunks(text, len, limit)).split()) == "".join(text.split())


def test_a_word_is_cut_between_characters_only() -> None:
    assert chunks("e\u0301e\u0301e\u0301", len, 3) == ["e\u0301", "e\u0301", "e\u0301"]


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        (
            "Hi \U0001f600\U0001f468\u200d\U0001f469 there \U0001f1e9\U0001f1ea 1\ufe0f\u20e3 \u2764\ufe0f!",
            "Hi  there   !",
        ),
        ("bell\x07 and\x00 zero\u200b width", "bell and zero width"),
        ("# Title\n- **bold** and `code`\n> [a link](http://x.y/z)", "Title\nbold and code\na link"),
        ("```python\nx = 1\n```", "\nx = 1\n"),
        ("*one* and ***two*** and ~~three~~", "one and two and three"),
    ],
)
def test_what_cannot_be_spoken_is_left_out(text: str, spoken: str) -> None:
    assert speakable(text) == spoken


@pytest.mark.parametrize(
    "text",
    [
        "2 * 3 = 6 and 4*5*6",
        "snake_case_name and __init__.py",
        "#1 of A*",
        "3 > 2",
        "©2020 ™",
        "it's [sic] (so)",
        "क्\u200dष",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert speakable(text) == text


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("It is 10:45, not 9:05 or 10:00.", "It is ten forty-five, not nine oh five or ten o'clock."),
        (
            "99.97 percent, 50% of 1,234",
            "ninety-nine point nine seven percent, fifty percent of one thousand, two hundred and thirty-four",
        ),
        ("$3.50 or €4", "three dollars, fifty cents or four euro"),
        ("the 3rd and 21st", "the third and twenty-first"),
        ("In 3, 4 and 5.", "In three, four and five."),
        ("5 km at 1 m, 20 °C, 2.5kg", "five kilometers at one meter, twenty degrees Celsius, two point five kilograms"),
        ("100 km/h or 60 mph", "one hundred kilometers per hour or sixty miles per hour"),
        ("on 2024-05-01.", "on May first, twenty twenty-four."),
        ("May 5, 1984 and 3 Jan. 2007", "May fifth, nineteen eighty-four and January third, two thousand and seven"),
        ("the 4th of July, Sept 3rd", "the fourth of July, Sept third"),
    ],
)
def test_numbers_become_words(text: str, spoken: str) -> None:
    pytest.importorskip("num2words", reason="num2words is not installed (extra: serve)")
    assert write_out_numbers(text) == spoken


@pytest.mark.parametrize(
    "text", ["v1.2.3", "2024-13-01", "2024-05-01-3", "192.168.0.1", "555-1234", "A4", "x2", "1e9", "25:61", "3/4"]
)
def test_other_digits_stay(text: str) -> None:
    pytest.importorskip("num2words", reason="num2words is not installed (extra: serve)")
    assert write_out_numbers(text) == text


def test_numbers_of_other_languages_stay() -> None:
    assert write_out_numbers("10:45 Uhr", "de") == "10:45 Uhr"


def test_lone_surrogates_are_replaced_and_pairs_joined() -> None:
    assert valid_unicode("a\ud83d\ude00 b\ud83d c\ude00") == "a\U0001f600 b\ufffd c\ufffd"
    assert valid_strings({"a\ud800": ["b\udc00", 1, None]}) == {"a\ufffd": ["b\ufffd", 1, None]}


def test_control_characters_are_blanks_on_a_terminal() -> None:
    assert printable("a\x1b[2Jb\n") == "a [2Jb "


def test_text_without_an_end_gets_one() -> None:
    assert with_end("yellow window river") == "yellow window river."
    assert with_end("at 7") == "at 7."
    assert with_end("今天天气很好") == "今天天气很好。"
    for ended in ("", "It is three.", "Really?", 'He said "yes"', "first,", "很好。"):
        assert with_end(ended) == ended
