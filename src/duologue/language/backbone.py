"""The language model: transformers' Glm of any size, or any causal LM with an extended vocabulary.

A model folder is in the format of transformers. Its `siblings.json` holds the hashes of speech tokenizer and
vocabulary. The functions import transformers themselves, because its models take seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from duologue.checkpoint import DTYPES, Dtype, in_int8, load_tensors, load_weights, save_tensors, stored_tensors
from duologue.config import parse_config, read_json, write_json
from duologue.language.adapters import merged_state
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVENANCE_FILE = "siblings.json"


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of a new Glm. Recipes hold the sizes of trained models.

    Attributes:
        num_kv_heads: heads of keys and values, each shared by a group of query heads.
        max_positions: maximum ids of a conversation.
        dropout: attention dropout in training.
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
    """Hashes of the tokenizer and vocabulary that a model or corpus was built with."""

    tokenizer: str
    vocabulary: str

    def check(self, other: Provenance, mine: str, theirs: str) -> None:
        """Raises ValueError if the hashes differ, naming both parts, `mine` and `theirs`."""
        for name in ("tokenizer", "vocabulary"):
            own, given = getattr(self, name), getattr(other, name)
            if own != given:
                raise ValueError(
                    f"{mine} was made with another {name} than {theirs} ({own[:12]} and {given[:12]}): "
                    f"make both with the same {name}"
                )


def new_glm(vocabulary: Vocabulary, config: LanguageConfig, seed: int = 0) -> PreTrainedModel:
    """Returns a Glm with random float32 weights over the joint vocabulary.

    The layout is that of GLM-4-Voice (docs/checkpoints.md 2.3): SwiGLU, RMSNorm, bias on q, k and v only, rotary
    positions on half of each head in interleaved pairs.
    """
    from transformers import GlmConfig, GlmForCausalLM

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
def start_speech_embeddings(
    model: PreTrainedModel, vocabulary: Vocabulary, codebook: Tensor, spread: float = 1.0, seed: int = 0
) -> None:
    """Initializes the embeddings of speech tokens from the tokenizer's codebook (codes, D), so that similar codes begin
    alike.

    The vectors are centered, half whitened and mapped to the model's width by a random orthogonal matrix. They get a
    quarter of noise, and lie around the present mean of the rows.

    Args:
        spread: their standard deviation, as a multiple of that of the embeddings. In a trained model whose output layer
            is tied, rows far from the mean would be likelier than all text.

    Raises:
        ValueError: codebook and vocabulary have different numbers of codes.
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
    std = spread * float((table.float() - table.float().mean(0)).std())
    center = table[rows].double().mean(0).cpu()
    table[rows] = (center + turned / turned.std() * std + 0.25 * std * noise).to(table)


def load_language(folder: str | Path, dtype: Dtype = "float32") -> PreTrainedModel:
    """Loads a causal LM of transformers in evaluation mode on the CPU, without network access or code execution.

    Matrices in int8 (`duologue.checkpoint`) are read as floats; plain transformers does not read such a folder.

    Raises:
        ValueError: the folder or config is missing, the architecture unknown, or a weight is missing, truncated,
            unexpected, of another shape or not finite.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    config = read_json(folder / "config.json")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no .safetensors file, so it is no language model that can be read safely")
    if any(stored.scale is not None for stored in stored_tensors(folder).values()):
        return _load_int8(folder, dtype)
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=DTYPES[dtype],
                ignore_mismatched_sizes=True,  # refused below by name
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {failure_sentence(error)}") from None
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        name = config.get("model_type")
        raise ValueError(
            f"{folder} (model_type {name!r}) cannot be loaded as a language model: {failure_sentence(error)}"
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


def _load_int8(folder: Path, dtype: Dtype) -> PreTrainedModel:
    """Loads a folder whose matrices are in int8, which transformers itself does not read."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=DTYPES[dtype])
            if (folder / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} cannot be loaded as a language model: {failure_sentence(error)}") from None
    load_weights(model, load_tensors(folder), str(folder))
    return model.eval()


def save_language(
    folder: str | Path,
    model: PreTrainedModel,
    provenance: Provenance,
    dtype: Dtype | Literal["int8"] = "float32",
    max_shard_bytes: int = 2**31,
) -> None:
    """Writes a folder that `load_language` reads, and plain transformers too unless it is in int8.

    `model` is unchanged. Adapters are merged into the weights, see `adapters.merged_state`.
    """
    folder = Path(folder)
    if dtype == "int8":
        _save_int8(folder, model, max_shard_bytes)
    else:
        _save_floats(folder, model, dtype, max_shard_bytes)
    save_provenance(folder, provenance)


def _save_int8(folder: Path, model: PreTrainedModel, max_shard_bytes: int) -> None:
    with quiet_transformers():
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    # Tied embeddings are written once, under their first name.
    weights = {tensor.data_ptr(): (key, tensor) for key, tensor in reversed(merged_state(model).items())}
    save_tensors(folder, in_int8(dict(reversed(weights.values()))), max_shard_bytes=max_shard_bytes)


def _save_floats(folder: Path, model: PreTrainedModel, dtype: Dtype, max_shard_bytes: int) -> None:
    cast: dict[tuple[int, torch.Size], Tensor] = {}  # tied embeddings are written once
    own = {
        name: cast.setdefault((value.data_ptr(), value.shape), value.to(DTYPES[dtype]))
        for name, value in merged_state(model).items()
        if value.is_floating_point()
    }
    kept = model.config.dtype
    model.config.dtype = DTYPES[dtype]
    try:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=own, max_shard_size=max_shard_bytes)
    finally:
        model.config.dtype = kept


def save_provenance(folder: str | Path, provenance: Provenance) -> None:
    """Writes the provenance of a language model's folder."""
    write_json(Path(folder) / PROVENANCE_FILE, {"version": 1, **asdict(provenance)})


def load_provenance(folder: str | Path) -> Provenance:
    """Reads the provenance of a language model's folder. Raises ValueError if there is none."""
    data = read_json(Path(folder) / PROVENANCE_FILE)
    if (version := data.pop("version", None)) != 1:
        raise ValueError(f"{Path(folder) / PROVENANCE_FILE} has version {version!r}; this release reads version 1")
    return parse_config(Provenance, data, str(Path(folder) / PROVENANCE_FILE))


def known_provenance(folder: str | Path) -> dict[str, str] | None:
    """Returns the provenance of a language model's folder as plain values; None if it has none."""
    return asdict(load_provenance(folder)) if (Path(folder) / PROVENANCE_FILE).is_file() else None


def extend(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Extends the embeddings of a causal LM to the joint vocabulary.

    New rows are the mean of the old ones, so no new id starts out likelier than the average. Surplus rows are kept.
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
def quiet_transformers() -> Iterator[None]:
    """Suppresses the progress bars and reports of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def failure_sentence(error: Exception) -> str:
    """Returns a library's message on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
