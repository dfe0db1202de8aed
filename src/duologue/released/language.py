"""The released language model (glm-4-voice-9b): ChatGLM shards loaded as transformers' Glm.

Keys are renamed and query_key_value is split by rows, without permutation (docs/checkpoints.md 2.4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from duologue.checkpoint import DTYPES, Dtype, StoredTensor, stored_tensors
from duologue.config import read_json
from duologue.quantization import Scheme, check_available, quantize
from duologue.released.weights import check_plain, check_stored

if TYPE_CHECKING:
    from transformers import GlmConfig, PreTrainedModel

SEQ_LENGTH = 8192  # if the config has none
# Options of ChatGLM's code that the release does not use; other values are refused.
_FIXED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "original_rope": True,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
}
_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
_OUTSIDE = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
_DROPPED = "transformer.rotary_pos_emb.inv_freq"  # computed from the config


@dataclass(frozen=True)
class NativeWeight:
    """A weight of `GlmForCausalLM` as rows [start, stop) of a ChatGLM weight; None for all rows.

    Attributes:
        key: of `GlmForCausalLM`.
        source: key of the ChatGLM.
    """

    key: str
    source: str
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class ReleasedWeights:
    """A checked language model folder, known from its headers.

    Attributes:
        stored: tensors by ChatGLM key, without the dropped one.
        native: weights of the native model, layer by layer.
    """

    folder: Path
    config: GlmConfig
    stored: dict[str, StoredTensor]
    native: list[NativeWeight]

    def shape(self, weight: NativeWeight) -> tuple[int, ...]:
        shape = self.stored[weight.source].shape
        if weight.start is None or weight.stop is None:
            return shape
        return (weight.stop - weight.start, *shape[1:])

    def read(self, weight: NativeWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Reads a native weight, see `StoredTensor.read`."""
        return self.stored[weight.source].read(dtype, weight.start, weight.stop)


def is_released(folder: str | Path) -> bool:
    """Returns whether the folder's config is that of a ChatGLM."""
    path = Path(folder) / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "chatglm"


def read_released(folder: str | Path) -> ReleasedWeights:
    """Reads config and headers of a released folder and checks them against each other.

    Raises:
        ValueError: names file and key: another architecture, a missing, truncated or quantized file, or a weight that
            is missing, unexpected or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    stored = stored_tensors(folder)
    stored.pop(_DROPPED, None)
    check_stored(stored, chatglm_shapes(config), folder)
    return ReleasedWeights(folder, config, stored, native_weights(config))


def read_config(folder: str | Path) -> GlmConfig:
    """Converts a ChatGLM `config.json` to a native config. Raises ValueError naming file and key."""
    from transformers import GlmConfig

    path = Path(folder) / "config.json"
    config = read_json(path)
    if config.get("model_type") != "chatglm":
        raise ValueError(
            f"{path} is of model_type {config.get('model_type')!r}; a released language model has model_type 'chatglm'"
        )
    check_plain(config, path)
    for key, wanted in _FIXED.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{path}: {key} is {config[key]!r}; only {wanted!r} can be run")

    def number(key: str) -> int:
        value = config.get(key)
        if type(value) is not int or value <= 0:
            raise ValueError(f"{path}: {key} must be a whole number of at least 1, got {value!r}")
        return value

    epsilon = config.get("layernorm_epsilon")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ValueError(f"{path}: layernorm_epsilon must be a number between 0 and 1, got {epsilon!r}")
    num_heads = number("num_attention_heads")
    grouped = config.get("multi_query_attention", False)
    num_kv_heads = number("multi_query_group_num") if grouped else num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{path}: num_attention_heads is {num_heads}, no multiple of multi_query_group_num, {num_kv_heads}"
        )
    rope = {"rope_type": "default", "rope_theta": 10000.0 * config.get("rope_ratio", 1), "partial_rotary_factor": 0.5}
    native = GlmConfig(
        vocab_size=number("padded_vocab_size"),
        hidden_size=number("hidden_size"),
        intermediate_size=number("ffn_hidden_size"),
        num_hidden_layers=number("num_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=number("kv_channels"),
        rms_norm_eps=epsilon,
        max_position_embeddings=number("seq_length") if "seq_length" in config else SEQ_LENGTH,
        rope_parameters=rope,
        attention_bias=True,
        tie_word_embeddings=False,
        pad_token_id=config.get("pad_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )
    native.architectures = ["GlmForCausalLM"]
    return native


def chatglm_shapes(config: GlmConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all weights of a ChatGLM by its own keys."""
    width, ffn = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    joint = heads + 2 * config.num_key_value_heads * config.head_dim
    inside = {
        "input_layernorm.weight": (width,),
        "self_attention.query_key_value.weight": (joint, width),
        "self_attention.query_key_value.bias": (joint,),
        "self_attention.dense.weight": (width, heads),
        "post_attention_layernorm.weight": (width,),
        "mlp.dense_h_to_4h.weight": (2 * ffn, width),
        "mlp.dense_4h_to_h.weight": (width, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"transformer.encoder.layers.{layer}.{key}": shape for key, shape in inside.items()}
    shapes["transformer.encoder.final_layernorm.weight"] = (width,)
    shapes["transformer.output_layer.weight"] = (config.vocab_size, width)
    return shapes


def native_weights(config: GlmConfig) -> list[NativeWeight]:
    """Returns the weights of `GlmForCausalLM` with their ChatGLM rows."""
    heads = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    edges = {"q_proj": (0, heads), "k_proj": (heads, heads + shared), "v_proj": (heads + shared, heads + 2 * shared)}
    weights = []
    for source in chatglm_shapes(config):
        if source in _OUTSIDE:
            weights.append(NativeWeight(_OUTSIDE[source], source))
            continue
        number, name = source.removeprefix("transformer.encoder.layers.").split(".", 1)
        if name in _IN_LAYER:
            weights.append(NativeWeight(f"model.layers.{number}.{_IN_LAYER[name]}", source))
            continue
        ending = name.rsplit(".", 1)[1]
        for projection, (start, stop) in edges.items():
            weights.append(NativeWeight(f"model.layers.{number}.self_attn.{projection}.{ending}", source, start, stop))
    return weights


def load_released_language(
    released: str | Path | ReleasedWeights,
    dtype: Dtype = "bfloat16",
    device: str | torch.device = "cpu",
    quantization: Scheme | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """Loads a released folder, or one known from its headers, as a native Glm in evaluation mode.

    Each layer is quantized before the next is read, so peak memory is the model plus one layer.

    Args:
        quantization: "int8" or "int4" for the layers' matrices; see `quantization.quantize`.
        progress: shows a progress bar.

    Raises:
        ValueError: as `read_released`; an unknown dtype, a weight that is not finite, or a missing library.
    """
    from transformers import GlmForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}")
    weights = released if isinstance(released, ReleasedWeights) else read_released(released)
    if quantization is not None:
        check_available(quantization, torch.device(device))
    with torch.device("meta"):
        model = GlmForCausalLM(weights.config)
    model.config.dtype = DTYPES[dtype]
    model.model.rotary_emb = type(model.model.rotary_emb)(weights.config).to(device)
    total = sum(stored.numel for stored in weights.stored.values())
    with tqdm(total=total, unit_scale=True, disable=not progress) as bar:
        for name, native in _by_module(weights.native):
            owner = model.get_submodule(name)
            for weight in native:
                holder, _, attribute = weight.key.removeprefix(f"{name}.").rpartition(".")
                tensor = weights.read(weight, DTYPES[dtype]).to(device)
                setattr(owner.get_submodule(holder), attribute, nn.Parameter(tensor, requires_grad=False))
                bar.update(tensor.numel())
            if quantization is not None and name.startswith("model.layers."):
                quantize(owner, quantization)
    return model.eval()


def _by_module(weights: list[NativeWeight]) -> Iterator[tuple[str, list[NativeWeight]]]:
    """Groups weights by layer, or by module outside the layers."""
    groups: dict[str, list[NativeWeight]] = {}
    for weight in weights:
        words = weight.key.split(".")
        name = ".".join(words[:3]) if words[1] == "layers" else ".".join(words[:-1])
        groups.setdefault(name, []).append(weight)
    yield from groups.items()
