"""Steps of a language model over many conversations at once: ids in, drawn ids out.

The scheduler (`engine.py`) decides which ids run in a step. A `Stepper` runs them: `EagerStepper` on any device and any
causal LM of transformers, `graphs.GraphStepper` on CUDA, `llama.LlamaStepper` in llama.cpp.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from duologue.interleave import Kind
from duologue.language.drawing import DrawMasks, DrawRow, draw_exactly, rows_of
from duologue.language.glm import Glm, is_plain_glm
from duologue.language.slots import SlotAttention, SlotCache, SlotRow
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "duologue_slots"


@dataclass(frozen=True)
class StepRow:
    """New ids of one conversation.

    Attributes:
        slot, start: the ids follow the first `start` ids of this slot.
        draw: draws the id after the last one; None draws nothing.
        wants_scores: whether the scores of the id after the last one are returned; only without a draw.
    """

    slot: int
    start: int
    ids: list[int]
    draw: DrawRow | None = None
    wants_scores: bool = False


class Stepped(NamedTuple):
    """The outcome of one row: the drawn id, or scores (V,) float32 in memory of their own."""

    token: int | None = None
    scores: Tensor | None = None


class Stepper(Protocol):
    """Runs steps. One thread at a time uses it.

    Attributes:
        masks: the masks that the rows of draws refer to.
        num_slots: number of slots; None grows with their use.
        max_positions: maximum ids of a slot.
    """

    masks: DrawMasks
    num_slots: int | None
    max_positions: int

    def step(self, rows: Sequence[StepRow]) -> list[Stepped]:
        """Runs new ids of all rows; each row has a slot of its own. A failed step may be tried again."""
        ...

    def draw(self, scores: Sequence[Tensor], rows: Sequence[DrawRow]) -> list[int]:
        """Draws ids from scores (V,) that a step returned."""
        ...

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copies the first ids of one slot to another."""
        ...

    def release(self, slot: int) -> None:
        """Forgets the ids of a slot. A stepper may keep them until the slot is used again."""
        ...

    def keep_only(self, slots: Sequence[int]) -> None:
        """Returns the memory of all other slots, as far as the stepper can."""
        ...


class EagerStepper:
    """A stepper of any causal LM, operation by operation.

    Args:
        model: a causal LM of transformers with full attention in all layers, in evaluation mode.

    Attributes:
        model: the same weights in separate modules and config, so that the original can still be trained.

    Raises:
        ValueError: a layer has another attention, or the vocabulary is larger than the model's.
    """

    num_slots: int | None = None

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary) -> None:
        from transformers import AttentionInterface

        config = model.config.get_text_config()
        self.max_positions: int = config.max_position_embeddings
        kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
        if kinds != {"full_attention"} or getattr(config, "attn_logit_softcapping", None):
            raise ValueError(
                f"a language model with {', '.join(sorted(kinds))} cannot run here: every layer must have plain full "
                "attention"
            )
        AttentionInterface.register(_NAME, _attend)
        weights = [*model.parameters(), *model.buffers()]
        self.model = copy.deepcopy(model, {id(weight): weight for weight in weights})
        self.model.config.get_text_config()._attn_implementation = _NAME
        self.masks = DrawMasks(vocabulary, model.get_output_embeddings().weight.shape[0], model.device)
        self.cache = SlotCache()
        self._glm = Glm(self.model) if is_plain_glm(self.model) else None
        self._speech = SpeechColumns(vocabulary, self.masks)

    @torch.inference_mode()
    def step(self, rows: Sequence[StepRow]) -> list[Stepped]:
        device = self.model.device
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids) > 1, rows[index].slot))
        sorted_rows = [rows[index] for index in order]
        slot_rows = [SlotRow(row.slot, row.start, len(row.ids)) for row in sorted_rows]
        self.cache.reserve(slot_rows)
        attention = SlotAttention(self.cache, slot_rows, self.model.dtype, device)
        places = [place for row in slot_rows for place in range(row.start, row.stop)]
        tokens, positions = torch.tensor([[token for row in sorted_rows for token in row.ids], places], device=device)
        last, stop = [], 0
        for row in sorted_rows:
            stop += len(row.ids)
            last.append(stop - 1)
        if self._glm is not None and self._glm.untouched:
            x = self._glm.run(tokens, positions, attention)
            stepped = self._by_kind(self._glm, x, sorted_rows, last)
        else:
            scores = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=torch.tensor(last, device=device),
                rows=attention,
            ).logits[0]
            stepped = self._all_kinds(scores.float(), sorted_rows)
        return [one for _, one in sorted(zip(order, stepped, strict=True), key=lambda pair: pair[0])]

    @torch.inference_mode()
    def draw(self, scores: Sequence[Tensor], rows: Sequence[DrawRow]) -> list[int]:
        return draw_exactly(torch.stack(list(scores)), self.masks.table, rows_of(rows, self.model.device))

    @torch.inference_mode()
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def release(self, slot: int) -> None:
        """Does nothing: the next ids of the slot replace the old ones."""

    @torch.inference_mode()
    def keep_only(self, slots: Sequence[int]) -> None:
        self.cache.keep_only(slots)

    def _by_kind(self, glm: Glm, x: Tensor, rows: Sequence[StepRow], last: Sequence[int]) -> list[Stepped]:
        """Computes only the scores that are needed: none within a prompt, few in a speech run."""
        stepped = [Stepped()] * len(rows)
        speech = [i for i, row in enumerate(rows) if row.draw is not None and not row.draw.text]
        others = [i for i, row in enumerate(rows) if (row.draw is not None and row.draw.text) or row.wants_scores]
        if speech:
            draws = rows_of([row.draw for row in rows if row.draw is not None and not row.draw.text], x.device)
            columns = draw_exactly(
                self._speech.scores(glm, _rows(x, [last[i] for i in speech])), self._speech.table, draws
            )
            for i, column in zip(speech, columns, strict=True):
                stepped[i] = Stepped(self._speech.ids[column])
        if others:
            scores = glm.scores(_rows(x, [last[i] for i in others])).float()
            for i, one in zip(others, self._all_kinds(scores, [rows[i] for i in others]), strict=True):
                stepped[i] = one
        return stepped

    def _all_kinds(self, scores: Tensor, rows: Sequence[StepRow]) -> list[Stepped]:
        stepped = [Stepped(None, scores[i].clone()) if row.wants_scores else Stepped() for i, row in enumerate(rows)]
        drawn = [i for i, row in enumerate(rows) if row.draw is not None]
        if drawn:
            draws = rows_of([row.draw for row in rows if row.draw is not None], scores.device)
            for i, token in zip(drawn, draw_exactly(_rows(scores, drawn), self.masks.table, draws), strict=True):
                stepped[i] = Stepped(token)
        return stepped


class SpeechColumns:
    """The rows of the head that a speech run needs: the speech ids and the ends.

    Attributes:
        ids: the id of each column.
        table: (5, columns) float32, these columns of `DrawMasks.table`.
    """

    def __init__(self, vocabulary: Vocabulary, masks: DrawMasks) -> None:
        first = vocabulary.speech_offset
        ends = [i for i, kind in enumerate(vocabulary.kinds.tolist()) if kind == Kind.END]
        self._speech = slice(first, first + vocabulary.codebook_size)
        self._ends = torch.tensor(ends, device=masks.table.device)
        self.ids = [*range(first, first + vocabulary.codebook_size), *ends]
        self.table = torch.cat((masks.table[:, self._speech], masks.table[:, self._ends]), 1)

    def scores(self, glm: Glm, x: Tensor) -> Tensor:
        """Returns scores (R, columns) float32 from outputs (R, D) of `Glm.run`."""
        return glm.scores(x, self._speech, self._ends).float()


def _rows(x: Tensor, indices: list[int]) -> Tensor:
    """Returns rows of (T, ...), as they are if all are taken in order."""
    return x if indices == list(range(len(x))) else x[torch.tensor(indices, device=x.device)]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    rows: SlotAttention | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Adapts `SlotAttention` to transformers, with query (1, H, T, K) and keys and values (1, G, T, K)."""
    assert rows is not None
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return rows(layer, query[0], torch.cat((key, value)), scaling)[None], None
