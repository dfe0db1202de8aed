"""The draw: the kinds of the interleave, the distribution of the sampling parameters, one seed one reply."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from duologue.interleave import INTERLEAVED, SPEECH_ONLY, TEXT_ONLY, InterleaveState, Kind, Schedule
from duologue.language.drawing import (
    DrawMasks,
    DrawRow,
    DrawState,
    allowed_kinds,
    draw,
    draw_exactly,
    rows_of,
)
from duologue.language.sampling import Sampling
from duologue.layers import uniform_at
from duologue.vocabulary import Vocabulary
from tests.tiny_language import tiny_vocabulary, within_budget

TEXT, SPEECH, END = range(3)
COLUMNS = [TEXT] * 250 + [9] * 10 + [SPEECH] * 120 + [9] * 10 + [END] * 2 + [9] * 8
MAYS = [(1, 1, 1), (0, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 0)]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


def masks_of(columns: Sequence[int]) -> Tensor:
    kinds = torch.tensor(columns)
    open_of = torch.stack([kinds == TEXT, kinds == TEXT, kinds == TEXT, kinds == SPEECH, kinds == END])
    return torch.where(open_of, 0.0, float("-inf"))


def row(
    may: tuple[int, int, int],
    temperature: float = 1.0,
    speech_temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    uniforms: tuple[float, float] = (0.5, 0.5),
) -> DrawRow:
    return DrawRow(*may, 0, temperature, speech_temperature, top_p, top_k, *uniforms)


def nucleus(scores: Tensor, temperature: float, top_p: float, top_k: int = 0) -> Tensor:
    """Probabilities (V,) float64 of a draw from scores (V,), the slow way."""
    chances = torch.zeros(len(scores), dtype=torch.float64)
    if temperature == 0:
        chances[scores.argmax()] = 1.0
        return chances
    order = scores.double().argsort(descending=True)
    order = order[: top_k or None]
    sorted_chances = (scores.double()[order] / temperature).softmax(0)
    kept = sorted_chances.cumsum(0) - sorted_chances < top_p
    chances[order[kept]] = sorted_chances[kept] / sorted_chances[kept].sum()
    return chances


def chances_of(scores: Tensor, columns: Sequence[int], one: DrawRow) -> Tensor:
    """Probabilities (V,) float64 of each column: of the kind, times those of its columns."""
    kinds = torch.tensor(columns)
    mine = [torch.where(kinds == kind, scores.double(), -math.inf) for kind in range(3)]
    totals = torch.stack([each.logsumexp(0) for each in mine])
    totals[[not may for may in one[:3]]] = -math.inf
    kind_chances = nucleus(totals, one.temperature if one.text else one.speech_temperature, one.top_p)
    chances = torch.zeros(len(columns), dtype=torch.float64)
    for kind in range(3):
        temperature = one.temperature if kind == TEXT else one.speech_temperature
        if kind_chances[kind] > 0:
            chances += kind_chances[kind] * nucleus(mine[kind], temperature, one.top_p, int(one.top_k))
    return chances


def test_the_closed_form_of_two_counters_equals_the_interleave() -> None:
    """Every state that a reply of up to 4 rounds can reach, by every way, and every number of ids left."""
    schedules = [Schedule(a, b) for a in range(4) for b in range(4) if a + b]
    for schedule in [*schedules, INTERLEAVED, SPEECH_ONLY, TEXT_ONLY]:
        length = 4 * (schedule.text_run + schedule.speech_run) if schedule in schedules else 130
        states = {(0, 0): InterleaveState(schedule)}
        for num_ids in range(length):
            grown: dict[tuple[int, int], InterleaveState] = {}
            for (_, num_text), state in states.items():
                for remaining in (1, 2, 50):
                    counts = num_ids, num_text, num_ids + remaining, schedule.text_run, schedule.speech_run
                    expected = within_budget(state, remaining)
                    assert allowed_kinds(*counts) == (expected.text, expected.speech, expected.end)
                    if num_ids < 20:
                        on_device = allowed_kinds(*(torch.tensor([count]) for count in counts))
                        assert [bool(may) for may in on_device] == [expected.text, expected.speech, expected.end]
                for kind in (Kind.TEXT, Kind.SPEECH):
                    if kind in state.allowed:
                        after = InterleaveState(**vars(state))
                        after.advance(kind)
                        known = grown.setdefault((num_ids + 1, after.num_text), after)
                        assert known.allowed == after.allowed  # the counters alone determine what may come
            states = grown


SETTINGS = [(0.7, 0.9, 0.8, 0), (1.0, 1.0, 1.0, 0), (1.3, 0.4, 0.95, 7), (0.2, 2.0, 1.0, 3), (0.0, 1.0, 0.5, 0)]


# All kinds with two settings, and all settings with the kinds of an interleaved reply.
@pytest.mark.parametrize(
    ("may", "temperature", "speech_temperature", "top_p", "top_k"),
    [(may, *one) for may, one in itertools.product(MAYS, SETTINGS) if may == (1, 1, 0) or one in SETTINGS[:2]],
)
def test_ids_are_drawn_by_the_probability_of_their_kind_and_their_own(
    may: tuple[int, int, int], temperature: float, speech_temperature: float, top_p: float, top_k: int
) -> None:
    """Uniform numbers on a grid hit every column in proportion to its probability, without chance."""
    scores = 2 * torch.randn(len(COLUMNS), generator=torch.Generator().manual_seed(0))
    grid = [(i + 0.5) / 100 for i in range(100)]
    rows = [
        row(may, temperature, speech_temperature, top_p, top_k, uniforms) for uniforms in itertools.product(grid, grid)
    ]
    ids, sufficed = draw(scores.expand(len(rows), -1), masks_of(COLUMNS), rows_of(rows), 256)
    share = torch.bincount(ids[sufficed], minlength=len(COLUMNS)).double() / int(sufficed.sum())
    assert sufficed.all()
    torch.testing.assert_close(share, chances_of(scores, COLUMNS, rows[0]), atol=0.011, rtol=0.0)


@pytest.mark.parametrize("may", MAYS)
def test_temperature_0_takes_the_likeliest_id_of_the_likeliest_kind(may: tuple[int, int, int]) -> None:
    scores = torch.randn(200, len(COLUMNS), generator=torch.Generator().manual_seed(1)).mul(4).round()  # with ties
    rows = [row(may, 0.0, 0.0, 0.8)] * 200
    ids, sufficed = draw(scores, masks_of(COLUMNS), rows_of(rows), 256)
    assert sufficed.all()
    for one, got in zip(scores, ids.tolist(), strict=True):
        assert got == int(chances_of(one, COLUMNS, rows[0]).argmax())


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])  # over thousands of ids, over some hundreds, over some dozens
@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 0), (1.0, 0), (0.9, 500), (1.0, 40)])
def test_rows_that_need_more_columns_than_sorted_say_so_and_are_drawn_exactly(
    spread: float, top_p: float, top_k: int
) -> None:
    columns = [SPEECH] * 3000
    scores = spread * torch.randn(len(columns), generator=torch.Generator().manual_seed(0))
    rows = [row((0, 1, 0), 1.0, 1.0, top_p, top_k, (0.0, (i + 0.5) / 500)) for i in range(500)]
    several, masks, packed = scores.expand(len(rows), -1), masks_of(columns), rows_of(rows)
    whole, sufficed = draw(several, masks, packed, len(columns))
    assert sufficed.all()
    some, sufficed = draw(several, masks, packed, 64)
    assert torch.equal(some[sufficed], whole[sufficed])
    assert draw_exactly(several, masks, packed) == whole.tolist()
    chances = chances_of(scores, columns, rows[0])
    assert (chances[whole] > 0).all()
    expected = chances.cumsum(0)
    low = expected[whole] - chances[whole]
    uniforms = torch.tensor([one.id_uniform for one in rows], dtype=torch.float64)
    assert ((low - 1e-5 <= uniforms) & (uniforms <= expected[whole] + 1e-5)).all()
    if spread == 0.1:
        assert bool(sufficed.all()) is ((top_p, top_k) in ((1.0, 0), (1.0, 40)))


def test_a_row_of_its_own_draws_what_it_draws_with_others() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(12, len(COLUMNS), generator=generator)
    uniforms = torch.rand(12, 2, generator=generator).tolist()
    rows = [
        row(MAYS[i % 5], i / 6, 1.0, 1.0 if i % 3 else 0.6, 5 * (i % 2), (uniforms[i][0], uniforms[i][1]))
        for i in range(12)
    ]
    together = draw_exactly(scores, masks_of(COLUMNS), rows_of(rows))
    alone = [draw_exactly(scores[i : i + 1], masks_of(COLUMNS), rows_of(rows[i : i + 1]))[0] for i in range(12)]
    assert together == alone


def test_ids_of_kinds_that_cannot_come_are_never_drawn() -> None:
    """However likely, and wherever the uniform number lies."""
    scores = torch.full((len(COLUMNS),), -200.0)
    scores[[i for i, kind in enumerate(COLUMNS) if kind == 9]] = 100.0
    scores[:250] = 50.0
    edges = [0.0, 0.5, 1 - 2**-23]
    rows = [row((0, 1, 1), 1.0, 1.0, p, 0, both) for p in (0.8, 1.0) for both in itertools.product(edges, edges)]
    ids = draw_exactly(scores.expand(len(rows), -1), masks_of(COLUMNS), rows_of(rows))
    assert {COLUMNS[i] for i in ids} <= {SPEECH, END}


def test_masks_hold_the_ids_of_each_kind_and_no_others(vocabulary: Vocabulary) -> None:
    masks = DrawMasks(vocabulary, vocabulary.size + 7, torch.device("cpu"))
    table = masks.table == 0
    for index, kind in ((0, Kind.TEXT), (3, Kind.SPEECH), (4, Kind.END)):
        assert table[index].nonzero().flatten().tolist() == (vocabulary.kinds == kind).nonzero()[0].tolist()
    assert not table[1:3].any()  # a language fills its row when it is first asked for
    with pytest.raises(ValueError, match="but the vocabulary has"):
        DrawMasks(vocabulary, vocabulary.size - 1, torch.device("cpu"))


def test_the_kind_is_chosen_by_all_its_ids_together(vocabulary: Vocabulary) -> None:
    masks = DrawMasks(vocabulary, vocabulary.size, torch.device("cpu")).table
    scores = torch.full((1, vocabulary.size), -30.0)
    scores[0, vocabulary.encode_text("abcdefgh")] = 0.0  # eight words, none of them likely
    scores[0, vocabulary.speech_id(3)] = 1.0  # the likeliest id

    def kind(may: tuple[int, int, int]) -> Kind:
        return vocabulary.kind(draw_exactly(scores, masks, rows_of([row(may, 0.0, 0.0)]))[0])

    assert vocabulary.kind(int(scores.argmax())) is Kind.SPEECH
    assert kind((1, 1, 0)) is Kind.TEXT
    assert kind((0, 1, 0)) is Kind.SPEECH


def test_uniform_numbers_are_even_apart_and_the_same_for_a_seed() -> None:
    numbers = uniform_at(torch.arange(40)[:, None], torch.arange(1000), 2)
    assert numbers.shape == (40, 1000, 2)
    assert numbers.min() >= 0
    assert numbers.max() <= 1 - 2**-23
    counts = torch.histc(numbers.flatten(), 50, 0.0, 1.0)
    assert float(((counts - 1600) ** 2 / 1600).sum()) < 95  # chi-square of 49 degrees of freedom, p = 0.0001
    flat = numbers.flatten(1)
    between_seeds = torch.corrcoef(flat)[~torch.eye(40, dtype=torch.bool)]
    assert between_seeds.abs().max() < 0.12
    assert torch.corrcoef(torch.stack((flat[:, :-1].flatten(), flat[:, 1:].flatten())))[0, 1].abs() < 0.02
    alone = uniform_at(torch.tensor(7), torch.tensor([500, 3]), 2)
    assert torch.equal(alone, numbers[7, [500, 3]])
    far = uniform_at(torch.tensor([7 + 2**32, 7]), torch.tensor([3, 3]), 2)
    assert not torch.equal(far[0], far[1])
    # The numbers are part of what a seed means: they never change.
    assert uniform_at(torch.tensor(1), torch.tensor(0), 2).tolist() == [0.14063429832458496, 0.19011402130126953]


def test_a_state_gives_the_numbers_of_its_position_and_refuses_wrong_kinds(vocabulary: Vocabulary) -> None:
    masks = DrawMasks(vocabulary, vocabulary.size, torch.device("cpu"))
    sampling = Sampling(temperature=0.3, top_p=0.9, top_k=5, seed=11, max_tokens=200)
    state = DrawState(sampling, Schedule(2, 3))
    expected = uniform_at(torch.tensor(11), torch.arange(200), 2).tolist()
    for place in range(199):
        one = state.row(masks)
        assert [one.kind_uniform, one.id_uniform] == expected[place]
        assert (one.temperature, one.speech_temperature, one.top_p, one.top_k) == (0.3, 0.3, 0.9, 5)
        if not place:
            with pytest.raises(ValueError, match="gave an id of kind end where only text or speech can come"):
                state.advance(Kind.END)
        state.advance(Kind.TEXT if one.text else Kind.SPEECH)
        assert not state.ended
    state.advance(Kind.SPEECH)
    assert state.ended


def test_the_draw_has_no_shape_that_depends_on_data() -> None:
    """It can be traced without values, as a CUDA graph needs."""
    rows = rows_of([row((1, 1, 1), top_k=3)] * 4)
    ids, sufficed = draw(
        torch.empty(4, len(COLUMNS), device="meta"), masks_of(COLUMNS).to("meta"), rows.to("meta"), 256
    )
    assert (ids.shape, sufficed.shape, ids.device.type) == ((4,), (4,), "meta")
