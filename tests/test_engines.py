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
from transformers import PreTrainedModel

import duologue
from duologue.interleave import INTERLEAVED, SPEECH_ONLY, TEXT_ONLY, InterleaveState, Schedule
from duologue.language.engine import Engine, PlainEngine, common_prefix
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


def test_memory_that_runs_out_costs_the_kept_caches_and_no_reply(
    make: Callable[..., PlainEngine], solo: Callable[[Job], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    job = (PROMPT, Sampling(temperature=1.0, max_tokens=40), SPEECH_ONLY)
    step, failures = engine.stepper.step, [3]

    def failing(rows: Sequence[StepRow]) -> Any:
        """Runs out of memory while anything is kept, and half-way through the step."""
        if engine.cached_tokens > 100 and failures[0]:
            failures[0] -= 1
            step(rows)  # its keys and values are written; nothing else may have changed
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(rows)

    engine.prefill(LONG)
    expected = solo(job)
    monkeypatch.setattr(engine.stepper, "step", failing)
    assert list(engine.stream(*job)) == expected
    assert failures == [2]
    assert engine.cached_prefix(LONG) == len(PROMPT)  # those of the reply
    assert engine.cached_prefix([*PROMPT, *expected]) == len(PROMPT) + 39

    def empty(rows: Sequence[StepRow]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.stepper, "step", empty)
    with pytest.raises(RuntimeError, match="engine failed: OutOfMemoryError"):
        list(engine.stream(*job))
    monkeypatch.setattr(engine.stepper, "step", step)
    assert list(engine.stream(*job)) == expected


def test_slots_of_a_fixed_number_are_shared_by_replies_and_kept_caches(
    make: Callable[..., PlainEngine], model: PreTrainedModel, vocabulary: Vocabulary, solo: Callable[[Job], list[int]]
) -> None:
    stepper = EagerStepper(model, vocabulary)
    stepper.num_slots = 2
    used: set[int] = set()
    step = stepper.step

    def watched(rows: Sequence[StepRow]) -> Any:
        used.update(row.slot for row in rows)
        assert len({row.slot for row in rows}) == len(rows)
        return step(rows)

    stepper.step = watched  # type: ignore[method-assign]
    engine = make(stepper=stepper, max_sessions=2, max_caches=1)
    jobs: list[Job] = [
        ([*LONG[: 20 + 7 * i], *LONG[i : i + 9]], Sampling(temperature=1.0, max_tokens=20, seed=i), SHORT)
        for i in range(6)
    ]

    async def run() -> None:
        for first, second in zip(jobs[::2], jobs[1::2], strict=True):
            await asyncio.gather(engine.warm(first[0][:9]), engine.warm(second[0]))
            replies = await asyncio.gather(collect(engine, first), collect(engine, second))
            assert list(replies) == [solo(first), solo(second)]

    asyncio.run(run())
    assert used == {0, 1}


def test_the_longestcommon_prefix_is_found_at_every_length() -> None:
    ids = list(range(200))
    for length in range(201):
        assert common_prefix(ids, [*ids[:length], -1, *ids[length + 1 :]]) == length
        assert common_prefix(ids[:length], ids) == length
        assert common_prefix(ids, tuple(ids[:length])) == length


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


def test_a_model_with_other_attention_is_refused(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    sliding = copy.deepcopy(model)
    sliding.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="full_attention, sliding_attention cannot run here"):
        PlainEngine(sliding, vocabulary)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("continuous", "engine 'continuous' was removed, because it was slower than 'plain': leave the option out"),
        ("fast", "unknown engine 'fast'; the choices are plain, graphs and vllm"),
        ("vllm", "engine 'vllm' needs the URL of its server, such as http://127.0.0.1:8001"),
    ],
)
def test_another_engine_is_refused_in_one_sentence(tmp_path: Path, name: str, message: str) -> None:
    folder = write_tiny_chatbot(tmp_path, max_tokens=40)
    with pytest.raises(ValueError, match=f"^{message}$"):
        duologue.load(folder, engine=name)  # type: ignore[arg-type]
