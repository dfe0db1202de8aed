"""The logits processor for vLLM: both adapters draw the ids of our engine, whatever the runner does with its batch."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from duologue.interleave import INTERLEAVED, SPEECH_ONLY, TEXT_ONLY, Kind, Schedule
from duologue.language.drawing import DrawMasks, DrawState, draw_settings, rows_at, rows_of
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.language.vllm_plugin import (
    RunnerV1Processor,
    RunnerV2Processor,
    check_request,
    make_processor,
    read_arguments,
    request_arguments,
)
from duologue.released.random_weights import init_random
from duologue.vllm_processor import Interleave, find_vocabulary
from duologue.vocabulary import Vocabulary
from tests.tiny_language import tiny_model, tiny_vocabulary
from tests.vllm_runners import FakeRunner, Job, SlotStates, foreign_request, request_of, run_v1, run_v2

SHORT = Schedule(3, 5)
LONG = [3 + i % 290 for i in range(150)]
JOBS: list[Job] = [
    ([*range(3, 20)], Sampling(temperature=0.0, max_tokens=45), INTERLEAVED),
    ([*range(3, 9)], Sampling(temperature=1.0, top_p=0.9, max_tokens=40, seed=3), SHORT),
    (LONG, Sampling(temperature=1.5, top_p=1.0, max_tokens=30, seed=2**63 + 9), SHORT),
    ([3, 4, 7, 8], Sampling(temperature=0.7, top_k=5, max_tokens=25, seed=4), TEXT_ONLY),
    ([*range(5, 30)], Sampling(temperature=0.0, speech_temperature=2.0, top_p=1.0, max_tokens=42, seed=5), INTERLEAVED),
    (LONG[:100], Sampling(temperature=5.0, top_p=1.0, max_tokens=20, seed=6), SPEECH_ONLY),
    ([9, 8], Sampling(temperature=3.0, top_p=1.0, max_tokens=24, seed=7, text_language="en"), TEXT_ONLY),
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


@pytest.fixture(scope="module")
def model(vocabulary: Vocabulary) -> PreTrainedModel:
    torch.manual_seed(1)
    return tiny_model(vocabulary)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel, vocabulary: Vocabulary) -> list[list[int]]:
    return [list(PlainEngine(model, vocabulary).stream(*job)) for job in JOBS]


@pytest.fixture
def runner(model: PreTrainedModel, vocabulary: Vocabulary) -> FakeRunner:
    requests = [request_of(job) for job in JOBS]
    return FakeRunner(model, vocabulary, [*requests[:2], foreign_request(6), *requests[2:]])


def ours(runner: FakeRunner) -> list[list[int]]:
    return [request.ids for request in runner.requests if request.params.extra_args is not None]


def config_of(vocabulary: Vocabulary, **rest: Any) -> SimpleNamespace:
    model_config = SimpleNamespace(get_vocab_size=lambda: vocabulary.size, model="nowhere")
    return SimpleNamespace(model_config=model_config, **rest)


@pytest.mark.parametrize("late", [False, True])
def test_runner_v1_draws_the_ids_of_our_engine(runner: FakeRunner, expected: list[list[int]], late: bool) -> None:
    """Moved, swapped, replaced and resumed rows, other programs' requests, and ids that are still on the device."""
    vocabulary = runner.vocabulary
    run_v1(runner, RunnerV1Processor(vocabulary, config_of(vocabulary), torch.device("cpu")), late)
    assert ours(runner) == expected


def test_runner_v2_draws_the_ids_of_our_engine(runner: FakeRunner, expected: list[list[int]]) -> None:
    """Shuffled rows, reused slots that hold old ids, a resumed request and prompts in two steps."""
    vocabulary = runner.vocabulary
    states = SlotStates(4, 512, vocabulary.size)
    run_v2(runner, RunnerV2Processor(vocabulary, config_of(vocabulary, speculative_config=None), states), states)
    assert ours(runner) == expected


def test_runner_v2_counts_only_ids_of_the_reply(vocabulary: Vocabulary) -> None:
    """Text of the prompt before it and old text after it lie in the same slot."""
    states = SlotStates(3, 40, vocabulary.size)
    states.all_token_ids.gpu[:] = vocabulary.encode_text("a")[0]
    states.all_token_ids.gpu[1, 12:14] = vocabulary.speech_id(3)
    processor = RunnerV2Processor(vocabulary, config_of(vocabulary, speculative_config=None), states)
    slots, prompts, lengths = torch.tensor([1, 0, 2]), torch.tensor([10, 5, 39]), torch.tensor([6, 9, 0])
    assert processor._count_text(slots, prompts, lengths, 9).tolist() == [4, 9, 0]


def test_a_hidden_id_that_was_never_drawn_here_is_an_error(vocabulary: Vocabulary) -> None:
    processor = RunnerV1Processor(vocabulary, config_of(vocabulary), torch.device("cpu"))
    request = request_of(JOBS[0])
    added = [(0, request.params, request.prompt, [3, -1])]
    processor.update_state(SimpleNamespace(batch_size=1, removed=[], added=added, moved=[]))
    with pytest.raises(RuntimeError, match="start it with --no-async-scheduling"):
        processor.apply(torch.zeros(1, vocabulary.size))


def test_speculative_decoding_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="speculative decoding cannot run"):
        RunnerV2Processor(
            vocabulary, config_of(vocabulary, speculative_config=object()), SlotStates(1, 8, vocabulary.size)
        )


def test_rows_from_counts_equal_those_of_a_state(vocabulary: Vocabulary) -> None:
    masks = DrawMasks(vocabulary, vocabulary.size, torch.device("cpu"))
    samplings = [Sampling(), Sampling(0.3, 0.9, 0.7, 5, 60, -3, "en")]
    for sampling, schedule in itertools.product(samplings, (SHORT, TEXT_ONLY, SPEECH_ONLY)):
        whole, real = draw_settings(sampling, schedule, masks.text_mask(sampling.text_language))
        state = DrawState(sampling, schedule)
        for step in range(59):
            counts = torch.tensor([state.num_ids]), torch.tensor([state.num_text])
            assert torch.equal(
                rows_at(torch.tensor([whole]), torch.tensor([real]), *counts), rows_of([state.row(masks)])
            )
            allowed = state.allowed
            state.advance(Kind.SPEECH if allowed.speech and (step > 40 or not allowed.text) else Kind.TEXT)


def test_arguments_survive_and_malformed_ones_are_refused() -> None:
    sampling, schedule = Sampling(0.3, None, 0.7, 5, 60, 2**70, "zh"), SHORT
    arguments = request_arguments(sampling, schedule)
    assert all(isinstance(value, str) for value in arguments.values())  # all that vLLM takes over HTTP
    read = read_arguments(arguments)
    assert read is not None
    assert (read.sampling, read.schedule) == (sampling, schedule)
    assert read_arguments({"duologue": json.loads(arguments["duologue"])}) == read
    assert read_arguments(None) is None
    check_request(SimpleNamespace(extra_args={"other": 1}, temperature=1.0, max_tokens=5))
    for given, temperature, max_tokens, message in (
        (arguments, 0.5, 60, "needs temperature 0, got 0.5"),
        (arguments, 0, 61, "needs its max_tokens, 60"),
        ({"duologue": "{"}, 0, 60, "is not JSON"),
        ({"duologue": 3}, 0, 60, "must be an object, not int"),
        ({"duologue": {"sampling": {"temperature": -1}, "schedule": {}}}, 0, 60, "temperature must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            check_request(SimpleNamespace(extra_args=given, temperature=temperature, max_tokens=max_tokens))


def test_the_runner_chooses_the_adapter(vocabulary: Vocabulary) -> None:
    processor: Any = make_processor(lambda folder: vocabulary)
    config = config_of(vocabulary, speculative_config=None)
    assert isinstance(processor(config, torch.device("cpu"), False), RunnerV1Processor)
    assert isinstance(processor(config, SlotStates(2, 8, vocabulary.size)), RunnerV2Processor)
    assert callable(Interleave.validate_params)  # type: ignore[attr-defined]


def test_the_vocabulary_lies_in_the_folder_of_the_model(tmp_path: Path, vocabulary: Vocabulary) -> None:
    vocabulary.save(tmp_path / "converted")
    vocabulary.save(tmp_path / "own" / "vocabulary")
    init_random("tiny", tmp_path / "released")
    released = next(path.parent for path in (tmp_path / "released").rglob("tokenizer.model"))
    assert find_vocabulary(tmp_path / "converted").hash == vocabulary.hash
    assert find_vocabulary(tmp_path / "own" / "language").hash == vocabulary.hash
    assert find_vocabulary(released).codebook_size == 256
    with pytest.raises(ValueError, match="give vLLM the model's folder, not its name"):
        find_vocabulary(Path("owner/name"))
