"""GGUF files of a Glm for llama.cpp: weights and sizes, no vocabulary, because Duologue exchanges ids.

The layout is llama.cpp's architecture `chatglm` (SwiGLU with gate and up in one matrix, rotary positions in interleaved
pairs on a part of each head). Query, key and value stay apart. Nothing is permuted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GlmConfig, GlmForCausalLM

from duologue.checkpoint import stored_tensors
from duologue.config import read_json
from duologue.released.language import is_released, read_released
from duologue.released.weights import check_stored

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
ARCHITECTURE = "chatglm"
_BLOCK = 32  # values that share one scale in q8_0 and q4_0
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class _Weight:
    """A weight by its key of `GlmForCausalLM`; values are read on demand."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def name(self) -> str:
        """The name in GGUF."""
        if self.key in _OUTSIDE:
            return _OUTSIDE[self.key]
        number, inside = self.key.removeprefix("model.layers.").split(".", 1)
        module, ending = inside.rsplit(".", 1)
        return f"blk.{number}.{_IN_LAYER[module]}.{ending}"


def write_gguf(
    folder: str | Path,
    out: str | Path,
    dtype: GgufType = "f16",
    metadata: Mapping[str, str] | None = None,
    progress: bool = False,
) -> None:
    """Writes a Glm as one GGUF file. Memory is bounded by the largest matrix in float32.

    Vectors stay in float32. With `q4_0`, the embedding and the head have 8 bits, because they choose the ids.

    Args:
        folder: a released language model (ChatGLM), or a Glm in the format of transformers.
        dtype: of the matrices. llama.cpp's `llama-quantize` makes its other types from a file in f16.
        metadata: written as `duologue.<key>`, such as the hash of the vocabulary, which `LlamaStepper` compares.

    Raises:
        ValueError: the package gguf is missing; another architecture, sizes that llama.cpp cannot run, or a damaged
            file; `out` exists.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ValueError("GGUF files need the package gguf: install Duologue with its extra 'gguf'") from error
    if dtype not in GGUF_TYPES:
        raise ValueError(f"unknown type {dtype!r} of a GGUF file; the choices are {', '.join(GGUF_TYPES)}")
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; give the name of a new file")
    config, weights = _read(folder)
    _check_sizes(config, folder)
    part = out.with_name(f"{out.name}.part")
    writer = gguf.GGUFWriter(part, ARCHITECTURE)
    _add_sizes(writer, config)
    for key, value in (metadata or {}).items():
        writer.add_string(f"duologue.{key}", value)
    types = [gguf.GGMLQuantizationType[_type_of(weight, dtype).upper()] for weight in weights]
    for weight, kind in zip(weights, types, strict=True):
        num_bytes = math.prod(gguf.quant_shape_to_byte_shape(weight.shape, kind))
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(math.prod(weight.shape) for weight in weights)
    with tqdm(total=total, unit_scale=True, desc=out.name, disable=not progress) as bar:
        for weight, kind in zip(weights, types, strict=True):
            writer.write_tensor_data(gguf.quants.quantize(weight.read().float().numpy(), kind))
            bar.update(math.prod(weight.shape))
    writer.close()
    os.replace(part, out)


def _read(folder: Path) -> tuple[GlmConfig, list[_Weight]]:
    """Returns config and weights of a released or native folder."""
    if is_released(folder):
        released = read_released(folder)
        weights = [_Weight(one.key, released.shape(one), partial(released.read, one)) for one in released.native]
        return released.config, weights
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "glm":
        raise ValueError(
            f"{path} is of model_type {config.get('model_type')!r}, but this command writes a Glm; for other "
            "architectures use convert_hf_to_gguf.py of llama.cpp"
        )
    native: GlmConfig = GlmConfig.from_dict(config)
    stored = stored_tensors(folder)
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in GlmForCausalLM(native).state_dict().items()}
    if native.tie_word_embeddings:
        del wanted["lm_head.weight"]
        stored.pop("lm_head.weight", None)
    check_stored(stored, wanted, folder)
    return native, [_Weight(key, stored[key].shape, stored[key].read) for key in wanted]


def _check_sizes(config: GlmConfig, folder: Path) -> None:
    """Raises ValueError for sizes that llama.cpp's architecture cannot express."""
    heads = config.num_attention_heads * config.head_dim
    if heads != config.hidden_size:
        raise ValueError(
            f"{folder}: the heads have {heads} values together and the layers {config.hidden_size}; "
            "llama.cpp runs only equal sizes"
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"{folder}: rotary positions of the type {kind!r} cannot be written")


def _add_sizes(writer: Any, config: GlmConfig) -> None:
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(config.head_dim * rope.get("partial_rotary_factor", 0.5)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _type_of(weight: _Weight, dtype: GgufType) -> GgufType:
    if len(weight.shape) == 1:
        return "f32"
    if dtype == "q4_0" and weight.key in _OUTSIDE:
        dtype = "q8_0"
    return "f16" if dtype in ("q8_0", "q4_0") and weight.shape[-1] % _BLOCK else dtype
