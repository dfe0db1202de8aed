"""Training sequences of a language model: packed into rows of one length, and the loss over them.

Several sequences share a row. The position ids of each start at 0, from which transformers makes a block-diagonal mask;
on a CPU `packed_attention.py` does without the mask.
No sequence attends to another one, so packing equals separate runs.

Shapes: B rows, L ids of a row, D width, N trained ids of a batch, V ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from duologue.interleave import InterleaveState, Kind, Schedule
from duologue.training.loop import Batch
from duologue.training.packed_attention import attention_of
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The loss of predicting an id, as flags; 0 for none.
UNTRAINED, TEXT, SPEECH = 0, 1, 2
LOSSES = {"text": TEXT, "speech": SPEECH}


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        ids: ids of the joint vocabulary.
        trains: for each id, the loss of predicting it from the earlier ones: UNTRAINED, TEXT or SPEECH.
        job: what is learned from it, where a mixture has several jobs.
    """

    ids: Sequence[int]
    trains: Sequence[int]
    job: str = ""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.trains)


@lru_cache(maxsize=4096)  # replies with as many ids of each kind look alike
def decisions(kinds: tuple[int, ...], schedule: Schedule) -> tuple[int, ...]:
    """TEXT for every id of a reply at a position where a text id is legal, SPEECH for the others; `kinds` as integers.

    The first speech id after the text decides that the text is finished. So does the end after a full speech run. Both
    are decisions about the text. The copy that trains text and the copy that trains speech thus cover every id once.
    """
    state = InterleaveState(schedule)
    trains = []
    for kind in kinds:
        trains.append(TEXT if state.allowed.text else SPEECH)
        state.advance(Kind(kind))
    return tuple(trains)


def corrupt_heard_speech(example: Example, share: float, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
    """The example with `share` of its untrained speech ids replaced by random ones.

    A model that sees the same clips several times would otherwise learn their exact tokens. Another voice or room never
    gives the same tokens.
    """
    if not share:
        return example
    ids = np.array(example.ids)
    heard = (vocabulary.kinds[ids] == Kind.SPEECH) & (np.array(example.trains) == UNTRAINED)
    wrong = heard & (rng.random(len(ids)) < share)
    ids[wrong] = vocabulary.speech_offset + rng.integers(vocabulary.codebook_size, size=int(wrong.sum()))
    return replace(example, ids=ids.tolist())


def fill(draw: Callable[[], Example], num_rows: int, length: int, patience: int = 3) -> list[list[Example]]:
    """Draws examples into rows, each into the first row with room, until `patience` of them did not fit."""
    rows: list[list[Example]] = [[] for _ in range(num_rows)]
    room = [length] * num_rows
    missed = 0
    while missed < patience:
        example = draw()
        fitting = next((row for row in range(num_rows) if len(example.ids) <= room[row]), None)
        if fitting is None:
            missed += 1
            continue
        rows[fitting].append(example)
        room[fitting] -= len(example.ids)
    return rows


def pack(rows: Sequence[Sequence[Example]], length: int, padding_id: int) -> Batch:
    """Rows of examples as tensors.

    Returns:
        input_ids: (B, L) int64, with `padding_id` after the last example of a row.
        position_ids: (B, L) int64, from 0 in each example and in the padding.
        targets: (B, L) int64, the next id within the same example.
        trains: (B, L) int64, the loss of predicting the target.
    """
    shape = (len(rows), length)
    input_ids, positions = np.full(shape, padding_id), np.zeros(shape, np.int64)
    targets, trains = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, examples in enumerate(rows):
        at = 0
        for example in examples:
            end = at + len(example.ids)
            if end > length:
                raise ValueError(f"examples of {end} ids do not fit a row of {length}")
            input_ids[row, at:end] = example.ids
            positions[row, at:end] = np.arange(end - at)
            targets[row, at : end - 1] = example.ids[1:]
            trains[row, at : end - 1] = example.trains[1:]
            at = end
        positions[row, at:] = np.arange(length - at)
    arrays = {"input_ids": input_ids, "position_ids": positions, "targets": targets, "trains": trains}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def losses(model: PreTrainedModel, batch: Batch, chunk: int = 0) -> dict[str, Tensor]:
    """Cross-entropy of a packed batch.

    Args:
        chunk: number of ids whose scores over the vocabulary exist at once; 0 for all. Each chunk is computed again in
            the backward pass, so memory is `chunk` times V instead of N times V values.

    Returns:
        text, speech: the sum over the ids that train each, divided by the number of all trained ids. Every id thus has
            the same weight.
        text_nll, speech_nll: nats per id without gradient, for the log.
    """
    with attention_of(model, batch["position_ids"]) as arguments:
        hidden = model.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **arguments
        ).last_hidden_state  # (B, L, D)
    chosen = batch["trains"] > UNTRAINED
    # Only trained ids need logits over the whole vocabulary.
    trained, targets = hidden[chosen], batch["targets"][chosen]
    head = model.get_output_embeddings()

    def nll_of(vectors: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(head(vectors).float(), wanted, reduction="none")

    if 0 < chunk < len(targets):
        pieces = zip(trained.split(chunk), targets.split(chunk), strict=True)
        nll = torch.cat([checkpoint(nll_of, *piece, use_reentrant=False) for piece in pieces])
    else:
        nll = nll_of(trained, targets)
    values: dict[str, Tensor] = {}
    for name, number in LOSSES.items():
        of_kind = (batch["trains"][chosen] == number).to(nll.dtype)
        total = (nll * of_kind).sum()
        values[name] = total / max(len(nll), 1)
        values[f"{name}_nll"] = (total / of_kind.sum().clamp(min=1)).detach()
    return values


class LanguageObjective(nn.Module):
    """The training losses of a language model as one module, so that sharding sees the whole forward pass.

    Args:
        chunk: see `losses`.
    """

    def __init__(self, model: PreTrainedModel, chunk: int = 0) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the values of `losses`."""
        return losses(self.model, batch, self.chunk)


@torch.no_grad()
def mean_losses(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, float]:
    """Nats per id over several batches, `text_nll` and `speech_nll`; a kind without ids is left out."""
    totals, counts = dict.fromkeys(LOSSES, 0.0), dict.fromkeys(LOSSES, 0)
    for batch in batches:
        values = losses(model, {name: value.to(model.device) for name, value in batch.items()})
        for name, number in LOSSES.items():
            count = int((batch["trains"] == number).sum())
            totals[name] += float(values[f"{name}_nll"]) * count
            counts[name] += count
    return {f"{name}_nll": totals[name] / counts[name] for name in LOSSES if counts[name]}
