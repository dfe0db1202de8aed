"""The released language model (glm-4-voice-9b): ChatGLM shards read as transformers' native Glm.

Names change and the joint query_key_value splits by rows, nothing is permuted (checkpoints.md 2.4). Rows lie one behind
the other in a file, so every native weight is a range of bytes, which `convert.py` copies and `load_released_language`
reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from duologue.config import read_json
from duologue.headers import Stored, check_plain, check_stored, read_headers, read_tensor
from duologue.language.backbone import DTYPES, Dtype
from duologue.language.quantization import Scheme, check_available, quantize

SEQ_LENGTH = 8192  # where the config does not tell
# What ChatGLM's code can be configured to do and the release does not: refused, never ignored.
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
class Part:
    """A native weight: rows [start, stop) of a stored one; all of it where `start` is None."""

    key: str
    source: str
    start: int | None = None
    stop: int | None = None

    def of(self, stored: Stored) -> Stored:
        """Where this part lies in the file."""
        if self.start is None or self.stop is None:
            return stored
        row = stored.num_bytes // stored.shape[0]
        shape = (self.stop - self.start, *stored.shape[1:])
        return Stored(stored.path, self.key, stored.dtype, shape, stored.offset + self.start * row, shape[0] * row)


@dataclass(frozen=True)
class ReleasedWeights:
    """A folder that fits its config, known from its headers.

    Attributes:
        stored: ChatGLM key to its place, without the dropped one.
        parts: native weights, layer by layer.
    """

    folder: Path
    config: GlmConfig
    stored: dict[str, Stored]
    parts: list[Part]

    def place(self, part: Part) -> Stored:
        return part.of(self.stored[part.source])


def is_released(folder: str | Path) -> bool:
    """Whether the folder's config is that of a ChatGLM."""
    path = Path(folder) / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "chatglm"


def read_released(folder: str | Path) -> ReleasedWeights:
    """Config and headers of a released folder, checked against each other; no weight is read.

    Raises:
        ValueError: one sentence naming file and key: another architecture, a missing, truncated or quantized file, a
            weight missing, unexpected or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    stored = read_headers(folder)
    stored.pop(_DROPPED, None)
    check_stored(stored, chatglm_shapes(config), folder)
    return ReleasedWeights(folder, config, stored, native_parts(config))


def read_config(folder: str | Path) -> GlmConfig:
    """The native config of a ChatGLM `config.json`. Raises ValueError naming the file and the key."""
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
    native: GlmConfig = GlmConfig(
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
    """Every weight that a ChatGLM of these sizes has, in its own names."""
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


def native_parts(config: GlmConfig) -> list[Part]:
    """The weights of `GlmForCausalLM`, and which rows of which ChatGLM weight each of them is."""
    heads = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    edges = {"q_proj": (0, heads), "k_proj": (heads, heads + shared), "v_proj": (heads + shared, heads + 2 * shared)}
    parts = []
    for source in chatglm_shapes(config):
        if source in _OUTSIDE:
            parts.append(Part(_OUTSIDE[source], source))
            continue
        number, name = source.removeprefix("transformer.encoder.layers.").split(".", 1)
        if name in _IN_LAYER:
            parts.append(Part(f"model.layers.{number}.{_IN_LAYER[name]}", source))
            continue
        ending = name.rsplit(".", 1)[1]
        for projection, (start, stop) in edges.items():
            parts.append(Part(f"model.layers.{number}.self_attn.{projection}.{ending}", source, start, stop))
    return parts


def load_released_language(
    folder: str | Path,
    dtype: Dtype = "bfloat16",
    device: str | torch.device = "cpu",
    quantization: Scheme | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """Reads a released folder into a native Glm, in evaluation mode.

    Weights are read one by one, layer by layer, and each layer is quantized before the next is read: what is needed
    beside the model itself is one layer.

    Args:
        quantization: "int8" or "int4" for the weights of the layers' matrices; see `quantization.quantize`.
        progress: show a progress bar.
    Raises:
        ValueError: as `read_released`; an unknown dtype; a weight that is not finite; no library for `quantization`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}")
    weights = read_released(folder)
    if quantization is not None:
        check_available(quantization, torch.device(device))
    with torch.device("meta"):
        model = GlmForCausalLM(weights.config)
    model.config.dtype = DTYPES[dtype]
    model.model.rotary_emb = type(model.model.rotary_emb)(weights.config).to(device)
    bar = tqdm(total=sum(s.num_bytes for s in weights.stored.values()), unit="B", unit_scale=True, disable=not progress)
    with bar:
        for name, parts in _by_module(weights.parts):
            owner = model.get_submodule(name)
            for part in parts:
                place = weights.place(part)
                local = part.key.removeprefix(f"{name}.")
                holder, _, attribute = local.rpartition(".")
                tensor = read_tensor(place, DTYPES[dtype]).to(device)
                setattr(owner.get_submodule(holder), attribute, nn.Parameter(tensor, requires_grad=False))
                bar.update(place.num_bytes)
            if quantization is not None and name.startswith("model.layers."):
                quantize(owner, quantization)
    return model.eval()


def _by_module(parts: list[Part]) -> Iterator[tuple[str, list[Part]]]:
    """Parts by the module that is loaded at once: one layer, or what stands outside of the layers."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        words = part.key.split(".")
        name = ".".join(words[:3]) if words[1] == "layers" else ".".join(words[:-1])
        groups.setdefault(name, []).append(part)
    yield from groups.items()
