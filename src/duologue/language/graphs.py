"""Steps of a Glm on CUDA as captured graphs: one launch for a whole step, draw included.

A graph belongs to a number of rows and a length, both rounded up to a bucket. Attention of all rows is one kernel over
the slots. Prompts, and steps that return scores, run as in `EagerStepper`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duologue.language.drawing import draw, rows_of
from duologue.language.slots import SlotCache
from duologue.language.stepping import EagerStepper, Stepped, StepRow
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
LENGTH_BUCKETS = (1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class _CapturedStep:
    """A captured step of R rows; its inputs are written before each replay.

    Attributes:
        inputs: (3, R) int64, ids, positions and slots; draws: (R, 10) float32.
        out: (2, R) int64, the drawn columns and whether enough columns were sorted; scores: (R, columns) float32.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    draws: Tensor
    out: Tensor
    scores: Tensor


class GraphStepper(EagerStepper):
    """A stepper of a Glm on CUDA in float16 or bfloat16.

    Args:
        num_slots: fixed number of slots; one more holds the padding rows.
        num_positions: fixed positions of a slot. All memory is allocated at once.

    Raises:
        ValueError: the model is no Glm, or not on CUDA in half precision.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary, num_slots: int, num_positions: int) -> None:
        super().__init__(model, vocabulary)
        if self._glm is None or model.device.type != "cuda" or model.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError("CUDA graphs need an unchanged Glm on CUDA in float16 or bfloat16")
        self.num_slots = num_slots
        self.max_positions = num_positions
        self._padding_slot = num_slots
        config = model.config
        shape = 2, num_slots + 1, num_positions, int(config.num_key_value_heads), int(config.head_dim)
        self.cache = SlotCache.fixed(int(config.num_hidden_layers), shape, model.dtype, model.device)
        self._buckets = (*(length for length in LENGTH_BUCKETS if length < num_positions), num_positions)
        self._graphs: dict[tuple[int, int, bool], _CapturedStep] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def num_graphs(self) -> int:
        """Captured graphs."""
        return len(self._graphs)

    @torch.inference_mode()
    def warm_up(self, max_rows: int) -> float:
        """Captures all graphs for up to this number of rows, the largest first, which then share its memory.

        Returns:
            the seconds that it took.
        """
        start = time.perf_counter()
        row_buckets = [rows for rows in ROW_BUCKETS if rows < 2 * max_rows]
        for rows in reversed(row_buckets):
            for length in reversed(self._buckets):
                for is_speech in (False, True):
                    self._graphs[rows, length, is_speech] = self._capture(rows, length, is_speech)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    @torch.inference_mode()
    def step(self, rows: Sequence[StepRow]) -> list[Stepped]:
        stepped: dict[int, Stepped] = {}
        for is_speech in (False, True):
            group = [
                i
                for i, row in enumerate(rows)
                if len(row.ids) == 1 and row.draw is not None and (not row.draw.text) is is_speech
            ]
            if group and (graph := self._graph_of([rows[i] for i in group], is_speech)) is not None:
                tokens = self._replay(graph, [rows[i] for i in group], is_speech)
                stepped.update((i, Stepped(token)) for i, token in zip(group, tokens, strict=True))
        rest = [i for i in range(len(rows)) if i not in stepped]
        if rest:
            stepped.update(zip(rest, super().step([rows[i] for i in rest]), strict=True))
        return [stepped[i] for i in range(len(rows))]

    def release(self, slot: int) -> None:
        """Does nothing: the next ids of the slot replace the old ones."""

    def keep_only(self, slots: Sequence[int]) -> None:
        """Leaves the slots, which graphs address, and returns only cached blocks of the allocator."""
        torch.cuda.empty_cache()

    def _graph_of(self, rows: Sequence[StepRow], is_speech: bool) -> _CapturedStep | None:
        """Returns the smallest captured graph that holds the rows, if the model is still as captured."""
        if self._glm is None or not self._glm.untouched:
            return None
        longest = max(row.start for row in rows) + 1
        fitting = [key for key in self._graphs if key[0] >= len(rows) and key[1] >= longest and key[2] is is_speech]
        return self._graphs[min(fitting)] if fitting else None

    def _replay(self, graph: _CapturedStep, rows: Sequence[StepRow], is_speech: bool) -> list[int]:
        num_padding = graph.inputs.shape[1] - len(rows)
        inputs = [
            [row.ids[0] for row in rows] + [0] * num_padding,
            [row.start for row in rows] + [0] * num_padding,
            [row.slot for row in rows] + [self._padding_slot] * num_padding,
        ]
        draws = rows_of([row.draw for row in rows if row.draw is not None])
        draws = torch.cat((draws, draws[:1].expand(num_padding, -1)))
        graph.inputs.copy_(torch.tensor(inputs).pin_memory(), non_blocking=True)
        graph.draws.copy_(draws.pin_memory(), non_blocking=True)
        graph.graph.replay()
        columns, sufficed = graph.out.tolist()  # the only wait for the device
        again = [i for i in range(len(rows)) if not sufficed[i]]
        if again:
            table = self._speech.table if is_speech else self.masks.table
            places = torch.tensor(again, device=graph.scores.device)
            exact, _ = draw(graph.scores[places], table, graph.draws[places], None)
            for i, column in zip(again, exact.tolist(), strict=True):
                columns[i] = column
        return [self._speech.ids[column] if is_speech else column for column in columns[: len(rows)]]

    def _capture(self, num_rows: int, length: int, is_speech: bool) -> _CapturedStep:
        device = self.model.device
        inputs = torch.zeros(3, num_rows, dtype=torch.int64, device=device)
        inputs[2] = self._padding_slot
        draws = torch.zeros(num_rows, 10, device=device)
        draws[:, 1:3] = 1.0
        glm = self._glm
        assert glm is not None

        def run() -> tuple[Tensor, Tensor]:
            x = glm.run(inputs[0], inputs[1], FlashSlots(self.cache, inputs[1], inputs[2], length))
            scores = self._speech.scores(glm, x) if is_speech else glm.scores(x).float()
            columns, sufficed = draw(scores, self._speech.table if is_speech else self.masks.table, draws)
            return torch.stack((columns, sufficed.long())), scores

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # makes workspaces and tables, which a capture must not
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on to use CUDA, so only this thread's calls are checked.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out, scores = run()
        return _CapturedStep(graph, inputs, draws, out, scores)


class FlashSlots:
    """Attention of R single ids over slots in one kernel of FlashAttention, whose lengths lie on the device.

    Args:
        positions, slots: (R,) int64.
        length: maximum number of cached ids of a row.
    """

    def __init__(self, cache: SlotCache, positions: Tensor, slots: Tensor, length: int) -> None:
        self._cache, self._positions, self._slots, self._length = cache, positions, slots, length
        num_positions = cache.layer(0).shape[3]
        self._num_rows = len(positions)
        self._queries = torch.arange(self._num_rows + 1, dtype=torch.int32, device=positions.device)
        # Row r reads from the start of its slot; `seqused_k`, not the difference of starts, is the number of its keys.
        starts = slots.to(torch.int32) * num_positions
        self._keys = torch.cat((starts, starts[-1:] + num_positions))
        self._used = (positions + 1).to(torch.int32)

    def __call__(self, layer: int, query: Tensor, keys_values: Tensor) -> Tensor:
        """Writes the new keys and values (2, G, R, K) and returns the attention of query (H, R, K): (R, H, K)."""
        kept = self._cache.layer(layer)  # (2, slots, G, positions, K)
        kept[:, self._slots, :, self._positions] = keys_values.permute(2, 0, 1, 3)
        keys, values = kept.transpose(2, 3).flatten(1, 2)  # (slots * positions, G, K) views
        out: Tensor = torch.ops.aten._flash_attention_forward(
            query.transpose(0, 1).contiguous(),
            keys,
            values,
            self._queries,
            self._keys,
            1,
            self._length,
            0.0,
            False,
            False,
            seqused_k=self._used,
        )[0]
        return out
