"""Random weights in the released formats at any size, for load tests; the output is noise.

Weights are written tensor by tensor, so memory stays small.
"""

from __future__ import annotations

import base64
import itertools
import math
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from duologue.audio import LogMelConfig
from duologue.checkpoint import MAX_SHARD_BYTES
from duologue.config import write_json
from duologue.released.decoder.conformer import ConformerConfig
from duologue.released.decoder.decoder import build_released_decoder, save_released_decoder
from duologue.released.decoder.flow import ReleasedFlowConfig
from duologue.released.decoder.hift import HiFTConfig, PitchConfig
from duologue.released.decoder.unet import UNetConfig
from duologue.released.language import chatglm_shapes, read_config
from duologue.released.text import RANKS_FILE
from duologue.released.tokenizer import ReleasedSpeechTokenizer, released_shapes, write_tokenizer_configs
from duologue.released.weights import LABEL, write_stream
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizerConfig
from duologue.vocabulary import CHAT_CONTROLS

CHUNK = 2**24  # values drawn at once
LISTEN = LogMelConfig(128, floor="utterance")
ROWS_MULTIPLE = 512
# In the order of the published ids (docs/checkpoints.md 2.2); between the last and the speech tokens ids are left free.
SPECIALS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|begin_of_audio|>", "<|end_of_audio|>"),
)


@dataclass(frozen=True)
class ReleasedLanguageSizes:
    """Sizes of a ChatGLM; the defaults are the published ones (docs/checkpoints.md 2.2 and 2.3).

    Attributes:
        num_ranks: rows of text.
        first_speech: distance of speech token 0 from the end of the text rows.
    """

    width: int = 4096
    num_layers: int = 40
    num_heads: int = 32
    num_kv_heads: int = 2
    head_dim: int = 128
    ffn_dim: int = 13696
    seq_length: int = 8192
    codebook_size: int = 16384
    num_ranks: int = 151329
    first_speech: int = 1024

    @property
    def num_rows(self) -> int:
        """Rows of the embedding, padding included."""
        used = self.num_ranks + self.first_speech + self.codebook_size
        return -(-used // ROWS_MULTIPLE) * ROWS_MULTIPLE


@dataclass(frozen=True)
class Preset:
    """Sizes of a complete random set."""

    tokenizer: SpeechTokenizerConfig
    language: ReleasedLanguageSizes
    flow: ReleasedFlowConfig
    vocoder: HiFTConfig


def _tiny() -> Preset:
    encoder = EncoderConfig(LISTEN.num_mels, 64, 4, 128, 2, 200, 1500)
    flow = ReleasedFlowConfig(
        input_size=48,
        vocab_size=256,
        encoder=ConformerConfig(input_size=48, output_size=32, attention_heads=4, linear_units=64, num_blocks=2),
        estimator=UNetConfig(channels=(32, 32), attention_head_dim=16, n_blocks=1, num_mid_blocks=2, num_heads=2),
    )
    return Preset(
        SpeechTokenizerConfig(LISTEN, encoder, QuantizerConfig(256)),
        ReleasedLanguageSizes(64, 3, 4, 2, 16, 96, codebook_size=256, num_ranks=448, first_speech=40),
        flow,
        HiFTConfig(base_channels=32, f0_predictor=PitchConfig(cond_channels=32)),
    )


def _published() -> Preset:
    encoder = EncoderConfig(LISTEN.num_mels, 1280, 20, 5120, 16, 200, 1500)
    listen = SpeechTokenizerConfig(LISTEN, encoder, QuantizerConfig(16384))
    return Preset(listen, ReleasedLanguageSizes(), ReleasedFlowConfig(), HiFTConfig())


PRESETS: dict[str, Callable[[], Preset]] = {"tiny": _tiny, "9b": _published}


def init_random(preset: str, folder: str | Path, seed: int = 0, progress: bool = False) -> None:
    """Writes a complete set in the released formats with random weights.

    Raises:
        ValueError: an unknown preset, or a folder that is not empty.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; the choices are {', '.join(PRESETS)}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; give a new one")
    sizes = PRESETS[preset]()
    write_random_tokenizer(folder / "tokenizer", sizes.tokenizer, seed, progress)
    write_random_language(folder / "language", sizes.language, seed, progress=progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = build_released_decoder(sizes.flow, sizes.vocoder)
    save_released_decoder(folder / "decoder", decoder, note=f"{LABEL}: made by `duologue init-random {preset}`")


def write_random_tokenizer(
    folder: str | Path, config: SpeechTokenizerConfig, seed: int = 0, progress: bool = False
) -> None:
    """Writes config.json, preprocessor_config.json and float32 weights (docs/checkpoints.md 1.1 and 1.3)."""
    folder = Path(folder)
    with torch.device("meta"):
        module = ReleasedSpeechTokenizer(config)
    write_random(folder, released_shapes(module), torch.float32, seed, progress=progress)
    write_tokenizer_configs(folder, config, {LABEL: True})


def write_random_language(
    folder: str | Path,
    sizes: ReleasedLanguageSizes,
    seed: int = 0,
    max_shard_bytes: int = 2 * 10**9,
    progress: bool = False,
) -> None:
    """Writes config, bfloat16 shards, ranks file and tokenizer settings.

    Raises:
        ValueError: fewer ranks than bytes, or no room for the special tokens.
    """
    if sizes.num_ranks < 256 or sizes.first_speech < len(SPECIALS):
        raise ValueError(
            f"num_ranks must be at least 256 and first_speech at least {len(SPECIALS)}, got {sizes.num_ranks} and "
            f"{sizes.first_speech}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: sizes.num_ranks + index for index, name in enumerate(SPECIALS)}
    ends = [ids[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    assert set(CHAT_CONTROLS) <= set(ids)
    description = {
        LABEL: True,
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "ffn_hidden_size": sizes.ffn_dim,
        "hidden_size": sizes.width,
        "kv_channels": sizes.head_dim,
        "layernorm_epsilon": 3.90625e-08,
        "multi_query_attention": True,
        "multi_query_group_num": sizes.num_kv_heads,
        "num_attention_heads": sizes.num_heads,
        "num_layers": sizes.num_layers,
        "original_rope": True,
        "padded_vocab_size": sizes.num_rows,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": 1,
        "seq_length": sizes.seq_length,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.num_rows,
        "eos_token_id": ends,
        "pad_token_id": ends[0],
    }
    write_json(folder / "config.json", description)
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "max_length": sizes.seq_length}
    write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[0], **sampling})
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(_ranks(sizes.num_ranks)))
    (folder / RANKS_FILE).write_text("\n".join(lines) + "\n", encoding="ascii")
    first = sizes.num_ranks + sizes.first_speech
    names = {token: name for name, token in ids.items()}
    names |= {first + code: f"<|audio_{code}|>" for code in range(sizes.codebook_size)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    entries = {str(token): {"content": name, **flags} for token, name in names.items()}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": entries, "padding_side": "left"})
    shapes = chatglm_shapes(read_config(folder))
    write_random(folder, shapes, torch.bfloat16, seed, max_shard_bytes, progress)


def write_random(
    folder: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes `model.safetensors`, or shards with an index, with scales that keep activations bounded.

    Norm scales are 1 and other vectors 0. Matrices are normal with variance 1 / inputs, tables (`embed...`,
    `codebook...`) with variance 1 / 25.

    Args:
        shapes: shapes by key, in file order.
        progress: shows a progress bar.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += num_bytes
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for number, keys in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            weight_map |= dict.fromkeys(keys, name)
            part = {key: shapes[key] for key in keys}
            write_stream(folder / name, part, dtype, _draw(part, dtype, generator, bar))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _draw(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, generator: torch.Generator, bar: Any
) -> Iterator[Tensor]:
    for key, shape in shapes.items():
        numel = math.prod(shape)
        for start in range(0, numel, CHUNK):
            count = min(CHUNK, numel - start)
            yield torch.full((count,), _constant(key, shape)) + _scale(key, shape) * torch.randn(
                count, generator=generator
            )
            bar.update(count * dtype.itemsize)


def _constant(key: str, shape: tuple[int, ...]) -> float:
    return 1.0 if len(shape) == 1 and key.endswith("norm.weight") else 0.0


def _scale(key: str, shape: tuple[int, ...]) -> float:
    if len(shape) < 2:
        return 0.0
    if "embed" in key or "codebook" in key:
        return 0.2
    return 1.0 / math.sqrt(math.prod(shape[1:]))


def _ranks(number: int) -> list[bytes]:
    """Returns all bytes, then lower-case words by length; each extends a shorter one by a letter."""
    words = (
        "".join(letters).encode()
        for length in itertools.count(2)
        for letters in itertools.product(string.ascii_lowercase, repeat=length)
    )
    return [*(bytes([byte]) for byte in range(256)), *itertools.islice(words, number - 256)]
