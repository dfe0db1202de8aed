"""What the engine promises: a request's ids are its own, limits are told, cancelled and failed streams end."""

import asyncio
import copy
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import duologue
from duologue.interleave import INTERLEAVED, SPEECH_ONLY, TEXT_ONLY, InterleaveState, Schedule
from duologue.language.engine import Engine, PlainEngine
from duologue.language.glm import is_plain_glm
from duologue.language.requests import EngineFull
from duologue.language.sampling import Sampling
from duologue.language.stepping import EagerStepper, StepRow
from duologue.vocabulary import Vocabulary
from tests.tiny import write_tiny_chatbot
from tests.tiny_language import tiny_model, tiny_vocabulary, within_budget

Job = tuple[list[int], Sampling, Schedule]

PROMPT = list(range(3, 20))
SHORT = Schedule(3, 5)
LONG = [3 + i % 290 for i in range(300)]
# Two ways to the same scores differ by rounding. Where the best id leads by more than this the engines agree on it.
MARGIN = 1e-3
GIVE_UP_S = 300.0  # a busy machine is not a failing test
JOBS: list[Job] = [
    (PROMPT, Sampling(temperature=0.0, max_tokens=70), INTERLEAVED),
    (PROMPT[:6], Sampling(temperature=1.0, top_p=0.9, max_tokens=90, seed=3), SHORT),
    (LONG, Sampling(temperature=0.0, max_tokens=33), SHORT),
    ([*PROMPT, 7, 8], Sampling(temperature=0.7, top_k=5, max_tokens=40, seed=4), TEXT_ONLY),
    (PROMPT, Sampling(temperature=0.0, speech_temperature=2.0, top_p=1.0, max_tokens=55, seed=5), INTERLEAVED),
    (LONG[:100], Sampling(temperature=5.0, top_p=1.0, max_tokens=25, seed=6), SPEECH_ONLY),
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


@pytest.fixture(scope="module")
def model(vocabulary: Vocabulary) -> PreTrainedModel:
    return tiny_model(vocabulary)


@pytest.fixture
def make(model: PreTrainedModel, vocabulary: Vocabulary) -> Callable[..., PlainEngine]:
    return lambda **limits: PlainEngine(model, vocabulary, **limits)


@pytest.fixture
def solo(model: PreTrainedModel, vocabulary: Vocabulary) -> Callable[[Job], list[int]]:
    return lambda job: list(PlainEngine(model, vocabulary).stream(*job))


async def collect(engine: Engine, job: Job, name: str | None = None) -> list[int]:
    return [token async for token in engine.generate(*job, name)]


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.005)


def agree(got: Sequence[int], expected: Sequence[int], job: Job, model: PreTrainedModel, vocab: Vocabulary) -> bool:
    """Whether two greedy replies are equal as far as no choice was closer than the margin."""
    prompt, sampling, schedule = job
    state = InterleaveState(schedule)
    for i, (a, b) in enumerate(zip(got, expected, strict=False)):
        if a != b:
            with torch.no_grad():
                scores = model(torch.tensor([[*prompt, *expected[:i]]])).logits[0, -1]
            allowed = within_budget(state, sampling.max_tokens - i)
            best = scores[[j for j in range(vocab.size) if vocab.kind(j) in allowed]].topk(2).values
            return float(best[0] - best[1]) <= MARGIN
        state.advance(vocab.kind(b))
    return len(got) == len(expected)


def test_every_reply_of_a_mixed_batch_equals_its_solo_run(
    make: Callable[..., PlainEngine],
    solo: Callable[[Job], list[int]],
    model: PreTrainedModel,
    vocabulary: Vocabulary,
) -> None:
    """Different schedules, temperatures, seeds and lengths; some join late, when others are under way."""
    engine = make(max_step_tokens=64)

    async def late(job: Job, after: int) -> list[int]:
        await until(lambda: engine.num_computed >= after)
        return await collect(engine, job)

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(late(job, 60 * (i // 2)) for i, job in enumerate(JOBS)))

    replies = asyncio.run(together())
    for job, reply in zip(JOBS, replies, strict=True):
        if job[1].temperature == 0.0 and job[1].speech_temperature is None:
            assert agree(reply, solo(job), job, model, vocabulary)
        else:
            assert reply == solo(job)
    assert engine.running == 0


def test_a_turn_that_goes_on_computes_little_of_what_was_there(
    make: Callable[..., PlainEngine], solo: Callable[[Job], list[int]]
) -> None:
    engine = make()
    sampling = Sampling(temperature=0.0, max_tokens=20)

    async def run() -> None:
        first = await collect(engine, (LONG, sampling, SHORT))
        before = engine.num_computed
        job = ([*LONG, *first, 5, 6, 7], sampling, SHORT)
        assert await collect(engine, job) == solo(job)
        assert engine.num_computed - before <= 32 + 3 + 20 + 1
        before = engine.num_computed
        job = ([*LONG[:200], 9, 9], sampling, SHORT)  # another way from the same beginning
        assert await collect(engine, job) == solo(job)
        assert engine.num_computed - before <= 32 + 2 + 20

    asyncio.run(run())


def test_warming_leaves_only_what_is_new(make: Callable[..., PlainEngine], solo: Callable[[Job], list[int]]) -> None:
    engine = make(max_step_tokens=64)
    sampling = Sampling(temperature=0.0, max_tokens=5)

    async def run() -> None:
        await engine.warm(LONG[:250])
        assert engine.num_computed == 250
        job = (LONG, sampling, INTERLEAVED)
        assert await collect(engine, job) == solo(job)
        assert engine.num_computed - 250 <= 50 + 32 + 5
        other = [*reversed(LONG)]
        warming = asyncio.create_task(engine.warm(other))
        before = engine.num_computed
        await until(lambda: engine.num_computed > before)  # it is under way: the reply takes it over
        job = ([*other, 3], sampling, INTERLEAVED)
        assert await collect(engine, job) == solo(job)
        await warming
        assert engine.num_computed - before <= 301 + 64 + 32 + 5
        await engine.warm(LONG * 2 if len(LONG) * 2 <= engine.max_positions else LONG)
        with pytest.raises(ValueError, match="512 positions"):
            await engine.warm(LONG * 2)

    asyncio.run(run())


def test_beyond_the_limits_a_request_is_refused_in_one_sentence(make: Callable[..., PlainEngine]) -> None:
    engine = make(max_sessions=2, max_cached_tokens=300, max_unread=4)
    assert (engine.max_sessions, engine.max_cached_tokens, engine.max_positions) == (2, 300, 512)

    async def run() -> None:
        job = (PROMPT, Sampling(temperature=1.0, max_tokens=100), SPEECH_ONLY)
        first, second = engine.generate(*job, "first"), engine.generate(*job, "second")
        await anext(first), await anext(second)
        assert engine.running == 2
        with pytest.raises(EngineFull, match="2 replies are running.* at most 2 at a time"):
            await collect(engine, job)
        await second.aclose()  # type: ignore[attr-defined]
        assert engine.running == 1
        with pytest.raises(EngineFull, match="reply of up to 200 do not fit with the 117 .* at most 300 ids"):
            await collect(engine, (PROMPT, Sampling(max_tokens=200), SPEECH_ONLY))
        engine.cancel("first")
        assert engine.running == 0
        assert [token async for token in first] == []
        assert await collect(engine, (PROMPT, Sampling(max_tokens=200), SPEECH_ONLY))

    asyncio.run(run())


@pytest.mark.parametrize("limit", ["max_sessions", "max_cached_tokens", "max_unread"])
def test_limits_below_one_are_refused(make: Callable[..., PlainEngine], limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} must be at least 1, got 0"):
        make(**{limit: 0})


def test_cancel_ends_the_stream_at_once_and_frees_its_place_within_a_step(
    make: Callable[..., PlainEngine], solo: Callable[[Job], list[int]]
) -> None:
    engine = make()
    job = (PROMPT, Sampling(temperature=1.0, max_tokens=300), SPEECH_ONLY)
    other = (LONG[:60], Sampling(temperature=1.0, max_tokens=80, seed=2), SHORT)

    async def run() -> None:
        beside = asyncio.create_task(collect(engine, other))
        got = []
        async for token in engine.generate(*job, "a"):
            got.append(token)
            if len(got) == 4:
                engine.cancel("a")
        assert len(got) == 4
        assert engine.running <= 1
        computed = engine.num_computed
        await until(lambda: beside.done() or engine.num_computed >= computed + 2)
        assert await beside == solo(other)
        engine.cancel("a")  # nothing is running any more
        assert await collect(engine, (PROMPT, Sampling(max_tokens=3), SPEECH_ONLY), "a")
        assert engine.running == 0

    asyncio.run(run())


def test_a_reader_that_does_not_read_holds_up_itself_alone(
    make: Callable[..., PlainEngine], solo: Callable[[Job], list[int]]
) -> None:
    engine = make(max_unread=8)
    slow = (PROMPT, Sampling(temperature=1.0, max_tokens=60, seed=1), SPEECH_ONLY)
    quick = (PROMPT, Sampling(temperature=1.0, max_tokens=40, seed=2), SPEECH_ONLY)

    async def run() -> None:
        stream = engine.generate(*slow)
        got = [await anext(stream)]
        for _ in range(2):
            before = engine.num_computed
            assert await collect(engine, quick) == solo(quick)
            assert engine.num_computed - before <= len(PROMPT) + 40 + 9  # nine more of the slow one at most
        got += [token async for token in stream]
        assert got == solo(slow)
        # Left while it is held: its place is free at once.
        stream = engine.generate(*slow)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert engine.running == 0

    asyncio.run(run())


def test_an_error_in_the_thread_ends_all_streams_with_it_and_the_next_request_works(
    make: Callable[..., PlainEngine], solo: Callable[[Job], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    job = (PROMPT, Sampling(temperature=1.0, max_tokens=40), SPEECH_ONLY)
    broken = threading.Event()
    assert isinstance(engine.stepper, EagerStepper)
    model = engine.stepper.model
    forward = model.forward

    def breaking(*args: Any, **kwargs: Any) -> Any:
        if broken.is_set():
            raise ArithmeticError("the sum did not come out")
        return forward(*args, **kwargs)

    async def run() -> None:
        streams = [engine.generate(*job), engine.generate(*job)]
        for stream in streams:
            await anext(stream)
        broken.set()
        for stream in streams:
            with pytest.raises(RuntimeError, match="engine failed: ArithmeticError: the sum") as caught:
                async for _ in stream:
                    pass
            assert isinstance(caught.value.__cause__, ArithmeticError)
        with pytest.raises(RuntimeError, match="engine failed"):
            await engine.warm(LONG)
        broken.clear()
        await until(lambda: engine.running == 0)
        assert await collect(engine, job) == solo(job)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", breaking)
        asyncio.run(run())


def test_readers_have_event_loops_of_their_own_and_one_that_is_gone_harms_nobody(
    make: Callable[..., PlainEngine], solo: Callable[[Job], list[int]]
) -> None:
    engine = make()
    jobs = [(PROMPT, Sampling(temperature=1.0, max_tokens=60, seed=seed), SPEECH_ONLY) for seed in range(3)]
    replies: dict[int, list[int]] = {}

    def read(number: int) -> None:
        replies[number] = asyncio.run(collect(engine, jobs[number]))

    def read_and_leave() -> None:
        loop = asyncio.new_event_loop()
        stream = engine.generate(*jobs[0], "left")
        loop.run_until_complete(anext(stream))
        pending: Awaitable[int] = anext(stream)
        task: asyncio.Task[int] = loop.create_task(pending)  # type: ignore[arg-type]
        loop.call_soon(loop.stop)
        loop.run_forever()
        del task
        loop.close()  # with a reader that waits

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in [threading.Thread(target=read_and_leave), *threads]:
        thread.start()
        thread.join() if thread not in threads else None
    for thread in threads:
        thread.join()
    assert [replies[number] for number in range(3)] == [solo(job) for job in jobs]
    engine.cancel("left")
    assert engine.running == 0


def test_same_name_twice_and_bad_prompts_are_refused(make: Callable[..., PlainEngine]) -> None:
    engine = make()

    async def run() -> None:
        stream = engine.generate(PROMPT, Sampling(max_tokens=100), SPEECH_ONLY, "b")
        await anext(stream)
        for prompt, sampling, match in (
            (PROMPT, Sampling(max_tokens=3), "'b' is already running"),
            ([], Sampling(max_tokens=3), "at least one id"),
            ([10**6], Sampling(max_tokens=3), "outside of the vocabulary"),
            (PROMPT, Sampling(max_tokens=500), "do not fit the 512 positions"),
        ):
            with pytest.raises(ValueError, match=match):
                await anext(engine.generate(prompt, sampling, SPEECH_ONLY, "b"))
        await stream.aclose()  # type: ignore[attr-defined]
        assert engine.running == 0

    asyncio.run(run())


@pytest.mark.parametrize("way", ["by its weights", "hooked", "a Llama"])
def scores_of(stepper: EagerStepper, rows: Sequence[tuple[int, int, list[int]]]) -> torch.Tensor:
    """Runs (slot, start, ids) of each row; scores (rows, V) of the next ids."""
    stepped = stepper.step([StepRow(*row, wants_scores=True) for row in rows])
    return torch.stack([one.scores for one in stepped if one.scores is not None])


@pytest.mark.parametrize("way", ["by its weights", "hooked", "a Llama"])
@pytest.mark.parametrize("slots", [(0, 1, 2, 3), (3, 0, 1, 2), (9, 2, 40, 5)], ids=["together", "turned", "apart"])
def test_scores_side_by_side_equal_those_of_whole_sequences(
    model: PreTrainedModel, vocabulary: Vocabulary, way: str, slots: tuple[int, ...]
) -> None:
    """Rows that begin, go on by several ids and by one, in one step; other programs use the model as ever."""
    if way == "a Llama":
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=model.config.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
        model = LlamaForCausalLM(config).eval()
        model.get_input_embeddings().weight.data.mul_(20.0)
    stepper = EagerStepper(model, vocabulary)
    calls: list[object] = []
    if way == "hooked":
        stepper.model.get_submodule("model.layers.1").register_forward_pre_hook(lambda *_: calls.append(_))
    sequences = [LONG[:40], LONG[50:57], LONG[100:102], LONG[9:10]]
    lengths = [len(s) - 1 for s in sequences]
    scores_of(stepper, [(slot, 0, s[:-1]) for slot, s in zip(slots[:3], sequences, strict=False)])
    grown = [[*s, *LONG[i : i + 300 * (i == 0)]] for i, s in enumerate(sequences)]
    scores = scores_of(stepper, [(slot, n, s[n:]) for slot, n, s in zip(slots, lengths, grown, strict=True)])

    def expected(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([model(torch.tensor([s])).logits[0, -1] for s in sequences])

    torch.testing.assert_close(scores, expected(grown), atol=1e-4, rtol=0.0)
    singles = [[*s, 7] for s in grown]  # one id for each row, of unequal lengths
    scores = scores_of(stepper, [(slot, len(s) - 1, s[-1:]) for slot, s in zip(slots, singles, strict=True)])
    torch.testing.assert_close(scores, expected(singles), atol=1e-4, rtol=0.0)
    stepper.copy_prefix(slots[0], 7, 30)
    again = scores_of(stepper, [(7, 30, grown[0][30:])])
    torch.testing.assert_close(again, expected(grown[:1]), atol=1e-4, rtol=0.0)
    stepper.keep_only([slots[1]])
    left = scores_of(stepper, [(slots[1], len(singles[1]), [8])])
    torch.testing.assert_close(left, expected([[*singles[1], 8]]), atol=1e-4, rtol=0.0)
    assert len(calls) == (5 if way == "hooked" else 0)


def test_a_glm_with_other_modules_is_run_as_the_library_does(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    assert is_plain_glm(model)

    class Louder(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    other = copy.deepcopy(model)
    projection = other.get_submodule("model.layers.0.mlp.down_proj")
    louder = Louder(projection.in_features, projection.out_features, bias=False)
    louder.weight = projection.weight
    other.get_submodule("model.layers.0.mlp").down_proj = louder
    assert not is_plain_glm(other)
    scores = scores_of(EagerStepper(other, vocabulary), [(0, 0, LONG[:20])])
    with torch.no_grad():
        expected = other(torch.tensor([LONG[:20]])).logits[:, -1]
        assert (model(torch.tensor([LONG[:20]])).logits[:, -1] - expected).abs().max() > 0.01
    torch.testing.assert_close(scores, expected, atol=2e-4, rtol=0.0)
    other.config.hidden_act = "gelu"
    assert not is_plain_glm(other)


def test_others_use_the_model_during_a_step(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """A training that goes on while a reply is still made: its own way of attending, its own gradients."""
    ids = torch.tensor([LONG[:30]])
    expected = model(ids).logits.detach()
    side_by_side = EagerStepper(model, vocabulary)
    meanwhile = []

    def use(*_: object) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            meanwhile.append(model(ids).logits)

    layer = side_by_side.model.get_submodule("model.layers.1")
    handle = layer.register_forward_pre_hook(use)
    scores_of(side_by_side, [(0, 0, LONG[:20])])
    handle.remove()
    torch.testing.assert_close(meanwhile[0].detach(), expected)
    meanwhile[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad(set_to_none=True)
    for weight, same in zip(model.parameters(), side_by_side.model.parameters(), strict=True):
        assert weight is same


def test_a_model_with_other_attention_is_refused(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    sliding = copy.deepcopy(model)
    sliding.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="full_attention, sliding_attention cannot run here"):
        PlainEngine(sliding, vocabulary)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("continuous", "engine 'continuous' was removed, because it was slower than 'plain': leave the option out"),
        ("fast", "unknown engine 'fast'; the only choice is plain"),
    ],
)
def test_another_engine_is_refused_in_one_sentence(tmp_path: Path, name: str, message: str) -> None:
    folder = write_tiny_chatbot(tmp_path, max_tokens=40)
    with pytest.raises(ValueError, match=f"^{message}$"):
        duologue.load(folder, engine=name)  # type: ignore[arg-type]
