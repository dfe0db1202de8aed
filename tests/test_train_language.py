"""Both trainings of the language model: packing, what each copy trains, the mixture, and that they train and resume."""

import asyncio
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from duologue.config import load_config
from duologue.interleave import INTERLEAVED, TEXT_ONLY, Kind, split, weave
from duologue.language.backbone import (
    LanguageConfig,
    Provenance,
    load_language,
    load_provenance,
    new_glm,
    save_language,
)
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.language.talker import TextToTokenTalker
from duologue.training.chat import WHOLE, ChatRecipe, Chats, ChatStage, DialogueAugmentation, LossMix, as_text
from duologue.training.corpus import CorpusSample, LabeledTurn, TokenCorpus, write_manifest, write_shard
from duologue.training.loop import LoopConfig, run
from duologue.training.packing import (
    SPEECH,
    TEXT,
    UNTRAINED,
    Example,
    corrupt_heard_speech,
    decisions,
    fill,
    losses,
    pack,
)
from duologue.training.pretrain import Jobs, Mixture, PretrainRecipe, PretrainStage, both
from duologue.training.text_to_token import TextToTokenRecipe, TextToTokenStage
from duologue.training.tokenize import TokensRecipe
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import BEGIN_OF_AUDIO, END_OF_TEXT, Task, Vocabulary
from recipes.pocket.text import train_text_tokenizer

TINY = LanguageConfig(width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=48, max_positions=512)
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LENGTH = 128


def spoken(vocabulary: Vocabulary, text: str, voice: int) -> tuple[int, ...]:
    """A language of sounds: three codes for each letter, another third of the codebook for each voice."""
    codes = [(ord(letter) * 7 + k * 5 + voice * 11) % vocabulary.codebook_size for letter in text for k in range(3)]
    return tuple(vocabulary.speech_ids(codes))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    questions = [f"what comes after {word}?" for word in WORDS]
    return Vocabulary.extend(train_text_tokenizer([*questions, *WORDS] * 2, 320), codebook_size=64)


def dialogue(vocabulary: Vocabulary, number: int, split_: str, exchanges: int = 1) -> CorpusSample:
    turns = []
    for k in range(exchanges):
        asked = f"what comes after {WORDS[(number + k) % 9]}?"
        answer = WORDS[(number + k) % 9 + 1]
        heard = Turn(Role.USER, Modality.SPEECH, spoken(vocabulary, asked, number % 3), "en", f"voice {number % 3}")
        said = weave(vocabulary.encode_text(answer), spoken(vocabulary, answer * 3, 0))
        turns.append(LabeledTurn(heard, tuple(vocabulary.encode_text(asked))))
        turns.append(LabeledTurn(Turn(Role.ASSISTANT, Modality.INTERLEAVED, tuple(said), "en", "slt")))
    return CorpusSample(f"{split_}-{number}", "chat", split_, "after", tuple(turns), (answer,))


@pytest.fixture(scope="module")
def folder(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    vocabulary.save(folder / "vocabulary")
    provenance = Provenance("f" * 64, vocabulary.hash)
    samples = []
    for part in ("train", "valid"):
        samples += [dialogue(vocabulary, number, part, 1 + (number % 7 == 0)) for number in range(40)]
        for number, word in enumerate(WORDS):
            for role, voice in ((Role.USER, number % 3), (Role.ASSISTANT, 0)):
                turn = Turn(role, Modality.SPEECH, spoken(vocabulary, word * 3, voice), "en", f"voice {voice}")
                labeled = LabeledTurn(turn, tuple(vocabulary.encode_text(word)))
                samples.append(CorpusSample(f"{part}-{role}-{word}", "clip", part, "", (labeled,)))
            said = tuple(vocabulary.encode_text(f"after {word}"))
            fact = LabeledTurn(Turn(Role.ASSISTANT, Modality.TEXT, said))
            samples.append(CorpusSample(f"{part}-fact-{word}", "text", part, "", (fact,)))
    noise = LabeledTurn(Turn(Role.USER, Modality.SPEECH, tuple(vocabulary.speech_ids(range(9)))))
    samples.append(CorpusSample("noise", "clip", "train", "", (noise,)))
    write_shard(folder / "tokens", "all", samples, provenance, vocabulary.speech_offset)
    write_manifest(folder / "tokens", provenance)
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path) -> TokenCorpus:
    return TokenCorpus(folder / "tokens", splits=("train",))


# Packing.


def test_packing_equals_separate_runs(vocabulary: Vocabulary) -> None:
    model = new_glm(vocabulary, TINY).eval()
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(0, vocabulary.size, size).tolist(), rng.integers(0, 3, size).tolist())
        for size in (30, 1, 2, 17, 25, 40)
    ]
    batch = pack([examples[:4], examples[4:], []], 70, 0)
    with torch.no_grad():
        together = losses(model, batch)
        hidden = model.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        at = 0
        for example in examples[:4]:
            alone = model.base_model(input_ids=torch.tensor([example.ids]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(hidden[0, at : at + len(example.ids)], alone, atol=1e-5, rtol=1e-5)
            at += len(example.ids)
        sums = {TEXT: 0.0, SPEECH: 0.0}
        counts = {TEXT: 0, SPEECH: 0}
        for example in examples:
            logits = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
            for position, (token, what) in enumerate(zip(example.ids[1:], example.trains[1:], strict=True)):
                if what != UNTRAINED:
                    sums[what] -= float(logits[position, token])
                    counts[what] += 1
    total = sum(counts.values())
    for name, what in (("text", TEXT), ("speech", SPEECH)):
        assert float(together[name]) == pytest.approx(sums[what] / total, rel=1e-4)
        assert float(together[f"{name}_nll"]) == pytest.approx(sums[what] / counts[what], rel=1e-4)


def test_a_row_never_learns_to_predict_the_next_example() -> None:
    batch = pack([[Example([1, 2, 3], [TEXT] * 3), Example([4, 5], [SPEECH] * 2)]], 7, 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["targets"].tolist() == [[2, 3, 0, 5, 0, 0, 0]]
    assert batch["trains"].tolist() == [[TEXT, TEXT, 0, SPEECH, 0, 0, 0]]
    with pytest.raises(ValueError, match="do not fit"):
        pack([[Example([1] * 5, [TEXT] * 5)] * 2], 7, 9)


def test_rows_are_filled(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)

    def draw() -> Example:
        size = int(rng.integers(5, 40))
        return Example([0] * size, [TEXT] * size)

    rows = fill(draw, 8, 200)
    sizes = [sum(len(example.ids) for example in row) for row in rows]
    assert all(size <= 200 for size in sizes)
    assert sum(sizes) > 0.9 * 8 * 200


def test_only_speech_that_is_listened_to_is_misheard(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    heard, said = vocabulary.speech_ids([0] * 400), vocabulary.speech_ids([1] * 400)
    text = vocabulary.encode_text("what comes after nine?")
    example = Example([*text, *heard, *said], [UNTRAINED] * (len(text) + 400) + [SPEECH] * 400)
    assert corrupt_heard_speech(example, 0.0, vocabulary, rng) == example
    changed = corrupt_heard_speech(example, 0.25, vocabulary, rng)
    wrong = np.flatnonzero(np.array(changed.ids) != np.array(example.ids))
    assert 60 < len(wrong) < 140
    assert wrong.min() >= len(text)
    assert wrong.max() < len(text) + 400
    assert all(vocabulary.kinds[changed.ids[int(index)]] == Kind.SPEECH for index in wrong)
    assert changed.trains == example.trains


# The copies.


def reply_kinds(num_text: int, num_speech: int) -> tuple[Kind, ...]:
    woven = weave([0] * num_text, [1] * num_speech)
    return (*(Kind.SPEECH if token else Kind.TEXT for token in woven), Kind.END)


@pytest.mark.parametrize(
    ("num_text", "num_speech"), [(1, 1), (5, 30), (13, 26), (13, 40), (20, 60), (26, 53), (30, 90)]
)
def test_two_copies_train_every_id_once(num_text: int, num_speech: int) -> None:
    kinds = reply_kinds(num_text, num_speech)
    trains = decisions(kinds, INTERLEAVED)
    assert all(what == TEXT for what, kind in zip(trains, kinds, strict=True) if kind is Kind.TEXT)
    speech = [i for i, kind in enumerate(kinds) if kind is Kind.SPEECH]
    last_text = max(i for i, kind in enumerate(kinds) if kind is Kind.TEXT)
    # Exactly the ids that stand where text could have come are decisions about the text.
    finished = [i for i in speech if trains[i] == TEXT]
    assert len(finished) <= 1
    if num_text % 13:
        assert finished == [last_text + 1]
    assert set(trains) <= {TEXT, SPEECH}


def test_the_first_speech_id_after_the_text_and_the_end_are_trained_in_a_copy(
    vocabulary: Vocabulary, corpus: TokenCorpus
) -> None:
    chats = Chats(corpus, vocabulary, LossMix(), DialogueAugmentation(), LENGTH)
    rng = np.random.default_rng(0)
    turns = list(dialogue(vocabulary, 1, "train").turns)
    copies = {way: chats.example(turns, rng, way) for way in (TEXT, SPEECH, WHOLE)}
    whole = copies[WHOLE]
    assert whole.ids[-1] == vocabulary.end_id
    reply = turns[1].turn.ids
    start = len(whole.ids) - len(reply) - 1
    assert list(whole.ids[start:-1]) == list(reply)
    assert all(what == UNTRAINED for what in whole.trains[:start])
    assert all(what != UNTRAINED for what in whole.trains[start:])
    num_text = sum(vocabulary.kind(token) is Kind.TEXT for token in reply)
    first_speech = start + num_text

    def trained(way: int, position: int) -> bool:
        return position < len(copies[way].ids) and copies[way].trains[position] != UNTRAINED

    assert trained(TEXT, first_speech)
    assert trained(SPEECH, len(whole.ids) - 1)
    for position in range(start, len(whole.ids)):  # the two copies together train all, and nothing twice
        assert trained(TEXT, position) != trained(SPEECH, position)
        if vocabulary.kind(whole.ids[position]) is Kind.TEXT:
            assert trained(TEXT, position)
    # Behind its last trained id a copy for the text says nothing.
    assert len(copies[TEXT].ids) == first_speech + 1


def test_losses_that_do_not_fit_the_sequence_are_named(
    vocabulary: Vocabulary, corpus: TokenCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = Chats(corpus, vocabulary, LossMix(), DialogueAugmentation(), LENGTH)
    monkeypatch.setattr(Chats, "_reply", lambda *_: [TEXT])
    sample = corpus[int(corpus.where("task", "chat")[0])]
    with pytest.raises(ValueError, match=r"have 1 ids with a loss, its sequence has \d+"):
        chats.example(list(sample.turns[:2]), np.random.default_rng(0))


def test_copies_come_by_their_shares() -> None:
    rng = np.random.default_rng(0)
    drawn = [LossMix(text=4, speech=20).draw(rng) for _ in range(3000)]
    assert drawn.count(TEXT) / 3000 == pytest.approx(4 / 24, abs=0.03)
    assert drawn.count(WHOLE) == 0
    with pytest.raises(ValueError, match="not all 0"):
        LossMix(0, 0, 0)


def test_interrupted_replies_end_with_a_heard_id_and_do_not_train_their_end(
    vocabulary: Vocabulary, corpus: TokenCorpus
) -> None:
    augmentation = DialogueAugmentation(written_question=0.0, written_reply=0.0, interrupted=1.0, joined=0.0)
    chats = Chats(corpus, vocabulary, LossMix(0, 0, 1), augmentation, 1000)
    rng = np.random.default_rng(1)
    lengths = set()
    for number in range(30):
        turns = chats.dialogue(dialogue(vocabulary, number, "train", 1 + number % 2), rng)
        cut = [i for i, labeled in enumerate(turns) if labeled.turn.interrupted]
        assert len(cut) == 1
        assert cut[0] < len(turns) - 1
        reply = turns[cut[0]].turn
        parts = split(reply.ids, vocabulary.kind)
        assert not reply.ids or vocabulary.kind(reply.ids[-1]) is Kind.SPEECH
        lengths.add(len(parts.speech))
        example = chats.example(turns, rng)
        begins = [i for i, token in enumerate(example.ids) if token == vocabulary.end_id]
        after_cut = begins[cut[0] // 2 + 1]  # the next turn of the user: nobody chose to end here
        assert example.trains[after_cut] == UNTRAINED
        assert example.trains[-1] != UNTRAINED
        assert example.ids[-1] == vocabulary.end_id
    assert len(lengths) > 5


def test_text_in_and_text_out(vocabulary: Vocabulary, corpus: TokenCorpus) -> None:
    augmentation = DialogueAugmentation(written_question=1.0, written_reply=1.0, interrupted=0.0, joined=0.0)
    chats = Chats(corpus, vocabulary, LossMix(0, 1, 0), augmentation, LENGTH)
    rng = np.random.default_rng(0)
    turns = chats.dialogue(dialogue(vocabulary, 3, "train"), rng)
    assert [labeled.turn.modality for labeled in turns] == [Modality.TEXT, Modality.TEXT]
    example = chats.example(turns, rng)
    prompt = vocabulary.prompt_ids(Conversation((turns[0].turn,)), Modality.TEXT)
    assert list(example.ids[: len(prompt)]) == prompt
    text = vocabulary.decode_text(token for token in example.ids[len(prompt) : -1])
    assert text == "four"
    assert set(example.trains[len(prompt) :]) == {TEXT}  # also where only speech copies are asked for
    noise = LabeledTurn(Turn(Role.USER, Modality.SPEECH, tuple(vocabulary.speech_ids(range(9)))))
    assert as_text(noise, vocabulary) == noise
    assert decisions((*[Kind.TEXT] * 20, Kind.END), TEXT_ONLY) == (TEXT,) * 21


def test_histories_that_do_not_fit_are_shortened(vocabulary: Vocabulary, corpus: TokenCorpus) -> None:
    augmentation = DialogueAugmentation(0.0, 0.0, 0.0, joined=1.0)
    chats = Chats(corpus, vocabulary, LossMix(0, 0, 1), augmentation, LENGTH)
    rng = np.random.default_rng(0)
    lengths = [len(chats(rng).ids) for _ in range(40)]
    assert max(lengths) <= LENGTH


def test_long_conversations_are_joined(vocabulary: Vocabulary, corpus: TokenCorpus) -> None:
    augmentation = DialogueAugmentation(0.0, 0.0, 0.0, joined=1.0, max_joined=3)
    chats = Chats(corpus, vocabulary, LossMix(0, 0, 1), augmentation, LENGTH)
    rng, last = np.random.default_rng(0), dialogue(vocabulary, 2, "train")
    drawn = [chats.dialogue(last, rng) for _ in range(60)]
    assert all(tuple(turns[-len(last.turns) :]) == last.turns for turns in drawn)
    assert {len(turns) for turns in drawn} >= {len(last.turns) + 2, len(last.turns) + 6}
    with pytest.raises(ValueError, match="max_joined must be at least 1, got 0"):
        DialogueAugmentation(max_joined=0)


# The mixture.


def test_every_job_is_what_it_says(vocabulary: Vocabulary, corpus: TokenCorpus) -> None:
    jobs = Jobs(corpus, vocabulary, Mixture(), LENGTH)
    rng = np.random.default_rng(0)
    clip = corpus[int(corpus.where("id", "train-assistant-seven")[0])]
    text, speech = both(clip.turns[0], vocabulary)
    chat = dialogue(vocabulary, 2, "train")

    def trained(name: str, sample: CorpusSample) -> tuple[list[int], list[int]]:
        example = jobs.example(name, sample, rng)
        assert example is not None
        pairs = zip(example.ids, example.trains, strict=True)
        chosen = [(token, what) for token, what in pairs if what != UNTRAINED]
        return [token for token, _ in chosen], [what for _, what in chosen]

    end, end_of_text = vocabulary.end_id, vocabulary.control_id(END_OF_TEXT)
    assert trained("asr", clip) == ([*text, end], [TEXT] * (len(text) + 1))
    assert trained("tts", clip) == ([*speech, end], [SPEECH] * (len(speech) + 1))
    assert trained("woven", clip)[0] == [*weave(text, speech), end_of_text]
    assert trained("speech", clip) == ([*speech, end_of_text], [SPEECH] * (len(speech) + 1))
    ids, what = trained("spans", chat)
    assert {TEXT, SPEECH} == set(what) or len(set(what)) == 1
    ids, what = trained("written", chat)
    assert vocabulary.decode_text(ids[:-1]) == "three"
    assert ids[-1] == end
    asr = jobs.example("asr", clip, rng)
    assert asr is not None
    assert list(asr.ids[: len(asr.ids) - len(text) - 1]) == vocabulary.task_prompt(Task.TRANSCRIBE, list(speech))


def test_reading_aloud_is_learned_from_the_reply_voice_alone(vocabulary: Vocabulary, corpus: TokenCorpus) -> None:
    only = Mixture(asr=0, tts=1, woven=0, spans=0, speech=0, text=0, written=0)
    jobs = Jobs(corpus, vocabulary, only, LENGTH)
    rng = np.random.default_rng(0)
    replies = {
        tuple(both(one.turns[0], vocabulary)[1])
        for one in corpus
        if one.task == "clip" and one.turns[0].turn.role is Role.ASSISTANT
    }
    for example in islice(jobs.draws(rng), 40):
        said = tuple(t for t, what in zip(example.ids, example.trains, strict=True) if what == SPEECH)[:-1]
        assert said in replies
    with pytest.raises(ValueError, match="no sample for the job 'tts' fits a row of 3 ids"):
        next(Jobs(corpus, vocabulary, only, 3).draws(rng))
    with pytest.raises(ValueError, match="at least one share"):
        Jobs(corpus, vocabulary, Mixture(0, 0, 0, 0, 0, 0, 0), LENGTH)


def test_a_mixture_without_its_samples_is_refused(vocabulary: Vocabulary, folder: Path, tmp_path: Path) -> None:
    provenance = Provenance("f" * 64, vocabulary.hash)
    write_shard(tmp_path, "all", [dialogue(vocabulary, 1, "train")], provenance, vocabulary.speech_offset)
    write_manifest(tmp_path, provenance)
    with pytest.raises(ValueError, match="asks for 'asr', but the corpus has no sample"):
        Jobs(TokenCorpus(tmp_path), vocabulary, Mixture(), LENGTH)


# The stages.


def pretrain_recipe(folder: Path, steps: int, **changes: object) -> PretrainRecipe:
    loop = LoopConfig(steps, 3e-3, warmup_steps=5, evaluate_every=10**6, sample_every=10**6, log_every=5)
    fields = {"corpus": str(folder / "tokens"), "vocabulary": str(folder / "vocabulary"), "loop": loop}
    fields |= {"language": TINY, "length": LENGTH, "num_rows": 4, "num_valid_rows": 2}
    return PretrainRecipe(**{**fields, **changes})  # type: ignore[arg-type]


def test_batches_are_a_pure_function_of_their_index(folder: Path) -> None:
    one, other = (PretrainStage(pretrain_recipe(folder, 1, corrupt_heard_speech=0.2)) for _ in range(2))
    one.batch(3)
    for name, value in one.batch(5).items():
        assert torch.equal(value, other.batch(5)[name])
    assert not torch.equal(one.batch(5)["input_ids"], one.batch(6)["input_ids"])


def test_both_stages_train_and_write_what_the_next_one_reads(
    vocabulary: Vocabulary, folder: Path, tmp_path: Path
) -> None:
    stage = PretrainStage(pretrain_recipe(folder, 25))
    before = stage.evaluate()
    after = run(stage, stage.recipe.loop, tmp_path / "pretrain")
    assert after["asr/text_nll"] < before["asr/text_nll"]
    assert after["tts/speech_nll"] < before["tts/speech_nll"]
    assert "text/speech_nll" not in after
    assert (tmp_path / "pretrain" / "samples" / "step-0000025" / "transcripts.jsonl").read_text().count("said") == 8
    final = tmp_path / "pretrain" / "final" / "language"
    assert load_provenance(final).vocabulary == vocabulary.hash

    loop = LoopConfig(10, 3e-3, warmup_steps=2, evaluate_every=5, sample_every=10**6, log_every=5)
    recipe = ChatRecipe(
        str(folder / "tokens"),
        str(folder / "vocabulary"),
        str(final),
        loop=loop,
        length=LENGTH,
        num_rows=4,
        num_questions=3,
    )
    chat = ChatStage(recipe)
    metrics = run(chat, loop, tmp_path / "chat")
    assert {"text_nll", "speech_nll", "accuracy_spoken", "accuracy_written"} == set(metrics)
    assert (tmp_path / "chat" / "samples" / "step-0000010" / "replies.jsonl").read_text().count("speech_tokens") == 3
    load_language(tmp_path / "chat" / "final" / "language")


@pytest.mark.slow
def test_a_text_to_token_model_learns_to_read_aloud(vocabulary: Vocabulary, folder: Path, tmp_path: Path) -> None:
    loop = LoopConfig(150, 1e-2, warmup_steps=5, evaluate_every=10**6, sample_every=10**6, log_every=50)
    parts = {"corpus": str(folder / "tokens"), "vocabulary": str(folder / "vocabulary"), "language": TINY}
    recipe = TextToTokenRecipe(**parts, loop=loop, length=LENGTH, num_rows=4, num_valid_rows=2)  # type: ignore[arg-type]
    metrics = run(TextToTokenStage(recipe), loop, tmp_path)
    assert set(metrics) == {"tts/speech_nll"}
    readings = (tmp_path / "samples" / "step-0000150" / "readings.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in readings]
    assert [line["text"] for line in lines] == WORDS[:8]

    model = load_language(tmp_path / "final" / "language")
    talker = TextToTokenTalker(PlainEngine(model, vocabulary), vocabulary)

    async def speak(word: str) -> tuple[int, ...]:
        return tuple([token async for token in talker.speak(word, Sampling(temperature=0.0), "one")])

    right = sum(asyncio.run(speak(word)) == spoken(vocabulary, word * 3, 0) for word in WORDS)
    assert right >= 8


def test_a_resumed_run_equals_an_uninterrupted_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretrainStage, "sample", lambda *_: None)

    def train(steps: int, out: Path) -> PretrainStage:
        # The schedule ends where the run ends, so the learning rate is held.
        loop = LoopConfig(steps, 1e-3, schedule="constant", warmup_steps=1, evaluate_every=10**6, sample_every=10**6)
        stage = PretrainStage(pretrain_recipe(folder, steps, loop=loop))
        run(stage, loop, out)
        return stage

    whole = train(6, tmp_path / "whole")
    train(3, tmp_path / "parts")
    resumed = train(6, tmp_path / "parts")
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_a_model_or_corpus_of_another_tokenizer_is_refused(
    vocabulary: Vocabulary, folder: Path, tmp_path: Path
) -> None:
    save_language(tmp_path / "model", new_glm(vocabulary, TINY), Provenance("0" * 64, vocabulary.hash))
    with pytest.raises(ValueError, match="corpus .* was made with another tokenizer than the model"):
        PretrainStage(pretrain_recipe(folder, 1, start_from=str(tmp_path / "model")))
    Vocabulary.extend(train_text_tokenizer(["x"], 300), codebook_size=64).save(tmp_path / "vocabulary")
    with pytest.raises(ValueError, match="another vocabulary than the vocabulary"):
        PretrainStage(pretrain_recipe(folder, 1, vocabulary=str(tmp_path / "vocabulary")))


def test_any_causal_lm_can_be_the_start(vocabulary: Vocabulary, folder: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    stage = PretrainStage(pretrain_recipe(folder, 2, start_from=str(tmp_path / "llama")))
    assert stage.model.get_input_embeddings().weight.shape[0] == vocabulary.size
    run(stage, stage.recipe.loop, tmp_path / "run")
    assert load_language(tmp_path / "run" / "final" / "language").config.model_type == "llama"


def test_speech_in_a_prompt_stands_between_its_controls(vocabulary: Vocabulary, corpus: TokenCorpus) -> None:
    chats = Chats(corpus, vocabulary, LossMix(0, 0, 1), DialogueAugmentation(0, 0, 0, 0), LENGTH)
    example = chats.example(list(dialogue(vocabulary, 1, "train").turns), np.random.default_rng(0))
    assert example.ids.count(vocabulary.control_id(BEGIN_OF_AUDIO)) == 1


def test_the_recipes_of_pocket_are_recipes() -> None:
    recipes = Path(__file__).parent.parent / "recipes" / "pocket"
    load_config(recipes / "tokens.yaml", TokensRecipe)
    pretrain = load_config(recipes / "pretrain.yaml", PretrainRecipe)
    assert load_config(recipes / "text-to-token.yaml", TextToTokenRecipe).language == pretrain.language
    chat = load_config(recipes / "chat.yaml", ChatRecipe)
    assert pretrain.length <= pretrain.language.max_positions
    assert (chat.corpus, chat.vocabulary) == (pretrain.corpus, pretrain.vocabulary)
