"""The language model: transformers' native Glm at any size, or any other causal LM with an extended vocabulary.

A model folder is what transformers writes, `config.json` + safetensors, and beside it `siblings.json`: the hashes of
the speech tokenizer and of the vocabulary that its ids come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from duologue.checkpoint import DTYPES, Dtype
from duologue.config import parse_config, read_json, write_json
from duologue.vocabulary import Vocabulary

PROVENANCE_FILE = "siblings.json"


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of a new Glm. The sizes of a model stand in its recipe, not here.

    Attributes:
        num_kv_heads: heads of keys and values, shared by the query heads in groups.
        max_positions: ids that one conversation may hold.
        dropout: of the attention, in training only.
    """

    width: int = 320
    num_layers: int = 8
    num_heads: int = 5
    num_kv_heads: int = 1
    head_dim: int = 64
    ffn_dim: int = 768
    max_positions: int = 4096
    dropout: float = 0.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, {self.num_kv_heads}"
            )


@dataclass(frozen=True)
class Provenance:
    """Hashes of the speech tokenizer and the vocabulary that a language model or a token corpus was made with."""

    tokenizer: str
    vocabulary: str

    def check(self, other: Provenance, mine: str, theirs: str) -> None:
        """Refuses a part that was made with another tokenizer or vocabulary.

        Raises:
            ValueError: names both parts, `mine` and `theirs`, and what differs.
        """
        for name in ("tokenizer", "vocabulary"):
            own, given = getattr(self, name), getattr(other, name)
            if own != given:
                raise ValueError(
                    f"{mine} was made with another {name} than {theirs} ({own[:12]} and {given[:12]}): "
                    f"make both with the same {name}"
                )


def new_glm(vocabulary: Vocabulary, config: LanguageConfig, seed: int = 0) -> PreTrainedModel:
    """A Glm with random weights over the joint vocabulary, float32 on the CPU. The layout is that of GLM-4-Voice
    (docs/checkpoints.md 2.3): SwiGLU, RMSNorm, bias on q, k and v alone, rotary positions on half of each head in
    interleaved pairs."""
    glm = GlmConfig(
        vocab_size=vocabulary.size,
        hidden_size=config.width,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        attention_dropout=config.dropout,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=1e-6,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=None,
        eos_token_id=vocabulary.end_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GlmForCausalLM(glm)


@torch.no_grad()
def start_speech_embeddings(model: PreTrainedModel, vocabulary: Vocabulary, codebook: Tensor, seed: int = 0) -> None:
    """Starts the embeddings of the speech tokens from the tokenizer's codebook (codes, D): codes that sound alike begin
    alike, where from a random start each has to be learned from its own occurrences.

    The vectors are centered, half whitened (so that loudness does not drown the rest), turned into the model's width by
    a random orthogonal matrix, brought to the standard deviation of the embeddings, and given a quarter of noise.

    Raises:
        ValueError: the codebook has another number of codes than the vocabulary.
    """
    if len(codebook) != vocabulary.codebook_size:
        raise ValueError(f"the codebook has {len(codebook)} codes, the vocabulary {vocabulary.codebook_size}")
    table = model.get_input_embeddings().weight
    rows = slice(vocabulary.speech_offset, vocabulary.speech_offset + vocabulary.codebook_size)
    generator = torch.Generator().manual_seed(seed)
    centered = codebook.double().cpu() - codebook.double().cpu().mean(0)
    basis, variances, _ = torch.linalg.svd(centered.T @ centered / len(centered))
    scaled = centered @ basis * variances.clamp(min=1e-6 * float(variances[0])) ** -0.25
    width = table.shape[1]
    size = max(width, scaled.shape[1])
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    turned = scaled @ turn[: scaled.shape[1], :width]
    noise = torch.randn(turned.shape, generator=generator, dtype=torch.float64)
    std = float(table.float().std())
    table[rows] = (turned / turned.std() * std + 0.25 * std * noise).to(table)


def load_language(folder: str | Path, dtype: Dtype = "float32") -> PreTrainedModel:
    """Reads any causal LM of transformers from a folder of config.json + safetensors, in evaluation mode on the CPU.

    Nothing is fetched and no code of the folder is executed.

    Raises:
        ValueError: one sentence: no such folder, no config, an architecture that transformers does not have, a missing,
            truncated or surplus weight, a shape that disagrees, a value that is not a number.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no .safetensors file, so it is no language model that can be read safely")
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=DTYPES[dtype],
                ignore_mismatched_sizes=True,  # they are refused below, with their names
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {_sentence(error)}") from None
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        name = config.get("model_type")
        raise ValueError(
            f"{folder} (model_type {name!r}) cannot be loaded as a language model: {_sentence(error)}"
        ) from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(problem) or ()):
            what = problem.split("_")[0]
            raise ValueError(f"the weights in {folder} do not fit its config.json: {len(keys)} {what}, first {keys[0]}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.sum(dtype=torch.float32))):
            raise ValueError(f"weight {name} in {folder} holds values that are not numbers")
    model.eval()
    return model


def save_language(
    folder: str | Path,
    model: PreTrainedModel,
    provenance: Provenance,
    dtype: Dtype = "float32",
    max_shard_bytes: int = 2**31,
) -> None:
    """Writes a folder that `load_language` and plain transformers read; `model` itself is left as it is."""
    folder = Path(folder)
    cast: dict[tuple[int, torch.Size], Tensor] = {}  # tied embeddings stay one tensor, and are written once
    own = {
        name: cast.setdefault((value.data_ptr(), value.shape), value.to(DTYPES[dtype]))
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    kept = model.config.dtype
    model.config.dtype = DTYPES[dtype]
    try:
        with _quiet():
            model.save_pretrained(folder, state_dict=own, max_shard_size=max_shard_bytes)
    finally:
        model.config.dtype = kept
    write_json(folder / PROVENANCE_FILE, {"version": 1, **asdict(provenance)})


def load_provenance(folder: str | Path) -> Provenance:
    """What the language model in a folder was made with. Raises ValueError when the folder does not tell."""
    data = read_json(Path(folder) / PROVENANCE_FILE)
    if (version := data.pop("version", None)) != 1:
        raise ValueError(f"{Path(folder) / PROVENANCE_FILE} has version {version!r}; this release reads version 1")
    return parse_config(Provenance, data, str(Path(folder) / PROVENANCE_FILE))


def extend(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Gives a causal LM a row of input and output embedding for every id of the joint vocabulary.

    New rows are the mean of the old ones, so that at first no new id is more likely than the average old one. A model
    that has rows enough already keeps them all.
    """
    embedding = model.get_input_embeddings()
    old = embedding.weight.shape[0]
    if vocabulary.size <= old:
        return
    model.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    seen = set()
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if table is None or id(table.weight) in seen:
            continue
        seen.add(id(table.weight))
        with torch.no_grad():
            table.weight[old:] = table.weight[:old].float().mean(0).to(table.weight.dtype)
            bias = getattr(table, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias[old:] = bias[:old].mean()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and reports: what is wrong is raised."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _sentence(error: Exception) -> str:
    """The first sentence of a library's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
