"""Steps of a model over slots: scores as of whole sequences, and a model that others go on to use."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from duologue.interleave import SPEECH_ONLY, Schedule
from duologue.language.backbone import Provenance, load_language, save_language
from duologue.language.drawing import DrawState
from duologue.language.glm import is_plain_glm
from duologue.language.graphs import GraphStepper
from duologue.language.sampling import Sampling
from duologue.language.slots import SlotCache
from duologue.language.stepping import EagerStepper, StepRow
from duologue.vocabulary import Vocabulary
from tests.tiny_language import tiny_model, tiny_vocabulary

LONG = [3 + i % 290 for i in range(300)]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


@pytest.fixture(scope="module")
def model(vocabulary: Vocabulary) -> PreTrainedModel:
    return tiny_model(vocabulary)


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


def test_stacked_weights_stay_those_of_the_model(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """Training goes on in place, a second engine stacks nothing anew, and the model is saved and moved as before."""
    model = tiny_model(vocabulary)
    stepper, other = EagerStepper(model, vocabulary), EagerStepper(model, vocabulary)
    ids = LONG[:20]

    def check() -> None:
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1:].float()
        for one in (stepper, other):
            torch.testing.assert_close(scores_of(one, [(0, 0, ids)]), expected, atol=1e-4, rtol=0.0)

    check()
    before = scores_of(stepper, [(0, 0, ids)])
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
    optimizer.step()
    check()
    assert (scores_of(stepper, [(0, 0, ids)]) - before).abs().max() > 1e-3
    save_language(tmp_path, model, Provenance("t", "v"))
    for name, value in load_language(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # as `model.to(device)` does
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.k_proj").weight.mul_(1.5)
    check()


def test_a_fixed_cache_gives_the_same_scores_and_never_moves(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    stepper, growing = EagerStepper(model, vocabulary), EagerStepper(model, vocabulary)
    stepper.cache = SlotCache.fixed(2, (2, 3, 64, 2, 16), torch.float32, torch.device("cpu"))
    places = [stepper.cache.layer(layer).data_ptr() for layer in range(2)]
    for rows in ([(2, 0, LONG[:40]), (0, 0, LONG[3:6])], [(2, 40, [5]), (0, 3, [6]), (1, 0, [7])]):
        torch.testing.assert_close(scores_of(stepper, rows), scores_of(growing, rows), atol=1e-4, rtol=0.0)
    assert [stepper.cache.layer(layer).data_ptr() for layer in range(2)] == places
    with pytest.raises(ValueError, match="3 slots of 65 ids do not fit 3 of 64"):
        scores_of(stepper, [(2, 41, LONG[:24])])
    with pytest.raises(ValueError, match="4 slots of 64 ids do not fit 3 of 64"):
        scores_of(stepper, [(3, 0, [4])])


def test_graphs_need_a_glm_on_cuda(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="CUDA graphs need an unchanged Glm on CUDA"):
        GraphStepper(model, vocabulary, 4, 512)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_draw_the_ids_of_the_eager_stepper(vocabulary: Vocabulary) -> None:
    """Greedy ids in bfloat16 of rows in text and speech runs, of unequal lengths, with padding rows."""
    model = tiny_model(vocabulary).to("cuda", torch.bfloat16)
    eager, graphed = EagerStepper(model, vocabulary), GraphStepper(model, vocabulary, 6, 512)
    print(f"captured in {graphed.warm_up(4):.1f} s")
    prompts = {4: LONG[:70], 1: LONG[9:12], 3: LONG[100:101]}
    for stepper in (eager, graphed):
        scores_of(stepper, [(slot, 0, ids) for slot, ids in prompts.items()])
    for schedule in (Schedule(3, 5), SPEECH_ONLY):
        states = {slot: DrawState(Sampling(temperature=0.0, max_tokens=200), schedule) for slot in prompts}
        lengths, ids = {slot: len(prompt) for slot, prompt in prompts.items()}, dict.fromkeys(prompts, 5)
        for _ in range(20):
            rows = [StepRow(slot, lengths[slot], [ids[slot]], states[slot].row(eager.masks)) for slot in prompts]
            scores = scores_of(eager, [(row.slot, row.start, row.ids) for row in rows])
            expected, got = eager.step(rows), graphed.step(rows)
            for row, mine, theirs, one in zip(rows, expected, got, scores, strict=True):
                assert mine.token is not None
                assert theirs.token is not None
                assert one[mine.token] - one[theirs.token] <= 0.05 * one.abs().max()
                states[row.slot].advance(vocabulary.kind(mine.token))
                lengths[row.slot] += 1
                ids[row.slot] = mine.token
