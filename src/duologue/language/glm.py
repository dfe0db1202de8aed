"""A direct forward pass of a Glm from its weights, without the module overhead of transformers.

A small model spends more time between matrices than in them. `RaggedBatchModel` uses this pass for an unmodified Glm
(pocket and the released model) and the library's forward for other models.

Shapes: T new ids of all conversations, D width, H heads, G heads of keys, K head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GlmForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.glm import modeling_glm

_AS_MADE = (
    GlmForCausalLM,
    modeling_glm.GlmModel,
    modeling_glm.GlmDecoderLayer,
    modeling_glm.GlmAttention,
    modeling_glm.GlmMLP,
    modeling_glm.GlmRMSNorm,
    modeling_glm.GlmRotaryEmbedding,
    nn.Linear,
    nn.Embedding,
    nn.ModuleList,
    type(ACT2FN["silu"]),
)


class _Layer(NamedTuple):
    """Weights of one layer; query, key and value with their biases."""

    attention_norm: Tensor
    projections: tuple[tuple[Tensor, Tensor | None], ...]
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Glm:
    """The direct forward pass of a Glm over many conversations.

    Args:
        model: a Glm; its tensors are shared, so later changes to them apply.

    Raises:
        ValueError: the model is no Glm, or has modules of other classes (such as adapters).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not is_plain_glm(model):
            raise ValueError(f"{type(model).__name__} is not a Glm as transformers makes it")
        self._modules = list(model.modules())
        config = model.config
        self._head_dim = int(config.head_dim)
        self._num_heads, self._num_kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._eps = float(config.rms_norm_eps)
        inner = cast(modeling_glm.GlmModel, model.model)
        self._rotary = inner.rotary_emb
        self._embedding, self._norm, self._head = inner.embed_tokens.weight, inner.norm.weight, model.lm_head.weight
        self._layers = [_weights(layer) for layer in inner.layers]

    @property
    def untouched(self) -> bool:
        """Whether no module has hooks or a replaced `forward`, which this pass would skip."""
        return not any(
            module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
            for module in self._modules
        )

    def step(
        self, ids: Tensor, positions: Tensor, last: Tensor, attend: Callable[[int, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Runs new ids after the cached ones.

        Args:
            ids: (T,) int64, with positions (T,) int64.
            last: (rows,) int64, index of each conversation's last id.
            attend: maps a layer's number, query (H, T, K) and keys and values (2, G, T, K) to (T, H, K).

        Returns:
            (rows, V) scores of the id after each last one.
        """
        x = functional.embedding(ids, self._embedding)  # (T, D)
        # (T, K), of which the first half of the rotated dimensions holds an angle for each pair
        cos, sin = (each[0] for each in self._rotary(x, positions[None]))
        half = cos.shape[-1] // 2
        cos, sin = (each[:, None, :half].repeat_interleave(2, -1) for each in (cos, sin))  # (T, 1, rotated)
        width, num_turned = (x.shape[-1],), self._num_heads + self._num_kv_heads
        for index, layer in enumerate(self._layers):
            h = functional.rms_norm(x, width, layer.attention_norm, self._eps)
            joined = torch.cat([functional.linear(h, *each) for each in layer.projections], -1)
            joined = joined.view(len(h), -1, self._head_dim)  # (T, H + 2 G, K)
            straight = joined[:, :num_turned, : 2 * half]
            across = torch.stack((-straight[..., 1::2], straight[..., ::2]), -1).flatten(-2)
            straight.mul_(cos).add_(across.mul_(sin))
            keys_values = joined[:, self._num_heads :].unflatten(1, (2, -1)).permute(1, 2, 0, 3)  # (2, G, T, K)
            query = joined[:, : self._num_heads].transpose(0, 1)  # (H, T, K)
            attended = attend(index, query, keys_values)
            x = x + functional.linear(attended.flatten(1), layer.out)
            h = functional.rms_norm(x, width, layer.mlp_norm, self._eps)
            gate, up = functional.linear(h, layer.gate_up).chunk(2, -1)
            x = x + functional.linear(up * functional.silu(gate), layer.down)
        return functional.linear(functional.rms_norm(x[last], width, self._norm, self._eps), self._head)


def is_plain_glm(model: PreTrainedModel) -> bool:
    """Returns whether a model is a Glm with only the library's modules, default rotation and SiLU."""
    if type(model) is not GlmForCausalLM:
        return False
    config = model.config
    if config.hidden_act != "silu" or (config.rope_parameters or {}).get("rope_type") != "default":
        return False
    return all(type(module) in _AS_MADE for module in model.modules())


def _weights(layer: modeling_glm.GlmDecoderLayer) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm.weight,
        tuple((each.weight, each.bias) for each in (attention.q_proj, attention.k_proj, attention.v_proj)),
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_up_proj.weight,
        mlp.down_proj.weight,
    )
