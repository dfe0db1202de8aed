"""Attention within packed rows equals masked attention, with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from duologue.training import packed_attention, packing
from duologue.training.packed_attention import NAME, PackedSequences, attention_of

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
MODELS = {
    "glm": lambda: GlmForCausalLM(GlmConfig(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}
LENGTHS = [[40, 1, 33, 7, 519], [600], [90, 2, 2, 506]]


def small(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[name]()
    return model.train()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    shape = positions.shape
    return {
        "input_ids": torch.randint(64, shape, generator=random),
        "position_ids": positions,
        "targets": torch.randint(64, shape, generator=random),
        "trains": torch.randint(3, shape, generator=random),
    }


def gradients(model: PreTrainedModel, one: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    values = packing.losses(model, one)
    (values["text"] + values["speech"]).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return found | {"loss": (values["text"] + values["speech"]).detach()}


@pytest.mark.parametrize("name", MODELS)
def test_equals_masked_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = small(name), batch()
    called: list[int] = []
    attend = packed_attention._attend

    def counted(queries: torch.Tensor, *others: Any) -> torch.Tensor:
        called.append(queries.shape[2])
        return attend(queries, *others)

    monkeypatch.setattr(packed_attention, "_attend", counted)
    packed = gradients(model, one)
    assert min(called) == 32
    assert max(called) > packed_attention.LONGEST_MATRIX
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(packed_attention, "PLAIN", frozenset())
    called.clear()
    masked = gradients(model, one)
    assert not called
    assert packed.keys() == masked.keys()
    for key, value in masked.items():
        torch.testing.assert_close(packed[key], value, rtol=1e-4, atol=1e-6)


def test_other_models_keep_their_attention() -> None:
    positions = batch()["position_ids"]
    checkpointed, window, eager = small("glm"), MistralForCausalLM(MistralConfig(**SIZES)), small("llama")
    checkpointed.gradient_checkpointing_enable()
    eager.set_attn_implementation("eager")
    dropping = small("qwen2")
    dropping.config.attention_dropout = 0.1
    for model in (checkpointed, window, eager, dropping):
        before = model.config._attn_implementation
        with attention_of(model, positions) as arguments:
            assert arguments == {}
            assert model.config._attn_implementation == before
    model = small("glm")
    with attention_of(model, positions):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"


def test_places_are_a_permutation() -> None:
    positions = batch()["position_ids"]
    found = PackedSequences.of(positions)
    ids = torch.arange(positions.numel())
    assert torch.equal(found.source[found.place], ids)
    assert sum(number * length for number, length in found.groups) == len(found.source)
    assert int((~found.is_padding).sum()) == positions.numel()
    assert sum(number for number, _ in found.groups) == sum(map(len, LENGTHS))
