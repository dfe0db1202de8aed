"""A direct forward pass of a Glm from its weights, without the module overhead of transformers.

A small model spends more time between matrices than in them. `EagerStepper` uses this pass for an unmodified Glm
(pocket and the released model) and the library's forward for other models.

Shapes: T new ids of all conversations, D width, H heads, G heads of keys, K head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.glm import modeling_glm

_FEW_COLUMNS = 5


class _Layer(NamedTuple):
    """Weights of one layer; query, key and value are stacked, and `parts` are the parameters that view the stack."""

    attention_norm: Tensor
    parts: tuple[Tensor, ...]
    projection: Tensor
    projection_bias: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Glm:
    """The direct forward pass of a Glm over many conversations.

    Args:
        model: a Glm; its tensors are shared, so later changes to them apply. The parameters of query, key and value
            become views of one tensor, which takes no more memory.

    Raises:
        ValueError: the model is no Glm, or has modules of other classes (such as adapters).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not is_plain_glm(model):
            raise ValueError(f"{type(model).__name__} is not a Glm as transformers makes it")
        # Attributes of all modules that a hook or a replaced method would change; tested in every step.
        self._hooks = [hooks for each in model.modules() for hooks in (each._forward_pre_hooks, each._forward_hooks)]
        self._attributes = [vars(each) for each in model.modules()]
        config = model.config
        self._head_dim = int(config.head_dim)
        self._num_heads, self._num_kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._eps = float(config.rms_norm_eps)
        inner = cast("modeling_glm.GlmModel", model.model)
        self._rotation = _RotationTable(inner.rotary_emb, int(config.max_position_embeddings))
        self._embedding, self._norm, self._head = inner.embed_tokens.weight, inner.norm.weight, model.lm_head.weight
        self._decoder_layers = list(inner.layers)
        self._layers = [_weights(layer) for layer in self._decoder_layers]

    @property
    def untouched(self) -> bool:
        """Whether no module has hooks or a replaced `forward`, which this pass would skip."""
        return not any(self._hooks) and not any("forward" in each for each in self._attributes)

    def run(self, ids: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """Runs new ids after the cached ones.

        Args:
            ids: (T,) int64, with positions (T,) int64.
            attend: maps a layer's number, query (H, T, K) and keys and values (2, G, T, K) to (T, H, K).

        Returns:
            (T, D) the input of `scores`.
        """
        if any(map(_is_apart, self._layers)):  # the model was moved to another device or dtype
            self._layers = [_weights(layer) for layer in self._decoder_layers]
        x = functional.embedding(ids, self._embedding)  # (T, D)
        rotation = self._rotation.of(positions, x)
        width, turned = x.shape[-1:], 2 * rotation.num_pairs
        num_turned = self._num_heads + self._num_kv_heads
        for index, layer in enumerate(self._layers):
            h = functional.rms_norm(x, width, layer.attention_norm, self._eps)
            joined = _linear(h, layer.projection, layer.projection_bias)
            joined = joined.view(len(h), -1, self._head_dim)  # (T, H + 2 G, K)
            rotation.apply(joined[:, :num_turned, :turned])
            keys_values = joined[:, self._num_heads :].unflatten(1, (2, -1)).permute(1, 2, 0, 3)  # (2, G, T, K)
            attended = attend(index, joined[:, : self._num_heads].transpose(0, 1), keys_values)
            x = _add_linear(x, attended.flatten(1), layer.out)
            h = functional.rms_norm(x, width, layer.mlp_norm, self._eps)
            gate, up = _linear(h, layer.gate_up).chunk(2, -1)
            x = _add_linear(x, functional.silu(gate).mul_(up), layer.down)
        return x

    def scores(self, x: Tensor, *parts: slice | Tensor) -> Tensor:
        """Returns the scores (R, V) of the next ids from outputs of `run` (R, D), or of parts of the head in turn."""
        h = functional.rms_norm(x, x.shape[-1:], self._norm, self._eps)
        if not parts:
            return _linear(h, self._head)
        return torch.cat([_linear(h, self._head[part]) for part in parts], 1)


class _RotationTable:
    """The cosines and sines of all positions, computed once by the library's module."""

    def __init__(self, rotary: nn.Module, max_positions: int) -> None:
        self._rotary, self._max_positions = rotary, max_positions
        self._cos = self._sin = torch.empty(0, 0)
        self._turn: Tensor | None = None

    def of(self, positions: Tensor, x: Tensor) -> _Rotation:
        """Returns the rotation at positions (T,) of a model with states like x."""
        if len(self._cos) == 0 or self._cos.dtype != x.dtype or self._cos.device != x.device:
            places = torch.arange(self._max_positions, device=x.device)
            # (P, K), of which the first half of the rotated dimensions holds an angle for each pair
            cos, sin = (each[0] for each in self._rotary(x, places[None]))
            half = cos.shape[-1] // 2
            self._cos, self._sin = cos[:, :half].contiguous(), sin[:, :half].contiguous()
            self._turn = torch.complex(self._cos, self._sin) if x.dtype == torch.float32 else None
        if self._turn is not None:
            return _Rotation(turn=self._turn.index_select(0, positions)[:, None])
        cos, sin = (each.index_select(0, positions)[:, None] for each in (self._cos, self._sin))
        return _Rotation(cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1))


@dataclass(frozen=True)
class _Rotation:
    """The rotation of interleaved pairs: cosines and sines (T, 1, 2 * pairs), or complex numbers (T, 1, pairs)."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    turn: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        if self.turn is not None:
            return self.turn.shape[-1]
        assert self.cos is not None
        return self.cos.shape[-1] // 2

    def apply(self, straight: Tensor) -> None:
        """Rotates (T, heads, 2 * pairs) in place."""
        if self.turn is not None:
            torch.view_as_complex(straight.unflatten(-1, (-1, 2))).mul_(self.turn)
            return
        assert self.cos is not None
        assert self.sin is not None
        across = torch.stack((-straight[..., 1::2], straight[..., ::2]), -1).flatten(-2)
        straight.mul_(self.cos).add_(across.mul_(self.sin))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes a linear map of (T, D). On a CPU, the product of the weights with few columns is up to 1.8 times faster
    than that of few rows with the weights."""
    if x.device.type == "cpu" and 2 <= len(x) <= _FEW_COLUMNS:
        y = torch.mm(weight, x.t()).t().contiguous()
        return y if bias is None else y.add_(bias)
    return functional.linear(x, weight, bias)


def _add_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Computes `residual + x @ weight.T`."""
    if x.device.type == "cpu" and 2 <= len(x) <= _FEW_COLUMNS:
        return residual + torch.mm(weight, x.t()).t()
    return torch.addmm(residual, x, weight.t())


def is_plain_glm(model: PreTrainedModel) -> bool:
    """Returns whether a model is a Glm with only the library's modules, default rotation and SiLU."""
    from transformers.activations import ACT2FN
    from transformers.models.glm import modeling_glm

    if type(model) is not modeling_glm.GlmForCausalLM:
        return False
    config = model.config
    if config.hidden_act != "silu" or (config.rope_parameters or {}).get("rope_type") != "default":
        return False
    plain = {
        modeling_glm.GlmForCausalLM,
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
    }
    return all(type(module) in plain for module in model.modules())


def _weights(layer: modeling_glm.GlmDecoderLayer) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    weights, biases = [each.weight for each in linears], [each.bias for each in linears if each.bias is not None]
    return _Layer(
        layer.input_layernorm.weight,
        (*weights, *biases),
        _stack(weights),
        _stack(biases) if biases else None,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_up_proj.weight,
        mlp.down_proj.weight,
    )


@torch.inference_mode(False)
@torch.no_grad()
def _stack(parameters: Sequence[Tensor]) -> Tensor:
    """Concatenates parameters and makes each a view of its part, so that they go on to share their values."""
    if _are_stacked(parameters):  # by another pass over the same model
        first = parameters[0].data
        rows = sum(len(each) for each in parameters)
        return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    stacked = torch.cat([each.data for each in parameters])
    for parameter, part in zip(parameters, stacked.split([len(each) for each in parameters]), strict=True):
        parameter.data = part
    return stacked


def _are_stacked(parameters: Sequence[Tensor]) -> bool:
    return all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.data_ptr() == a.data_ptr() + a.numel() * a.element_size()
        and a.is_contiguous()
        for a, b in pairwise(parameters)
    )


def _is_apart(layer: _Layer) -> bool:
    first, _, last = layer.parts[:3]
    end = last.data_ptr() + last.numel() * last.element_size()
    stack_end = layer.projection.data_ptr() + layer.projection.numel() * layer.projection.element_size()
    return first.data_ptr() != layer.projection.data_ptr() or end != stack_end
