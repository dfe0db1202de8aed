"""The plain engine: legal replies whatever the model wants, caches that change nothing, requests of their own."""

import asyncio
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from duologue.interleave import (
    INTERLEAVED,
    SPEECH_ONLY,
    TEXT_ONLY,
    InterleaveState,
    Kind,
    Schedule,
    split,
)
from duologue.language.engine import Engine, PlainEngine
from duologue.language.sampling import GREEDY, Sampling
from duologue.vocabulary import Vocabulary
from tests.tiny_language import tiny_model, tiny_vocabulary, within_budget

PROMPT = list(range(3, 20))
SHORT = Schedule(3, 5)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


@pytest.fixture(scope="module")
def model(vocabulary: Vocabulary) -> PreTrainedModel:
    return tiny_model(vocabulary)


@pytest.fixture
def engine(model: PreTrainedModel, vocabulary: Vocabulary) -> PlainEngine:
    return PlainEngine(model, vocabulary)


def reference(
    model: PreTrainedModel, vocabulary: Vocabulary, prompt: Sequence[int], schedule: Schedule, n: int
) -> list[int]:
    """Greedy decoding without any cache: the whole sequence anew for each id."""
    ids, state = list(prompt), InterleaveState(schedule)
    while len(ids) < len(prompt) + n and not state.ended:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1]
        allowed = within_budget(state, len(prompt) + n - len(ids))
        ids_of = {
            kind: [i for i in range(vocabulary.size) if vocabulary.kind(i) is kind] for kind in Kind if kind in allowed
        }
        likeliest = max(ids_of.values(), key=lambda open_ids: float(scores[open_ids].exp().sum()))
        token = likeliest[int(scores[likeliest].argmax())]
        ids.append(token)
        state.advance(vocabulary.kind(token))
    return ids[len(prompt) :]


@pytest.mark.parametrize("schedule", [INTERLEAVED, SHORT, TEXT_ONLY, SPEECH_ONLY])
def test_greedy_equals_decoding_without_a_cache(
    engine: PlainEngine, model: PreTrainedModel, vocabulary: Vocabulary, schedule: Schedule
) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=60)
    assert list(engine.stream(PROMPT, sampling, schedule)) == reference(model, vocabulary, PROMPT, schedule, 60)


@settings(max_examples=25)
@given(
    st.sampled_from([INTERLEAVED, SHORT, TEXT_ONLY, SPEECH_ONLY]), st.integers(1, 50), st.integers(0, 2**31), st.data()
)
def test_every_reply_is_legal_and_may_stand_as_it_is(
    model: PreTrainedModel, vocabulary: Vocabulary, schedule: Schedule, max_tokens: int, seed: int, data: st.DataObject
) -> None:
    sampling = Sampling(
        temperature=data.draw(st.sampled_from([0.0, 1.0, 50.0])),
        top_p=data.draw(st.sampled_from([0.5, 1.0])),
        top_k=data.draw(st.sampled_from([None, 3])),
        max_tokens=max_tokens,
        seed=seed,
    )
    reply = list(PlainEngine(model, vocabulary).stream(PROMPT, sampling, schedule))
    assert 1 <= len(reply) <= max_tokens
    parts = split(reply, vocabulary.kind, schedule)  # raises where an id stands wrongly
    assert parts.state.ended or (len(reply) == max_tokens and parts.state.allowed.end)


def test_a_seed_gives_a_reply_and_nothing_else_does(engine: PlainEngine) -> None:
    def reply(seed: int) -> list[int]:
        return list(engine.stream(PROMPT, Sampling(temperature=1.0, top_p=1.0, max_tokens=30, seed=seed)))

    torch.manual_seed(1)
    first = reply(7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert reply(7) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert reply(8) != first


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 0}, {"max_tokens": 0}, {"speech_temperature": -0.1}]
)
def test_bad_sampling_names_the_value(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_speech_has_a_temperature_of_its_own(engine: PlainEngine, vocabulary: Vocabulary) -> None:
    """Greedy where text may come: the text is that of the greedy reply, as long as the speech before it is the same."""
    greedy = list(engine.stream(PROMPT, Sampling(temperature=0.0, max_tokens=12), SHORT))
    hot = Sampling(temperature=0.0, speech_temperature=3.0, top_p=1.0, max_tokens=12)
    warm = list(engine.stream(PROMPT, hot, SHORT))
    first = next(i for i, token in enumerate(greedy) if vocabulary.kind(token) is Kind.SPEECH)
    assert warm[:first] == greedy[:first]
    assert warm != greedy


def test_a_turn_that_continues_a_conversation_costs_only_its_new_ids(
    model: PreTrainedModel, vocabulary: Vocabulary
) -> None:
    engine = PlainEngine(model, vocabulary)
    sampling = Sampling(temperature=0.0, max_tokens=20)
    reply = list(engine.stream(PROMPT, sampling, SHORT))
    prompt = [*PROMPT, *reply, 5, 6, 7]
    engine.num_computed = 0
    continued = list(engine.stream(prompt, sampling, SHORT))
    # The last id of the reply was not run yet, and the last of this reply is not either.
    assert engine.num_computed == 1 + 3 + len(continued) - 1
    assert continued == list(PlainEngine(model, vocabulary).stream(prompt, sampling, SHORT))


def test_another_way_from_a_shared_beginning_leaves_the_first_conversation_alone(
    model: PreTrainedModel, vocabulary: Vocabulary
) -> None:
    engine = PlainEngine(model, vocabulary)
    sampling = Sampling(temperature=0.0, max_tokens=20)
    reply = list(engine.stream(PROMPT, sampling, SHORT))
    engine.num_computed = 0
    forked = [*PROMPT, *reply[:4], 9, 9]  # as after an interruption
    expected = list(PlainEngine(model, vocabulary).stream(forked, sampling, SHORT))
    got = list(engine.stream(forked, sampling, SHORT))
    assert got == expected
    assert engine.num_computed == 2 + len(got) - 1
    engine.num_computed = 0
    assert list(engine.stream(PROMPT, sampling, SHORT)) == reply
    assert engine.num_computed == 1 + len(reply) - 1


def test_warm_leaves_only_what_is_new(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    engine = PlainEngine(model, vocabulary)
    engine.prefill(PROMPT[:10])
    assert engine.num_computed == 10
    assert engine.cached_prefix(PROMPT) == 10
    assert engine.cached_prefix([PROMPT[0] + 1, *PROMPT]) == 0
    engine.prefill(PROMPT)
    assert engine.num_computed == len(PROMPT)
    sampling = Sampling(temperature=0.0, max_tokens=5)
    reply = list(engine.stream(PROMPT, sampling))
    assert engine.num_computed == len(PROMPT) + len(reply) - 1
    assert reply == list(PlainEngine(model, vocabulary).stream(PROMPT, sampling))


def test_kept_caches_are_bounded(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    engine = PlainEngine(model, vocabulary, max_caches=2, max_cached_tokens=30)
    for first in range(5):
        engine.prefill([first, *range(10, 20)])
    assert engine.cached_tokens == 22
    engine.prefill([7, *range(10, 35)])
    assert engine.cached_tokens == 26
    engine.prefill(list(range(40)))  # has no room at all: a hint that cannot be followed
    assert engine.cached_tokens == 26


def test_two_replies_at_once_equal_those_alone(
    engine: PlainEngine, model: PreTrainedModel, vocabulary: Vocabulary
) -> None:
    samplings = [Sampling(temperature=1.0, max_tokens=25, seed=seed) for seed in range(3)]
    prompts = [PROMPT, PROMPT, [*PROMPT[:6], 30, 31]]

    async def collect(prompt: list[int], sampling: Sampling) -> list[int]:
        return [token async for token in engine.generate(prompt, sampling, SHORT)]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*map(collect, prompts, samplings))

    alone = [
        list(PlainEngine(model, vocabulary).stream(prompt, sampling, SHORT))
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    assert asyncio.run(together()) == alone


def test_cancel_ends_the_stream_and_frees_the_id(engine: PlainEngine) -> None:
    async def run() -> None:
        served: Engine = engine
        got = []
        async for token in served.generate(PROMPT, Sampling(temperature=1.0, max_tokens=200), request_id="a"):
            got.append(token)
            if len(got) == 4:
                served.cancel("a")
        assert 4 <= len(got) <= 5  # one more was under way at most
        served.cancel("a")  # nothing is running any more
        again = [token async for token in served.generate(PROMPT, Sampling(max_tokens=3), request_id="a")]
        assert again

    asyncio.run(run())


def test_a_reader_that_leaves_frees_the_id_too(engine: PlainEngine) -> None:
    async def run() -> None:
        stream = engine.generate(PROMPT, GREEDY.__class__(max_tokens=100), request_id="b")
        await anext(stream)
        with pytest.raises(ValueError, match="'b' is already running"):
            await anext(engine.generate(PROMPT, Sampling(max_tokens=3), request_id="b"))
        await stream.aclose()  # type: ignore[attr-defined]
        await engine.warm(PROMPT)  # behind the closing of the stream
        assert [token async for token in engine.generate(PROMPT, Sampling(max_tokens=3), request_id="b")]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "match"),
    [([], "at least one id"), ([100000], "outside of the vocabulary"), ([-1], "outside"), ([1] * 600, "512 positions")],
)
def test_bad_prompts_are_refused_at_once(engine: PlainEngine, prompt: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        engine.stream(prompt, Sampling(max_tokens=1))


def test_prompt_and_reply_must_fit_the_positions(engine: PlainEngine) -> None:
    with pytest.raises(ValueError, match="max_tokens = 500"):
        engine.stream(PROMPT, Sampling(max_tokens=500))


def test_inference_mode_does_not_leak(engine: PlainEngine) -> None:
    stream = engine.stream(PROMPT, Sampling(max_tokens=5))
    next(stream)
    assert not torch.is_inference_mode_enabled()
