"""A folder in the format of glm-4-voice-9b with random weights and a made-up text tokenizer, at any size."""

from __future__ import annotations

import base64
import itertools
import string
from dataclasses import dataclass
from pathlib import Path

import torch

from duologue.config import write_json
from duologue.language.released import chatglm_shapes, read_config
from duologue.language.released_text import RANKS_FILE
from duologue.random_weights import LABEL, write_random
from duologue.vocabulary import CHAT_CONTROLS

ROWS_MULTIPLE = 512
# In the order of the published ids (checkpoints.md 2.2); between the last and the speech tokens ids are left free.
SPECIALS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|begin_of_audio|>", "<|end_of_audio|>"),
)


@dataclass(frozen=True)
class ReleasedLanguageSizes:
    """Sizes of a ChatGLM; the defaults are the published ones (checkpoints.md 2.2 and 2.3).

    Attributes:
        num_ranks: rows of text; first_speech: distance of speech token 0 from the end of them.
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


def write_random_language(
    folder: str | Path,
    sizes: ReleasedLanguageSizes,
    seed: int = 0,
    max_shard_bytes: int = 2 * 10**9,
    progress: bool = False,
) -> None:
    """Writes config, bfloat16 shards, ranks file and tokenizer settings.

    Raises:
        ValueError: fewer ranks than bytes, or no room for the special tokens before the speech tokens.
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


def _ranks(number: int) -> list[bytes]:
    """All single bytes, then words of lower-case letters, short ones first: each is a shorter one and a letter."""
    words = (
        "".join(letters).encode()
        for length in itertools.count(2)
        for letters in itertools.product(string.ascii_lowercase, repeat=length)
    )
    return [*(bytes([byte]) for byte in range(256)), *itertools.islice(words, number - 256)]
