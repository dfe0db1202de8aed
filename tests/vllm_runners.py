"""The two model runners of vLLM as far as a logits processor sees them, over a model of transformers."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duologue.interleave import Kind, Schedule
from duologue.language.sampling import Sampling
from duologue.language.vllm_plugin import RunnerV1Processor, RunnerV2Processor, request_arguments
from duologue.vocabulary import Vocabulary

Job = tuple[list[int], Sampling, Schedule]
ONE_WAY, SWAP = SimpleNamespace(name="UNIDIRECTIONAL"), SimpleNamespace(name="SWAP")
PREEMPTED_AT, SWAPPED_EVERY = 9, 5


@dataclass(eq=False)
class VllmRequest:
    """A request; `output` is what vLLM shows of `ids`, with -1 for an id that is still on the device."""

    prompt: list[int]
    params: Any
    ids: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    ended: bool = False


def request_of(job: Job) -> VllmRequest:
    prompt, sampling, schedule = job
    arguments = request_arguments(sampling, schedule)
    return VllmRequest(prompt, SimpleNamespace(extra_args=arguments, temperature=0, max_tokens=sampling.max_tokens))


def foreign_request(max_tokens: int) -> VllmRequest:
    """A request of another program, which no processor may touch."""
    return VllmRequest([5, 6], SimpleNamespace(extra_args=None, temperature=0, max_tokens=max_tokens))


@dataclass
class FakeRunner:
    """Runs requests, at most three at once. One is preempted, ended ones make room for waiting ones."""

    model: PreTrainedModel
    vocabulary: Vocabulary
    requests: Sequence[VllmRequest]

    def scores(self, request: VllmRequest, num_ids: int | None = None) -> Tensor:
        with torch.inference_mode():
            ids = [*request.prompt, *request.ids][:num_ids]
            scores: Tensor = self.model(torch.tensor([ids])).logits[0, -1].float()
            return scores

    def sample(self, batch: Sequence[VllmRequest], apply: Callable[[Tensor], Tensor], logits: Tensor) -> list[int]:
        """Returns the argmax, and checks which scores remain."""
        after = apply(logits.clone())
        for row, request in enumerate(batch):
            if request.params.extra_args is None:
                assert torch.equal(after[row], logits[row])
            else:
                assert int(after[row].isfinite().sum()) == 1
        return after.argmax(1).tolist()

    def take(self, request: VllmRequest, token: int) -> None:
        request.ids.append(token)
        is_end = self.vocabulary.kind(token) is Kind.END and request.params.extra_args is not None
        request.ended = is_end or len(request.ids) == request.params.max_tokens


def run_v1(runner: FakeRunner, processor: RunnerV1Processor, late: bool) -> None:
    """Runs all requests as runner V1. `late` shows each id one step later than it was drawn, as async scheduling."""
    waiting, batch, step = [*runner.requests], list[VllmRequest](), 0
    while waiting or batch:
        step += 1
        removed: list[int] = []
        added: list[Any] = []
        moved: list[Any] = []
        for index in reversed(range(len(batch))):
            request, preempted = batch[index], step == PREEMPTED_AT and index == 0
            if not request.ended and not preempted:
                continue
            if waiting:  # another takes the row, which nobody reports as removed
                batch[index] = waiting.pop(0)
                added.append(_added(index, batch[index]))
            else:
                removed.append(index)
                last = batch.pop()
                if index < len(batch):
                    batch[index] = last
                    moved.append((len(batch), index, ONE_WAY))
            if preempted and not request.ended:
                request.output = [*request.ids]  # a resumed request has a list of its own
                waiting.append(request)
        while waiting and len(batch) < 3 and not moved:
            batch.append(waiting.pop(0))
            added.append(_added(len(batch) - 1, batch[-1]))
        if step % SWAPPED_EVERY == 0 and len(batch) > 1:
            batch[0], batch[1] = batch[1], batch[0]
            moved.append((0, 1, SWAP))
        changes = SimpleNamespace(batch_size=len(batch), removed=removed, added=added, moved=moved)
        processor.update_state(changes if removed or added or moved else None)
        if not batch:
            continue
        tokens = runner.sample(batch, processor.apply, torch.stack([runner.scores(request) for request in batch]))
        for request, token in zip(batch, tokens, strict=True):
            request.output[:] = request.ids
            runner.take(request, token)
            request.output.append(-1 if late else token)


def _added(index: int, request: VllmRequest) -> tuple[int, Any, list[int], list[int]]:
    return index, request.params, request.prompt, request.output


class SlotStates:
    """`LogitsProcRequestState`, with old ids left in every slot."""

    def __init__(self, num_slots: int, num_positions: int, vocab_size: int) -> None:
        self.device, self.max_num_reqs, self.vocab_size = torch.device("cpu"), num_slots, vocab_size
        old = torch.randint(0, vocab_size, (num_slots, num_positions), dtype=torch.int32)
        self.all_token_ids = SimpleNamespace(gpu=old)
        lengths = torch.zeros(num_slots, dtype=torch.int32)
        self.prompt_len = SimpleNamespace(gpu=lengths, np=lengths.numpy())


def run_v2(runner: FakeRunner, processor: RunnerV2Processor, states: SlotStates) -> None:
    """Runs all requests as runner V2: the rows are shuffled in every step, and long prompts take two steps."""
    waiting, step, shuffle = [*runner.requests], 0, random.Random(0).shuffle
    slots: dict[VllmRequest, int] = {}
    is_whole: set[VllmRequest] = set()
    while waiting or slots:
        step += 1
        for request in [*slots]:
            preempted = step == PREEMPTED_AT and request is next(iter(slots))
            if request.ended or preempted:
                del slots[request]
                is_whole.discard(request)
                waiting += [] if request.ended else [request]
        while waiting and len(slots) < 3:
            request = waiting.pop(0)
            slot = slots[request] = min({*range(states.max_num_reqs)} - {*slots.values()})
            history = [*request.prompt, *request.ids]
            states.all_token_ids.gpu[slot, : len(history)] = torch.tensor(history, dtype=torch.int32)
            states.prompt_len.np[slot] = len(request.prompt)
            processor.add_request(slot, request.params)
        processor.apply_staged_writes()
        if not slots:
            continue
        batch = [*slots]
        shuffle(batch)
        sizes = [len(request.prompt) + len(request.ids) for request in batch]
        sizes = [s if r in is_whole or s < 100 else s // 2 for r, s in zip(batch, sizes, strict=True)]
        mapping = torch.tensor([slots[request] for request in batch], dtype=torch.int32)
        context = SimpleNamespace(
            expanded_idx_mapping=mapping,
            idx_mapping=mapping,
            idx_mapping_np=mapping.numpy(),
            pos=torch.tensor(sizes) - 1,
            seq_lens_upper_bound_np=np.array(sizes, np.int32),
        )
        logits = torch.stack([runner.scores(*row) for row in zip(batch, sizes, strict=True)])

        def apply(scores: Tensor, context: Any = context) -> Tensor:
            return processor.apply(scores, context)

        for request, size, token in zip(batch, sizes, runner.sample(batch, apply, logits), strict=True):
            if size < len(request.prompt) + len(request.ids):
                is_whole.add(request)  # the rest of the prompt runs next; this draw is thrown away
                continue
            states.all_token_ids.gpu[slots[request], size] = token
            runner.take(request, token)
