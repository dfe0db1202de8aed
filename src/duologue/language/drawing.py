"""The draw of the next ids of all replies from the model's scores: first the kind, then an id of that kind.

The kind is drawn by the total probability of its ids. Otherwise a model that is sure of a word, but not which one,
would often emit speech and lose text.

`draw` is a pure function of tensors, without a wait for the device, a random generator or a shape that depends on data.
It can be captured in a CUDA graph. Its uniform numbers are a hash of seed and position, so one seed gives one reply on
every device and in every engine.

Shapes: R rows, one for each reply; V columns of scores, the ids of the joint vocabulary or of the wider model's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from duologue.interleave import Allowed, Kind, Schedule
from duologue.language.sampling import Sampling
from duologue.language.scripts import TEXT_LANGUAGES, TextLanguage, language_mask
from duologue.layers import uniform_at
from duologue.vocabulary import Vocabulary

# Sorting all columns costs ten times more than finding these. They nearly always hold the top_p of the probability.
LIKELY = 2048
_FEW_LIKELY = 256
_LANGUAGES = (None, *TEXT_LANGUAGES)
_SPEECH_MASK, _END_MASK = len(_LANGUAGES), len(_LANGUAGES) + 1
_UNIFORM_BLOCK = 64
CountT = TypeVar("CountT", int, Tensor)


def allowed_kinds(
    num_ids: CountT, num_text: CountT, max_tokens: CountT, text_run: CountT, speech_run: CountT
) -> tuple[CountT, CountT, CountT]:
    """Returns whether text, speech and the end may come next, the closed form of `InterleaveState`.

    The last of `max_tokens` ids must allow the reply to end, so no text begins without room for speech.

    Args:
        num_ids: ids of the reply so far, `num_text` of them text; integers or (R,) int64, as all others.
        text_run, speech_run: the reply's `Schedule`.
    """
    period = text_run + speech_run
    rounds, rest = num_ids // period, num_ids % period
    written = speech_run == 0
    # A text run gave way to speech before it was full.
    finished = (text_run == 0) | ((num_text < text_run * rounds + rest) & (num_text < text_run * (rounds + 1)))
    has_room = max_tokens - num_ids > 1
    text = written | ((finished ^ True) & (rest < text_run) & has_room)
    end = written | ((num_ids > num_text) & (finished | (rest == 0) | (rest > text_run)))
    return text, written ^ True, end


class DrawRow(NamedTuple):
    """The draw of one reply's next id. `rows_of` packs rows into a tensor (R, 10) float32 of the same columns.

    Attributes:
        text, speech, end: 1 where the kind may come, see `allowed_kinds`.
        text_mask: row of the masks for text, see `DrawMasks.text_mask`.
        temperature: for text and for a kind where text may come; 0 takes the likeliest.
        speech_temperature: for all other draws.
        top_p, top_k: see `Sampling`; top_k 0 sets no limit.
        kind_uniform, id_uniform: `uniform_at(seed, position, 2)`; the position counts the ids of the reply.
    """

    text: float
    speech: float
    end: float
    text_mask: float
    temperature: float
    speech_temperature: float
    top_p: float
    top_k: float
    kind_uniform: float
    id_uniform: float


class DrawMasks:
    """The additive masks of the kinds of ids.

    Args:
        width: V; columns beyond the vocabulary are never drawn.

    Attributes:
        table: (5, V) float32, 0 for ids of a kind and -inf for others: text, text of each language, speech, the end.

    Raises:
        ValueError: the width is less than the vocabulary, or a kind has no id.
    """

    def __init__(self, vocabulary: Vocabulary, width: int, device: torch.device) -> None:
        if width < vocabulary.size:
            raise ValueError(f"the model gives scores for {width} ids, but the vocabulary has {vocabulary.size}")
        self._vocabulary = vocabulary
        self._languages: set[TextLanguage] = set()
        table = torch.full((_END_MASK + 1, width), float("-inf"))
        for row, kind in ((0, Kind.TEXT), (_SPEECH_MASK, Kind.SPEECH), (_END_MASK, Kind.END)):
            table[row, : vocabulary.size].masked_fill_(torch.from_numpy(vocabulary.kinds == kind), 0.0)
            if not bool((table[row] == 0).any()):
                raise ValueError(f"the vocabulary has no {kind.name.lower()} id")
        self.table = table.to(device)

    def text_mask(self, language: TextLanguage | None) -> int:
        """Returns the row of the table for text of a language; its first use fills the row in place.

        Raises:
            ValueError: the vocabulary has no id for the language.
        """
        row = _LANGUAGES.index(language)
        if language is not None and language not in self._languages:
            allowed = self._vocabulary.allowed_mask(Allowed(True, False, False))
            allowed &= language_mask(self._vocabulary, language)
            if not allowed.any():
                raise ValueError(f"the vocabulary has no text id for the language {language!r}")
            mask = torch.full((self.table.shape[1],), float("-inf"))
            mask[: len(allowed)].masked_fill_(torch.from_numpy(allowed), 0.0)
            self.table[row].copy_(mask)
            self._languages.add(language)
        return row


class DrawState:
    """The position of one reply in its schedule and in its random numbers.

    Attributes:
        num_ids: ids of the reply so far; `num_text` counts text.
        ended: whether the end was drawn, or `max_tokens` ids.
    """

    def __init__(self, sampling: Sampling, schedule: Schedule) -> None:
        self.num_ids = self.num_text = 0
        self.ended = False
        self._sampling, self._schedule = sampling, schedule
        self._uniforms: list[list[float]] = []

    @property
    def allowed(self) -> Allowed:
        """The kinds that may come next."""
        runs = self._schedule.text_run, self._schedule.speech_run
        text, speech, end = allowed_kinds(self.num_ids, self.num_text, self._sampling.max_tokens, *runs)
        return Allowed(bool(text), bool(speech), bool(end))

    def row(self, masks: DrawMasks) -> DrawRow:
        """Returns the row of the next draw."""
        sampling, allowed, place = self._sampling, self.allowed, self.num_ids % _UNIFORM_BLOCK
        if place == 0:  # many at once, because a hash takes dozens of operations
            position = torch.arange(self.num_ids, self.num_ids + _UNIFORM_BLOCK)
            self._uniforms = uniform_at(torch.tensor(seed_number(sampling.seed)), position, 2).tolist()
        speech_temperature = sampling.speech_temperature
        return DrawRow(
            allowed.text,
            allowed.speech,
            allowed.end,
            masks.text_mask(sampling.text_language),
            sampling.temperature,
            sampling.temperature if speech_temperature is None else speech_temperature,
            sampling.top_p,
            sampling.top_k or 0,
            *self._uniforms[place],
        )

    def advance(self, kind: Kind) -> None:
        """Counts the drawn id. Raises ValueError for a kind that is not allowed, as a draw from NaN may give."""
        if self.ended or kind not in self.allowed:
            raise ValueError(
                f"the model's scores gave an id of kind {kind.name.lower()} where only {self.allowed} can come"
            )
        self.num_ids += 1
        self.num_text += kind is Kind.TEXT
        self.ended = kind is Kind.END or self.num_ids == self._sampling.max_tokens


def seed_number(seed: int) -> int:
    """Returns the 63 bits of a seed that a tensor of int64 holds."""
    return seed & (2**63 - 1)


def rows_of(rows: Sequence[DrawRow], device: torch.device | str = "cpu") -> Tensor:
    """Returns rows as one tensor (R, 10) float32, one transfer to the device."""
    return torch.tensor(rows, dtype=torch.float32, device=device)


def rows_at(whole: Tensor, real: Tensor, num_ids: Tensor, num_text: Tensor) -> Tensor:
    """Returns the rows (R, 10) float32 of the next draws, those of `DrawState.row`, without a host state.

    Args:
        whole: (R, 5) int64, the whole numbers of `draw_settings`.
        real: (R, 4) float32, its other numbers.
        num_ids, num_text: (R,) int64, ids of the replies so far, and text among them.
    """
    max_tokens, text_run, speech_run, seed, text_mask = whole.unbind(1)
    kinds = allowed_kinds(num_ids, num_text, max_tokens, text_run, speech_run)
    fixed = torch.stack((*kinds, text_mask), 1).float()
    return torch.cat((fixed, real, uniform_at(seed, num_ids, 2)), 1)


def draw_settings(sampling: Sampling, schedule: Schedule, text_mask: int) -> tuple[list[int], list[float]]:
    """Returns the numbers that stay the same in all draws of a reply, see `rows_at`.

    Args:
        text_mask: see `DrawMasks.text_mask`.
    """
    whole = [sampling.max_tokens, schedule.text_run, schedule.speech_run, seed_number(sampling.seed), text_mask]
    speech = sampling.temperature if sampling.speech_temperature is None else sampling.speech_temperature
    return whole, [sampling.temperature, speech, sampling.top_p, float(sampling.top_k or 0)]


def draw(
    scores: Tensor, masks: Tensor, rows: Tensor, num_likely: int | None = LIKELY, limits_k: bool = True
) -> tuple[Tensor, Tensor]:
    """Draws one id for each reply.

    Args:
        scores: (R, V) float32.
        masks: (5, V) float32, `DrawMasks.table`; a model that computes some columns only passes those of both.
        rows: (R, 10) float32, from `rows_of`.
        num_likely: number of likeliest columns that are sorted to find those of `top_p` and `top_k`; None waits for the
            device to see how many it takes.
        limits_k: False leaves `top_k` out, which saves operations where no row has one.

    Returns:
        (R,) int64 columns, and (R,) bool: false where `num_likely` columns did not suffice. Such a row must be drawn
        again with None.
    """
    _, _, _, text_mask, temperature, speech_temperature, top_p, top_k, kind_uniform, id_uniform = rows.unbind(1)
    text_mask = text_mask.long()
    num_rows, num_columns = scores.shape
    kinds = torch.arange(_SPEECH_MASK, _END_MASK + 1, device=scores.device).expand(num_rows, 2)
    mask_rows = torch.cat((text_mask[:, None], kinds), 1).flatten()
    of_kinds = scores[:, None] + masks.index_select(0, mask_rows).view(num_rows, 3, num_columns)
    # The logarithm of a total is the best score less its log-probability; a kind without columns gives NaN.
    totals = of_kinds.amax(2) - of_kinds.log_softmax(2).amax(2)
    is_barred = rows[:, :3] == 0
    totals = totals.masked_fill(is_barred, float("-inf"))
    kind_temperature = torch.where(is_barred[:, 0], speech_temperature, temperature)
    kind, _ = _pick(totals, kind_temperature, top_p, None, kind_uniform, 3)
    first_rows = torch.arange(0, 3 * num_rows, 3, device=scores.device)
    mine = of_kinds.view(-1, num_columns).index_select(0, first_rows + kind)
    id_temperature = torch.where(kind == 0, temperature, speech_temperature)
    return _pick(mine, id_temperature, top_p, top_k if limits_k else None, id_uniform, num_likely)


def draw_exactly(scores: Tensor, masks: Tensor, rows: Tensor) -> list[int]:
    """Draws as `draw`, waits for the columns, and draws the rows again that need more likely columns."""
    if scores.device.type == "cpu":
        return draw(scores, masks, rows, None, bool(rows[:, 7].any()))[0].tolist()
    drawn: list[int]
    drawn, sufficed = torch.stack(draw(scores, masks, rows)).tolist()
    again = [row for row, fine in enumerate(sufficed) if not fine]
    if again:
        places = torch.tensor(again, device=scores.device)
        columns, _ = draw(scores[places], masks, rows[places], None)
        for row, column in zip(again, columns.tolist(), strict=True):
            drawn[row] = column
    return drawn


def _pick(
    scores: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor | None, uniform: Tensor, num_likely: int | None
) -> tuple[Tensor, Tensor]:
    """Picks a column (R,) of scores (R, V) by inverse transform; see `draw` for the second value.

    The columns are summed in their own order, so equal scores need no order among themselves. Temperature 0 takes the
    first of the likeliest: the next lower float32 has a lower probability at a temperature of 1e-6.
    """
    num_columns = scores.shape[1]
    is_random = temperature.sign()
    probabilities = (scores / temperature.clamp(min=1e-6)[:, None]).softmax(1)
    limit = (top_p * is_random)[:, None]
    everything = limit >= 1
    is_limited = None
    if top_k is not None:
        top_k = top_k[:, None]
        is_limited = (top_k > 0) & (top_k < num_columns)
        everything &= ~is_limited
    for size in (_FEW_LIKELY, LIKELY, num_columns) if num_likely is None else (num_likely,):
        size = min(size, num_columns)
        likely, order = probabilities.topk(size, 1)
        mass = likely.cumsum(1)
        sufficed = (mass[:, -1:] >= limit) | everything
        if is_limited is not None and top_k is not None:
            sufficed = torch.where(is_limited, top_k <= size, sufficed)
        if size == num_columns or (num_likely is None and bool(sufficed.all())):
            sufficed = torch.ones_like(sufficed)
            break
    last = size - 1
    if is_limited is not None and top_k is not None:
        last_of_k = torch.where(is_limited, top_k - 1, last).clamp(max=last).long()
        limit = limit * torch.where(is_limited, mass.gather(1, last_of_k), 1.0)
    # The likeliest column always remains; so does each column whose betters have less than `limit` together.
    place = torch.searchsorted(mass, limit, right=True).clamp_(max=last)
    if is_limited is not None:
        place = torch.minimum(place, last_of_k)
    least = likely.gather(1, place).masked_fill_(everything, 0.0)
    weights = probabilities.masked_fill_(probabilities < least, 0.0)
    sums = weights.cumsum(1)
    target = (uniform * is_random)[:, None] * sums[:, -1:]
    picked = torch.searchsorted(sums, target, right=True).clamp_(max=num_columns - 1)
    if scores.device.type != "cpu":  # the rounding of a parallel sum must not let an impossible column through
        picked = torch.where(weights.gather(1, picked) > 0, picked, order[:, :1])
    return picked[:, 0], sufficed[:, 0]
