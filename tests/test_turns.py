"""Conversations: ids in, the same ids out, and a clear word for every file that is none."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duologue.turns import Conversation, Modality, Role, Turn

turns = st.builds(
    Turn,
    role=st.just(Role.ASSISTANT),
    modality=st.sampled_from(Modality),
    ids=st.lists(st.integers(0, 200_000), max_size=20).map(tuple),
    language=st.sampled_from(["", "en", "zh"]),
    voice=st.text(max_size=5),
    style=st.text(max_size=5),
    interrupted=st.booleans(),
) | st.builds(Turn, role=st.sampled_from(Role), modality=st.sampled_from(Modality), ids=st.just((1, 2)))


@given(st.lists(turns, max_size=5), st.text(max_size=8))
def test_what_is_saved_is_loaded(said: list[Turn], vocabulary: str) -> None:
    conversation = Conversation(tuple(said), vocabulary)
    assert Conversation.from_json(json.loads(json.dumps(conversation.to_json()))) == conversation


def test_files(tmp_path: Path) -> None:
    conversation = Conversation(vocabulary="v").plus(
        Turn(Role.SYSTEM, Modality.TEXT, (1,)),
        Turn(Role.USER, Modality.SPEECH, (900, 901), language="en", voice="slt"),
        Turn(Role.ASSISTANT, Modality.INTERLEAVED, (3, 905), interrupted=True),
        Turn(Role.OBSERVATION, Modality.TEXT, (4,)),
    )
    conversation.save(tmp_path / "c.json")
    assert Conversation.load(tmp_path / "c.json") == conversation
    data = json.loads((tmp_path / "c.json").read_text())
    assert (data["kind"], data["version"]) == ("Conversation", 1)
    assert data["turns"][1] == {
        "role": "user",
        "modality": "speech",
        "ids": [900, 901],
        "language": "en",
        "voice": "slt",
        "style": "",
        "interrupted": False,
    }


def test_adding_a_turn_leaves_the_old_conversation() -> None:
    before = Conversation()
    after = before.plus(Turn(Role.USER, Modality.TEXT, (1,)))
    assert (len(before), len(after), [turn.ids for turn in after]) == (0, 1, [(1,)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "f.json is a conversation of version 2; this program reads version 1"),
        ({"version": None}, "conversation of version None"),
        ({"kind": "Recipe"}, "f.json is not a saved conversation"),
        ({"mood": 1}, "unknown key 'mood' in f.json; the keys are turns, vocabulary"),
        ({"turns": [{"role": "user", "modality": "speech"}]}, r"key 'turns\[0\].ids' in f.json is missing"),
        (
            {"turns": [{"role": "robot", "modality": "text", "ids": []}]},
            "'robot'; the choices are 'system', 'user', 'assistant', 'observation'",
        ),
        (
            {"turns": [{"role": "user", "modality": "smell", "ids": []}]},
            "the choices are 'text', 'speech', 'interleaved'",
        ),
        ({"turns": [{"role": "user", "modality": "text", "ids": ["1"]}]}, r"turns\[0\].ids\[0\] in f.json must be int"),
        ({"turns": [{"role": "user", "modality": "text", "ids": [-1]}]}, "token ids must not be negative, got -1"),
        (
            {"turns": [{"role": "user", "modality": "text", "ids": [], "interrupted": True}]},
            "only a turn of the assistant can be interrupted, not one of the user",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conversation.from_json(Conversation().to_json() | change, "f.json")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Conversation.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"kind": "Conv')
    with pytest.raises(ValueError, match="is not JSON"):
        Conversation.load(tmp_path / "cut.json")
