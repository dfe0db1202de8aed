"""Logits processors for vLLM that draw as our engine does (`drawing.py`).

A processor draws an id for each reply and leaves only its score finite. vLLM then takes the argmax, so requests need
temperature 0. The position in the schedule follows from the ids of the reply alone. A preempted request or a reused
slot therefore needs no treatment.

vLLM has two model runners with different interfaces: V1 (CPU, and no Triton) and V2 (CUDA). `make_processor` returns
the class for both. It is not registered as an entry point, because vLLM would load it for every model.

A request carries its sampling and its schedule in `vllm_xargs` (`extra_args` in process), see `request_arguments`.
Requests without them are left alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from duologue.config import parse_config, to_mapping
from duologue.interleave import Kind, Schedule
from duologue.language.drawing import LIKELY, DrawMasks, draw, draw_exactly, draw_settings, rows_at
from duologue.language.sampling import Sampling
from duologue.language.scripts import TextLanguage
from duologue.vocabulary import Vocabulary

log = logging.getLogger(__name__)

ARGUMENT = "duologue"
_NUM_WHOLE, _NUM_REAL = 5, 4


@dataclass(frozen=True)
class DrawRequest:
    """What a request says about its draws.

    Attributes:
        sampling: its `max_tokens` must be that of the vLLM request.
    """

    sampling: Sampling
    schedule: Schedule


def request_arguments(sampling: Sampling, schedule: Schedule) -> dict[str, str]:
    """Returns the `vllm_xargs` of a request; one string, because vLLM accepts only flat values over HTTP."""
    return {ARGUMENT: json.dumps(to_mapping(DrawRequest(sampling, schedule)))}


def read_arguments(extra_args: Mapping[str, Any] | None) -> DrawRequest | None:
    """Reads the arguments of a request; None without them. Raises ValueError for malformed ones."""
    given = (extra_args or {}).get(ARGUMENT)
    if given is None:
        return None
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"the argument {ARGUMENT!r} is not JSON: {error.msg}") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"the argument {ARGUMENT!r} must be an object, not {type(given).__name__}")
    return parse_config(DrawRequest, given, f"the argument {ARGUMENT!r}")


def check_request(sampling_params: Any) -> None:
    """Raises ValueError if a request has malformed arguments, or a temperature that would draw a second time."""
    request = read_arguments(sampling_params.extra_args)
    if request is None:
        return
    if sampling_params.temperature != 0:
        raise ValueError(f"a request with {ARGUMENT!r} needs temperature 0, got {sampling_params.temperature}")
    if sampling_params.max_tokens != request.sampling.max_tokens:
        raise ValueError(
            f"a request with {ARGUMENT!r} needs its max_tokens, {request.sampling.max_tokens}, also as that of the "
            f"request, which is {sampling_params.max_tokens}"
        )


class _Drawer:
    """The masks of one model, shared by both adapters.

    Args:
        width: V, number of columns of the scores.
    """

    def __init__(self, vocabulary: Vocabulary, width: int, device: torch.device) -> None:
        self.masks = DrawMasks(vocabulary, width, device)
        is_text = torch.zeros(width, dtype=torch.bool)
        is_text[: vocabulary.size] = torch.from_numpy(vocabulary.kinds == Kind.TEXT)
        self.is_text = is_text.to(device)
        self._languages: dict[TextLanguage | None, int] = {None: self.masks.text_mask(None)}
        for language in get_args(TextLanguage):
            try:
                self._languages[language] = self.masks.text_mask(language)  # now, because it takes a second
            except ValueError as error:
                log.info("text is not restricted to %r here: %s", language, error)

    def settings(self, request: DrawRequest) -> tuple[list[int], list[float]]:
        """Returns the numbers of a request. An error here would end the whole server, so there is none."""
        language = request.sampling.text_language
        if language not in self._languages:
            log.error("a reply restricted to %r is not restricted: the vocabulary has no id for it", language)
            language = None
        return draw_settings(request.sampling, request.schedule, self._languages[language])


def leave_only(logits: Tensor, rows: Tensor, drawn: Tensor) -> Tensor:
    """Sets all but the drawn columns of some rows to -inf, in place.

    Args:
        logits: (R, V) float32.
        rows, drawn: (N,) int64.
    """
    logits.index_fill_(0, rows, float("-inf"))
    logits[rows, drawn] = 0.0
    return logits


@dataclass
class _BatchRow:
    """A request in the batch of runner V1.

    Attributes:
        output: the reply so far, a list that vLLM extends.
        num_ids, num_text: ids counted, text among them.
        drawn: the last drawn id; takes the place of a last id that vLLM has not copied from the device yet (-1).
    """

    request: DrawRequest
    settings: tuple[list[int], list[float]]
    output: list[int]
    num_ids: int = 0
    num_text: int = 0
    drawn: int = -1

    def count(self, is_text: Sequence[bool]) -> None:
        """Counts the ids that came since the last call."""
        if len(self.output) < self.num_ids:
            self.num_ids = self.num_text = 0
        for position in range(self.num_ids, len(self.output)):
            token = self.output[position]
            if token < 0 and position == len(self.output) - 1:
                token = self.drawn
            if token < 0:
                raise RuntimeError(
                    "vLLM hides the ids of a reply from its logits processors: start it with --no-async-scheduling"
                )
            self.num_text += is_text[token]
        self.num_ids = len(self.output)


class RunnerV1Processor:
    """The adapter to `vllm.v1.sample.logits_processor`: vLLM reports changes of its batch, row by row."""

    def __init__(self, vocabulary: Vocabulary, vllm_config: Any, device: torch.device) -> None:
        width = vllm_config.model_config.get_vocab_size()
        self._drawer = _Drawer(vocabulary, width, torch.device(device))
        self._is_text: list[bool] = self._drawer.is_text.tolist()
        self._rows: dict[int, _BatchRow] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Applies a `BatchUpdate`: removed, added and moved rows, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, output in batch_update.added:
            self._rows.pop(index, None)
            if (request := read_arguments(params.extra_args)) is not None:
                self._rows[index] = _BatchRow(request, self._drawer.settings(request), output)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction.name == "SWAP":
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Leaves one id in each row (R, V) of a request of ours."""
        if not self._rows:
            return logits
        places, batch, device = [*self._rows], [*self._rows.values()], logits.device
        for row in batch:
            row.count(self._is_text)
        whole = torch.tensor([row.settings[0] for row in batch])
        real = torch.tensor([row.settings[1] for row in batch], dtype=torch.float32)
        counts = torch.tensor([[row.num_ids, row.num_text] for row in batch])
        rows = rows_at(whole, real, counts[:, 0], counts[:, 1]).to(device)
        at = torch.tensor(places, device=device)
        drawn = draw_exactly(logits.index_select(0, at).float(), self._drawer.masks.table, rows)
        for row, token in zip(batch, drawn, strict=True):
            row.drawn = token
        return leave_only(logits, at, torch.tensor(drawn, device=device))


class RunnerV2Processor:
    """The adapter to `vllm.v1.worker.gpu.sample.logits_processor`: ids and lengths of all slots lie on the device.

    It never waits for the device. `top_p` and `top_k` therefore choose among the 2048 likeliest ids at most.
    """

    def __init__(self, vocabulary: Vocabulary, vllm_config: Any, req_states: Any) -> None:
        if getattr(vllm_config, "speculative_config", None) is not None:
            raise ValueError("speculative decoding cannot run with Duologue's draws: leave it out")
        num_slots, device = req_states.max_num_reqs, req_states.device
        self._states = req_states
        self._drawer = _Drawer(vocabulary, req_states.vocab_size, device)
        self._is_ours = np.zeros(num_slots, np.bool_)
        self._limits_k = np.zeros(num_slots, np.bool_)
        self._whole = torch.zeros(num_slots, _NUM_WHOLE, dtype=torch.int64)
        self._real = torch.zeros(num_slots, _NUM_REAL)
        self._staged = False
        self._device_whole, self._device_real = self._whole.to(device, copy=True), self._real.to(device, copy=True)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Takes the settings of a request into its slot; returns whether it is a request of ours."""
        request = read_arguments(sampling_params.extra_args)
        self._is_ours[req_idx] = request is not None
        if request is None:
            return False
        whole, real = self._drawer.settings(request)
        self._whole[req_idx], self._real[req_idx] = torch.tensor(whole), torch.tensor(real)
        self._limits_k[req_idx] = request.sampling.top_k is not None
        self._staged = True
        return True

    def apply_staged_writes(self) -> None:
        """Copies the settings of new requests to the device."""
        if self._staged:
            self._device_whole.copy_(self._whole)
            self._device_real.copy_(self._real)
            self._staged = False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Leaves one id in each row (R, V) of a request of ours. `ctx` is the `LogitsContext` of the step."""
        host_slots = ctx.idx_mapping_np[: logits.shape[0]]
        ours = np.flatnonzero(self._is_ours[host_slots])
        if not len(ours):
            return logits
        device, states = logits.device, self._states
        at = torch.from_numpy(ours).to(device, non_blocking=True)
        slots = ctx.expanded_idx_mapping.index_select(0, at).long()
        prompt_len = states.prompt_len.gpu.index_select(0, slots).long()
        num_ids = (ctx.pos.index_select(0, at) + 1 - prompt_len).clamp(min=0)
        longest = int((ctx.seq_lens_upper_bound_np[ours] - states.prompt_len.np[host_slots[ours]]).max())
        num_text = self._count_text(slots, prompt_len, num_ids, max(longest, 0))
        rows = rows_at(
            self._device_whole.index_select(0, slots), self._device_real.index_select(0, slots), num_ids, num_text
        )
        limits_k = bool(self._limits_k[host_slots[ours]].any())
        drawn, _ = draw(logits.index_select(0, at), self._drawer.masks.table, rows, LIKELY, limits_k)
        return leave_only(logits, at, drawn)

    def _count_text(self, slots: Tensor, prompt_len: Tensor, num_ids: Tensor, longest: int) -> Tensor:
        """Returns the number (N,) of text ids in replies of up to `longest` ids, read from the history of the slots."""
        history = self._states.all_token_ids.gpu
        offset = torch.arange(longest, device=history.device)
        place = (prompt_len[:, None] + offset).clamp_(max=history.shape[1] - 1)
        ids = history[slots[:, None], place].long().clamp_(0, len(self._drawer.is_text) - 1)
        return (self._drawer.is_text[ids] & (offset < num_ids[:, None])).sum(1)


def make_processor(find_vocabulary: Callable[[Path], Vocabulary]) -> type:
    """Returns the class that vLLM loads; its runner chooses the adapter by the arguments it constructs it with.

    Args:
        find_vocabulary: reads the vocabulary of the served model's folder.
    """

    def construct(cls: type, vllm_config: Any, *arguments: Any) -> Any:
        vocabulary = find_vocabulary(Path(vllm_config.model_config.model))
        # V1 passes the device and whether memory is pinned, V2 the states of its requests.
        adapter: type = RunnerV2Processor if len(arguments) == 1 else RunnerV1Processor
        return adapter(vocabulary, vllm_config, arguments[0])

    def validate_params(cls: type, sampling_params: Any) -> None:
        check_request(sampling_params)

    members = {
        "__module__": __name__,
        "__new__": construct,
        "validate_params": classmethod(validate_params),
        "__doc__": __doc__,
    }
    return type("Interleave", _processor_bases(), members)


def _processor_bases() -> tuple[type, ...]:
    """Returns the base classes of both runners that are installed; vLLM refuses other classes."""
    bases: list[type] = []
    try:
        from vllm.v1.sample.logits_processor import LogitsProcessor

        bases.append(LogitsProcessor)
    except ImportError:
        pass
    try:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

        bases.append(LogitsProcessorV2)
    except ImportError:
        pass
    return tuple(bases)
