"""The interleave protocol: training data, sampling, splitting and recovery by one state machine."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duologue.interleave import (
    INTERLEAVED,
    SPEECH_ONLY,
    TEXT_ONLY,
    InterleaveState,
    Kind,
    Run,
    Schedule,
    legal_prefix,
    split,
    weave,
)

GOLDEN = Path(__file__).parent / "golden" / "reply_example.json"
FIRST_SPEECH = 1_000
END = -1

schedules = st.one_of(
    st.just(INTERLEAVED),
    st.just(TEXT_ONLY),
    st.just(SPEECH_ONLY),
    st.builds(Schedule, st.integers(min_value=1, max_value=5), st.integers(min_value=1, max_value=8)),
)


def kind_of(token: int) -> Kind:
    if token == END:
        return Kind.END
    return Kind.SPEECH if token >= FIRST_SPEECH else Kind.TEXT


def kinds(pattern: str) -> list[Kind]:
    """`"T13 S26 E"` as a list of kinds."""
    names = {"T": Kind.TEXT, "S": Kind.SPEECH, "E": Kind.END, "C": Kind.CONTROL, "P": Kind.PADDING}
    return [names[part[0]] for part in pattern.split() for _ in range(int(part[1:] or 1))]


def allowed_after(pattern: str, schedule: Schedule = INTERLEAVED) -> str:
    return str(InterleaveState(schedule).advance_all(kinds(pattern)).allowed)


@st.composite
def replies(draw: st.DrawFn) -> tuple[list[int], list[int], Schedule]:
    """Text ids, speech ids and a schedule that can hold them."""
    schedule = draw(schedules)
    num_text = draw(st.integers(0, 60)) if schedule.text_run else 0
    num_speech = schedule.min_speech(num_text) + draw(st.integers(0, 80)) if schedule.speech_run else 0
    return list(range(num_text)), list(range(FIRST_SPEECH, FIRST_SPEECH + num_speech)), schedule


def test_the_default_runs_are_those_of_the_release() -> None:
    assert (INTERLEAVED.text_run, INTERLEAVED.speech_run) == (13, 26)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", "text or speech"),
        ("T1", "text or speech"),
        ("T12", "text or speech"),
        ("T13", "speech"),
        ("T13 S1", "speech or end"),
        ("T13 S25", "speech or end"),
        ("T13 S26", "text or speech or end"),
        ("T13 S26 T1", "text or speech"),
        ("T13 S27", "speech or end"),  # speech where the next text run would begin
        ("T13 S26 S300", "speech or end"),
        ("T5 S1", "speech or end"),  # speech inside a text run
        ("T5 S26", "speech or end"),
        ("S1", "speech or end"),
        ("S26", "speech or end"),
        ("T13 S26 T13 S26", "text or speech or end"),
        ("T13 S26 E", "nothing"),
    ],
)
def test_what_may_come_next(pattern: str, expected: str) -> None:
    assert allowed_after(pattern) == expected


def test_text_only_and_speech_only_are_schedules_too() -> None:
    for pattern in ("", "T1", "T13", "T14", "T40"):
        assert allowed_after(pattern, TEXT_ONLY) == "text or end"
    assert allowed_after("", SPEECH_ONLY) == "speech"
    for pattern in ("S1", "S26", "S27", "S100"):
        assert allowed_after(pattern, SPEECH_ONLY) == "speech or end"


@pytest.mark.parametrize(
    "pattern", ["E", "T3 E", "T13 E", "T14", "T13 S3 T1", "T5 S26 T1", "T13 S27 T1", "C", "P", "T1 C"]
)
def test_what_may_not_stand_is_refused_and_changes_nothing(pattern: str) -> None:
    *before, wrong = kinds(pattern)
    state = InterleaveState().advance_all(before)
    untouched = copy.copy(state)
    with pytest.raises(ValueError, match=f"a {wrong.name.lower()} token cannot follow"):
        state.advance(wrong)
    assert state == untouched


def test_nothing_comes_after_the_end() -> None:
    state = InterleaveState().advance_all(kinds("T2 S5 E"))
    assert state.ended
    for kind in Kind:
        with pytest.raises(ValueError, match="only nothing can come"):
            state.advance(kind)


def test_the_real_reply_is_woven_as_the_release_wove_it() -> None:
    runs = json.loads(GOLDEN.read_text(encoding="utf-8"))["runs"]
    text_lengths = iter(
        [13, 13, 13, 5]
    )  # the file holds the text; the model's own token counts are those of the protocol
    reply: list[int] = []
    for run in runs:
        first = sum(1 for token in reply if token < FIRST_SPEECH)
        if "text" in run:
            reply += range(first, first + next(text_lengths))
        else:
            reply += [FIRST_SPEECH + code for code in run["speech"]]
    parts = split([*reply, END], kind_of)
    assert [run.kind for run in parts.runs] == [Kind.TEXT, Kind.SPEECH] * 4
    assert [run.stop - run.start for run in parts.runs] == [13, 26, 13, 26, 13, 26, 5, 89]
    assert parts.state.ended
    assert parts.state.text_finished
    assert weave(parts.text, parts.speech) == reply


@given(replies())
def test_splitting_gives_back_what_was_woven(reply: tuple[list[int], list[int], Schedule]) -> None:
    text, speech, schedule = reply
    woven = weave(text, speech, schedule)
    parts = split([*woven, END], kind_of, schedule)
    assert (parts.text, parts.speech) == (text, speech)
    assert parts.state.ended
    assert (parts.state.num_text, parts.state.num_speech) == (len(text), len(speech))
    assert [token for run in parts.runs for token in woven[run.start : run.stop]] == woven


@given(replies())
def test_text_runs_are_full_but_for_the_last(reply: tuple[list[int], list[int], Schedule]) -> None:
    text, speech, schedule = reply
    runs = split(weave(text, speech, schedule), kind_of, schedule).runs
    if schedule.text_run and schedule.speech_run:
        of_text = [run.stop - run.start for run in runs if run.kind is Kind.TEXT]
        of_speech = [run.stop - run.start for run in runs if run.kind is Kind.SPEECH]
        assert all(length == schedule.text_run for length in of_text[:-1])
        assert all(length == schedule.speech_run for length in of_speech[:-1])


@given(schedules, st.data())
def test_whatever_is_sampled_under_the_constraint_is_a_reply(schedule: Schedule, data: st.DataObject) -> None:
    state = InterleaveState(schedule)
    ids: list[int] = []
    while not state.ended and len(ids) < 120:
        allowed = [kind for kind in Kind if kind in state.allowed]
        assert allowed, "sampling must never be stuck"
        kind = data.draw(st.sampled_from(allowed))
        state.advance(kind)
        ids.append({Kind.TEXT: len(ids), Kind.SPEECH: FIRST_SPEECH + len(ids), Kind.END: END}[kind])
    parts = split(ids, kind_of, schedule)
    assert parts.state == state
    if state.ended:
        assert weave(parts.text, parts.speech, schedule) == ids[:-1]


@given(replies(), st.data())
def test_a_cut_stream_goes_on_as_if_it_had_not_been_cut(
    reply: tuple[list[int], list[int], Schedule], data: st.DataObject
) -> None:
    text, speech, schedule = reply
    woven = weave(text, speech, schedule)
    cut = data.draw(st.integers(0, len(woven)))
    parts = split(woven[:cut], kind_of, schedule)
    assert not parts.state.ended
    assert parts.text == text[: len(parts.text)]
    assert parts.speech == speech[: len(parts.speech)]
    parts.state.advance_all(kind_of(token) for token in woven[cut:])
    assert parts.state == split(woven, kind_of, schedule).state


@given(replies(), st.integers(0, 150))
def test_an_interrupted_reply_keeps_what_was_heard_and_stays_legal(
    reply: tuple[list[int], list[int], Schedule], num_heard: int
) -> None:
    text, speech, schedule = reply
    woven = weave(text, speech, schedule)
    kept = woven[: legal_prefix(map(kind_of, woven), num_heard)]
    parts = split(kept, kind_of, schedule)
    assert parts.speech == speech[:num_heard]
    assert not kept or kind_of(kept[-1]) is Kind.SPEECH
    if kept:
        assert parts.state.allowed.end


@pytest.mark.parametrize(
    ("num_heard", "kept"), [(0, 0), (1, 14), (10, 23), (26, 39), (27, 53), (52, 78), (60, 86), (99, 86)]
)
def test_where_an_interrupted_reply_is_cut(num_heard: int, kept: int) -> None:
    assert legal_prefix(kinds("T13 S26 T13 S34 E"), num_heard) == kept


def test_a_negative_number_heard_is_refused() -> None:
    with pytest.raises(ValueError, match="num_speech_heard must not be negative, got -1"):
        legal_prefix([], -1)


@pytest.mark.parametrize(
    ("num_text", "num_speech", "runs"),
    [
        (0, 4, "S4"),
        (13, 1, "T13 S1"),
        (13, 26, "T13 S26"),
        (13, 40, "T13 S40"),
        (14, 27, "T13 S26 T1 S1"),
        (26, 60, "T13 S26 T13 S34"),
        (5, 90, "T5 S90"),
    ],
)
def test_weaving_by_example(num_text: int, num_speech: int, runs: str) -> None:
    woven = weave(range(num_text), range(FIRST_SPEECH, FIRST_SPEECH + num_speech))
    assert [kind_of(token) for token in woven] == kinds(runs)


@pytest.mark.parametrize(
    ("num_text", "num_speech", "schedule", "message"),
    [
        (0, 0, INTERLEAVED, "need at least 1 speech"),
        (5, 0, INTERLEAVED, "need at least 1 speech"),
        (14, 26, INTERLEAVED, "14 text tokens in runs of 13 need at least 27 speech tokens in runs of 26 .* got 26"),
        (40, 78, INTERLEAVED, "need at least 79"),
        (1, 5, SPEECH_ONLY, "a schedule without text cannot hold 1 text"),
        (1, 5, TEXT_ONLY, "a schedule without speech cannot hold 5 speech"),
    ],
)
def test_what_cannot_be_woven_is_refused(num_text: int, num_speech: int, schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weave(range(num_text), range(FIRST_SPEECH, FIRST_SPEECH + num_speech), schedule)


def test_text_alone_may_be_empty() -> None:
    assert weave([], [], TEXT_ONLY) == []
    assert split([END], kind_of, TEXT_ONLY).state.ended


def test_a_wrong_id_is_named_with_its_position() -> None:
    reply = [*range(3), FIRST_SPEECH, 7]
    with pytest.raises(ValueError, match="id 7 at position 4: a text token cannot follow 3 text and 1 speech"):
        split(reply, kind_of)


def test_runs_say_where_they_lie() -> None:
    assert split([1, 2, FIRST_SPEECH], kind_of).runs == [Run(Kind.TEXT, 0, 2), Run(Kind.SPEECH, 2, 3)]


@pytest.mark.parametrize(("text_run", "speech_run"), [(-1, 26), (13, -2), (0, 0)])
def test_a_schedule_needs_lengths(text_run: int, speech_run: int) -> None:
    with pytest.raises(ValueError, match=f"got text_run={text_run}, speech_run={speech_run}"):
        Schedule(text_run, speech_run)
