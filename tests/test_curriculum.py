"""The curriculum as text: its tables, its wordings and the split between training and test."""

import json
import re
from pathlib import Path
from random import Random

import pytest

from recipes.pocket import corpus
from recipes.pocket.curriculum import Conversing, Intent, choose_phrasing, exchange, held_out, sentence
from recipes.pocket.everything import DIALOGUES, INTENTS, KINDS, any_dialogue, dialogue, facts, texts
from recipes.pocket.facts import ANIMALS, COLOURS, COUNTRIES, MONTHS, OPPOSITES
from recipes.pocket.mandarin import MANDARIN
from recipes.pocket.manner_of_speech import STYLE_DIALOGUES
from recipes.pocket.numbers import counting, spell
from recipes.pocket.phrasings import PHRASINGS, load_phrasings
from recipes.pocket.plans import PlannedDialogue, plan_dialogues, plan_free, plan_test, used_pairs
from recipes.pocket.repeating import free_text
from recipes.pocket.stories import LONG_ANSWERS
from recipes.pocket.synthesis import STYLES, UNSEEN_VOICES
from recipes.pocket.words import FIRST_NAMES, OPEN_WORDS

UNSEEN = {voice.id for voice in UNSEEN_VOICES}


@pytest.fixture(scope="module")
def training() -> list[PlannedDialogue]:
    return [one for shard in range(4) for one in plan_dialogues(seed=1, shard=shard, num_exchanges=2000)]


@pytest.fixture(scope="module")
def test_set() -> list[PlannedDialogue]:
    return plan_test(seed=1, num_exchanges=600)


def test_tables_have_the_promised_sizes_and_no_doubles() -> None:
    assert len(COUNTRIES) == 60
    assert len({country for country, _, _ in COUNTRIES}) == len({capital for _, capital, _ in COUNTRIES}) == 60
    assert len({word for pair in OPPOSITES for word in pair}) == 60
    assert len({animal for animal, _, _ in ANIMALS}) == 30
    assert len({thing for thing, _, _ in COLOURS}) == 30
    assert len(MONTHS) == 12
    assert len(LONG_ANSWERS) >= 12
    assert len(MANDARIN) >= 55
    assert len(OPEN_WORDS) > 1500
    assert len(FIRST_NAMES) > 50


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (77, "seventy seven"),
        (400, "four hundred"),
        (361, "three hundred sixty one"),
        (12005, "twelve thousand five"),
        (-3, "minus three"),
    ],
)
def test_numbers_are_spelled(number: int, words: str) -> None:
    assert spell(number) == words


def test_a_number_too_large_to_spell_is_refused() -> None:
    with pytest.raises(ValueError, match="1000000 is too large"):
        spell(1_000_000)


def test_counting_goes_both_ways() -> None:
    assert counting(3, 5) == "three, four, five"
    assert counting(2, 0) == "two, one, zero"


@pytest.mark.parametrize("intent", INTENTS, ids=lambda intent: intent.name)
def test_every_intent_has_enough_wordings_kept_apart(intent: Intent) -> None:
    assert len(set(intent.phrasings.train)) >= 6
    assert len(set(intent.phrasings.test)) >= 2
    assert not set(intent.phrasings.train) & set(intent.phrasings.test)


def test_the_wider_wordings_are_of_training_alone(test_set: list[PlannedDialogue]) -> None:
    intents = {intent.name: intent for intent in INTENTS}
    tested = {phrasing for intent in INTENTS for phrasing in intent.phrasings.test}
    asked = {(used.intent, used.phrasing) for one in test_set for turn in one.dialogue.exchanges for used in turn.asked}
    for name, phrasings in PHRASINGS.items():
        known = (*phrasings.train, *phrasings.wider)
        assert len(set(known)) == len(known), name
        assert not tested & set(phrasings.wider), name
        assert not asked & {(name, phrasing) for phrasing in phrasings.wider}, name
    planned = [one for shard in range(3) for one in plan_dialogues(2, shard, 2000)]
    turns = {used.intent for one in planned for turn in one.dialogue.exchanges for used in turn.asked}
    turns |= {f"in_{style}" for style in STYLES}  # the adverb of a command
    assert set(PHRASINGS) - set(intents) <= turns  # a name that no turn has would be a slip of the pen


def test_phrasings_stand_in_one_file_and_have_known_keys(tmp_path: Path) -> None:
    entry = "capital: {train: ['what?'], test: ['which?']}\n"
    (tmp_path / "one.yaml").write_text(entry)
    assert load_phrasings(tmp_path)["capital"].train == ("what?",)
    (tmp_path / "two.yaml").write_text(entry)
    with pytest.raises(ValueError, match="two.yaml has the phrasings 'capital', which another file has too"):
        load_phrasings(tmp_path)
    (tmp_path / "two.yaml").write_text("capitol: {train: ['what?'], tset: ['which?']}\n")
    with pytest.raises(ValueError, match="unknown key 'tset' in .*two.yaml, capitol"):
        load_phrasings(tmp_path)


def test_names_of_kinds_are_unique() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("split", ["train", "test", "text"])
def test_every_dialogue_is_speakable_and_answers_itself(kind: Intent | Conversing, split: str) -> None:
    rng = Random(f"{kind.name}{split}")
    for _ in range(40):
        drawn = dialogue(kind, split, rng)
        assert 1 <= len(drawn.exchanges) <= 4
        for turn in drawn.exchanges:
            assert bool(turn.user) != bool(turn.sound)
            assert turn.style in STYLES
            assert turn.answers
            assert any(answer in re.sub(r"[^a-z' ]", "", turn.reply.lower()) for answer in turn.answers)
            for text in (turn.user, turn.reply):
                assert re.fullmatch(r"[A-Za-z',.?!: ]*", text), text
                assert not re.search(r"[{}]|\bi\b|  ", text), text


def test_the_hash_of_a_pair_holds_out_about_one_in_ten() -> None:
    pairs = [(country, f"phrasing {n}") for country, _, _ in COUNTRIES for n in range(50)]
    share = sum(held_out("capital", country, phrasing) for country, phrasing in pairs) / len(pairs)
    assert 0.07 < share < 0.13
    assert not held_out("greeting", "", "hello.")  # no entity: only phrasings are held out


def test_phrasings_follow_the_split() -> None:
    intent = next(intent for intent in INTENTS if intent.name == "capital")
    used: dict[str, set[str]] = {"train": set(), "test": set(), "text": set()}
    for split, found in used.items():
        for seed in range(300):
            phrasing = choose_phrasing("capital", "Iran", split, Random(seed))
            assert phrasing is not None
            found.add(phrasing)
    assert not used["train"] & used["test"]
    assert used["text"] == set(intent.phrasings.train) | set(intent.phrasings.wider)
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        choose_phrasing("capital", "Iran", "valid", Random(0))


def test_no_pair_and_no_question_of_the_test_is_spoken_in_training(
    training: list[PlannedDialogue], test_set: list[PlannedDialogue]
) -> None:
    assert len(used_pairs(test_set)) > 300
    assert not used_pairs(training) & used_pairs(test_set)
    # Whole sentences too, free speech included. Follow-ups without an entity ("say it again") are held out together
    # with what they follow, so the first questions of dialogues are compared.
    spoken = {clip.request.text for one in training for clip in one.users[:1]}
    plan = plan_free(seed=1, shard=0)
    spoken |= {next(plan).request.text for _ in range(3000)}
    asked = {one.users[0].request.text for one in test_set} - {""}
    assert not spoken & asked


def test_two_voices_are_heard_only_in_the_test(
    training: list[PlannedDialogue], test_set: list[PlannedDialogue]
) -> None:
    plan = plan_free(seed=2, shard=0)
    heard = {clip.request.voice for one in training for clip in one.users}
    heard |= {next(plan).request.voice for _ in range(3000)}
    assert len(heard - {v for v in heard if v.startswith("sound-")}) >= 12
    assert not heard & UNSEEN
    for one in test_set:
        voices = {clip.request.voice for clip in one.users if clip.request.text}
        assert voices <= UNSEEN if one.split == "test_unseen" else not voices & UNSEEN
    assert {clip.request.voice for one in test_set for clip in one.users} >= UNSEEN


def test_the_test_set_covers_every_intent_in_both_halves(test_set: list[PlannedDialogue]) -> None:
    for split in ("test", "test_unseen"):
        asked = {one.dialogue.intent for one in test_set if one.split == split}
        assert {intent.name for intent in INTENTS} <= asked
        for kind in DIALOGUES:
            rng = Random(kind.name)
            assert {kind.make("test", rng).intent for _ in range(50)} & asked
    questions = [tuple(turn.user for turn in one.dialogue.exchanges) for one in test_set if one.users[0].request.text]
    assert len(questions) == len(set(questions))


def test_plans_are_functions_of_the_seed() -> None:
    assert plan_dialogues(3, 1, 50) == plan_dialogues(3, 1, 50)
    assert plan_dialogues(3, 1, 50) != plan_dialogues(3, 2, 50)
    assert plan_test(3, 100) == plan_test(3, 100)


def test_facts_are_told_in_every_direction() -> None:
    said = set(facts())
    for wanted in (
        "The capital of France is Paris.",
        "Paris is the capital of France.",
        "France is in Europe.",
        "The day before Monday is Sunday.",
        "The opposite of cold is hot.",
        "Twenty times nineteen is three hundred eighty.",
        "Nineteen times twenty is three hundred eighty.",
        "Seven minus three is four.",
        "A calf becomes a cow.",
        "Blood is red.",
    ):
        assert wanted in said


def test_styles_are_asked_for_and_answered_in_the_style() -> None:
    rng = Random(5)
    seen = {turn.style for kind in STYLE_DIALOGUES for _ in range(300) for turn in kind.make("train", rng).exchanges}
    assert seen == set(STYLES)


def test_a_reply_in_a_style_has_the_words_of_the_one_before() -> None:
    again = next(kind for kind in STYLE_DIALOGUES if kind.name == "again_in_style")
    rng = Random(6)
    for _ in range(50):
        first, *rest = again.make("train", rng).exchanges
        assert first.style == "plain"
        assert all(turn.reply == first.reply and turn.style != "plain" for turn in rest)


def test_free_speech_uses_most_of_the_open_list() -> None:
    rng = Random(7)
    used = {word.lower() for _ in range(4000) for word in free_text(rng).split()}
    assert len(used & {word.lower() for word in OPEN_WORDS}) > 0.98 * len(OPEN_WORDS)


def test_texts_hold_both_scripts_and_leave_out_test_wordings() -> None:
    lines = list(texts(seed=0, count=3000))
    assert any("你好" in line for line in lines)
    assert not any("could you work out" in line.lower() for line in lines)  # a phrasing of the test


def test_sentence_writes_capitals() -> None:
    assert sentence("what did i ask?") == "What did I ask?"
    assert exchange(INTENTS[0], "train", Random(0)).user[0].isupper()
    assert any_dialogue("train", Random(0)).exchanges


def test_texts_are_written_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        corpus.main([])
    assert "--out FOLDER" in capsys.readouterr().err
    record = corpus.clip_record("free-00000-000000", next(plan_free(1, 0)), 5, 7)
    assert (record["offset"], record["num_samples"], record["sample_rate"]) == (5, 7, 16000)
    assert json.loads(json.dumps(record)) == record
