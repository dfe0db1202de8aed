"""Trained parts in the released layouts, so that other tools run them; the opposite of `released/convert.py`.

language/    ChatGLM shards, config.json, tokenizer.model, tokenizer_config.json
decoder/     config.yaml, flow.pt, hift.pt
"""

from __future__ import annotations

import base64
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GlmConfig

from duologue.checkpoint import DTYPES, FLOAT_TYPES, Dtype, StoredTensor, load_component, read_kind, stored_tensors
from duologue.config import read_json, write_json
from duologue.language.backbone import known_provenance, load_language, load_provenance, save_language
from duologue.released.convert import convert
from duologue.released.decoder.flow import ReleasedFlow, ReleasedFlowConfig
from duologue.released.decoder.folder import read_decoder_config, write_decoder_config
from duologue.released.gguf import GgufType, write_gguf
from duologue.released.language import NativeWeight, chatglm_shapes, is_released, native_weights, read_config
from duologue.released.text import RANKS_FILE, load_released_vocabulary, save_for_transformers
from duologue.released.weights import write_stream
from duologue.text import byte_letters
from duologue.vocabulary import Vocabulary

MAX_SHARD_BYTES = 2 * 10**9
_GGUF_TYPES: dict[Dtype, GgufType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_HEAD = "lm_head.weight"
_TABLE = "model.embed_tokens.weight"


def export_transformers(folder: str | Path, out: str | Path, dtype: Dtype | None = None) -> None:
    """Writes a language model as a folder for `from_pretrained`, with its tokenizer.

    Args:
        folder: of a language model, trained or released, or of a model that has a folder `language`.

    Raises:
        ValueError: a part is missing or damaged, or `out` holds something else.
    """
    place = _language_folder(folder)
    if is_released(place):
        convert(place, out, dtype)
        return
    _check_empty(Path(out))
    vocabulary = _vocabulary(place)
    save_language(out, load_language(place), load_provenance(place), dtype or "float32")
    save_for_transformers(vocabulary, out)


def export_gguf(folder: str | Path, out: str | Path, dtype: Dtype | None = None) -> None:
    """Writes a Glm as one GGUF file for llama.cpp, in float16 by default. Raises ValueError as `gguf.write_gguf`."""
    place = _language_folder(folder)
    write_gguf(place, out, _GGUF_TYPES[dtype or "float16"], known_provenance(place))


def export_released(
    folder: str | Path, out: str | Path, dtype: Dtype | None = None, decoder: str | Path | None = None
) -> list[str]:
    """Writes the trained parts of a folder in the released layouts.

    Args:
        folder: with `language` (a Glm in the released vocabulary), `flow` (of the released architecture), or both.
        dtype: of the language model's new weights; that of the old ones by default.
        decoder: a released decoder, whose vocoder (`hift`) is copied beside the flow.

    Returns:
        The names of the written parts.

    Raises:
        ValueError: there is no such part, a part is of another architecture or vocabulary, or `out` is not empty.
    """
    folder, out = Path(folder), Path(out)
    _check_empty(out)
    written = []
    if (folder / "language").is_dir() or (folder / "vocabulary.json").is_file():
        export_language(_language_folder(folder), out / "language", dtype)
        written.append("language")
    if (folder / "flow").is_dir():
        if decoder is None:
            raise ValueError(f"{folder / 'flow'} needs the vocoder of a released decoder: give its folder (--decoder)")
        export_flow(folder / "flow", decoder, out / "decoder")
        written.append("decoder")
    if not written:
        raise ValueError(f"{folder} holds neither a folder 'language' with its vocabulary nor a folder 'flow'")
    return written


def export_language(
    folder: Path, out: Path, dtype: Dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes a Glm with its vocabulary as ChatGLM shards (docs/checkpoints.md 2.3 and 2.4), tensor by tensor.

    Raises:
        ValueError: the model is no Glm of the released kind, or its vocabulary cannot be written as a ranks file.
    """
    config = GlmConfig.from_dict(read_json(folder / "config.json"))
    vocabulary = _vocabulary(folder)
    _check_released_kind(folder, config, vocabulary)
    stored = stored_tensors(folder)
    written_as = DTYPES[dtype] if dtype is not None else FLOAT_TYPES[stored[_TABLE].dtype]
    out.mkdir(parents=True, exist_ok=True)
    _write_config(config, vocabulary, out, written_as)
    _write_tokenizer(vocabulary, out)
    if load_released_vocabulary(out).hash != vocabulary.hash:
        shutil.rmtree(out)
        raise ValueError(
            f"the vocabulary of {folder} is not of the released kind: a tiktoken ranks file, the released controls and "
            "the released template. Use --format transformers"
        )
    parts: dict[str, list[NativeWeight]] = {}
    for weight in native_weights(config):
        parts.setdefault(weight.source, []).append(weight)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for key, shape in chatglm_shapes(config).items():
        num_bytes = math.prod(shape) * written_as.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = shape
        size += num_bytes
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_stream(out / name, shapes, written_as, _pieces(shapes, parts, stored, written_as))
        weight_map |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shapes in shards for shape in shapes.values()) * written_as.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)


def export_flow(folder: Path, decoder: str | Path, out: Path) -> None:
    """Writes a trained flow as config.yaml and flow.pt, and copies the vocoder of a released decoder.

    Raises:
        ValueError: the flow is of another architecture, or its mels are not the vocoder's.
    """
    if (kind := read_kind(folder)) != ReleasedFlow.__name__:
        raise ValueError(f"{folder} holds a {kind}, not a {ReleasedFlow.__name__}: it has no released layout")
    flow = load_component(folder, ReleasedFlow, ReleasedFlowConfig)
    decoder = Path(decoder)
    _, vocoder = read_decoder_config(decoder)
    if vocoder.in_channels != flow.config.output_size:
        raise ValueError(
            f"the vocoder in {decoder} takes {vocoder.in_channels} mels, the flow in {folder} makes "
            f"{flow.config.output_size}"
        )
    out.mkdir(parents=True, exist_ok=True)
    for file in decoder.glob("hift*"):
        shutil.copy(file, out / file.name)
    write_decoder_config(out, flow.config, vocoder)
    torch.save({key: tensor.detach() for key, tensor in flow.state_dict().items()}, out / "flow.pt")


def _language_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    return folder / "language" if (folder / "language").is_dir() else folder


def _vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in a language model's folder, or beside it."""
    inside = (folder / "vocabulary.json").is_file()
    return Vocabulary.load(folder if inside else folder.parent / "vocabulary")


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; give a new one")


def _check_released_kind(folder: Path, config: GlmConfig, vocabulary: Vocabulary) -> None:
    rope = config.rope_parameters or {}
    kind = {
        "model_type": (config.model_type, "glm"),
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (config.attention_bias, True),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 0.5), 0.5),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "vocab_size": (config.vocab_size, vocabulary.size),
    }
    for key, (value, wanted) in kind.items():
        if value != wanted:
            raise ValueError(f"{folder / 'config.json'}: {key} is {value!r}; the released layout needs {wanted!r}")


def _write_config(config: GlmConfig, vocabulary: Vocabulary, out: Path, dtype: torch.dtype) -> None:
    rope = config.rope_parameters or {}
    ends = list(vocabulary.end_ids)
    description: dict[str, Any] = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "ffn_hidden_size": config.intermediate_size,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "original_rope": True,
        "padded_vocab_size": config.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": rope.get("rope_theta", 10000.0) / 10000.0,
        "seq_length": config.max_position_embeddings,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "eos_token_id": config.eos_token_id if config.eos_token_id is not None else ends,
        "pad_token_id": config.pad_token_id,
    }
    write_json(out / "config.json", description)
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "max_length": config.max_position_embeddings}
    write_json(out / "generation_config.json", {"eos_token_id": ends, "pad_token_id": config.pad_token_id, **sampling})
    assert read_config(out).to_dict()["hidden_size"] == config.hidden_size


def _write_tokenizer(vocabulary: Vocabulary, out: Path) -> None:
    """Writes text rows as `base64 rank` lines, and the added tokens by id."""
    added = {token: entry.content for token, entry in vocabulary.tokenizer.get_added_tokens_decoder().items()}
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    lines = []
    for word, rank in sorted(vocabulary.tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]):
        if rank in added:
            continue
        if any(letter not in bytes_of for letter in word):
            raise ValueError(f"the text token {word!r} is not of byte-level BPE, so it has no line in {RANKS_FILE}")
        lines.append(f"{base64.b64encode(bytes(bytes_of[letter] for letter in word)).decode()} {rank}")
    (out / RANKS_FILE).write_text("\n".join(lines) + "\n", encoding="ascii")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    entries = {str(token): {"content": name, **flags} for token, name in sorted(added.items())}
    write_json(out / "tokenizer_config.json", {"added_tokens_decoder": entries, "padding_side": "left"})


def _pieces(
    shapes: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, list[NativeWeight]],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yields the values of these ChatGLM weights: native weights in the order of their rows."""
    for source in shapes:
        for weight in sorted(parts[source], key=lambda part: part.start or 0):
            tied = weight.key == _HEAD and _HEAD not in stored
            yield stored[_TABLE if tied else weight.key].read(dtype)
