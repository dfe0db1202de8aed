"""LoRA adapters that are kept beside their base, and their way back into whole weights.

    adapter_config.json          of peft, with the folder of the base
    adapter_model.safetensors    the matrices A and B in peft's names
    rows.safetensors             trained rows of embedding and head, where there are any
    siblings.json, vocabulary.json, tokenizer.json

Matrices alone also load in peft on the base. Trained rows need `merge_adapter`: the base has no speech ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from duologue.checkpoint import DTYPES, Dtype
from duologue.config import read_json
from duologue.language.adapters import LoraOptions, RowsEmbedding, RowsHead, lora_config
from duologue.language.backbone import (
    PROVENANCE_FILE,
    Provenance,
    extend,
    load_language,
    load_provenance,
    save_language,
    save_provenance,
)
from duologue.language.pretrained import load_backbone
from duologue.released.language import is_released, load_released_language
from duologue.released.text import save_for_transformers
from duologue.vocabulary import Vocabulary

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ROWS_FILE = "rows.safetensors"
_PREFIX = "base_model.model."


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter that `save_adapter` or peft wrote."""
    return (Path(folder) / CONFIG_FILE).is_file()


def save_adapter(
    folder: str | Path,
    model: PreTrainedModel,
    options: LoraOptions,
    base: str,
    vocabulary: Vocabulary,
    provenance: Provenance,
) -> None:
    """Writes the adapters of a model in training and its trained rows.

    Args:
        base: folder or .gguf file that the training started from.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    matrices = {
        _PREFIX + key.replace(".default.weight", ".weight"): value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if ".lora_A." in key or ".lora_B." in key
    }
    save_file(matrices, folder / WEIGHTS_FILE)
    if rows := dict(_trained_rows(model)):
        save_file(rows, folder / ROWS_FILE)
    config = lora_config(options)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_for_transformers(vocabulary, folder)
    save_provenance(folder, provenance)


def merge_adapter(
    folder: str | Path, dtype: Dtype | None = None, base: str | Path | None = None
) -> tuple[PreTrainedModel, Vocabulary, Provenance]:
    """Loads the base of an adapter and adds the adapter to its weights.

    Args:
        dtype: of the weights; bfloat16 for a released base by default, else float32.
        base: where the base is now; None for the place that the adapter names.

    Raises:
        ValueError: the base is missing or another model, or a file of the adapter is damaged.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    vocabulary, provenance = Vocabulary.load(folder), load_provenance(folder)
    place = Path(base if base is not None else config["base_model_name_or_path"])
    if not place.exists():
        raise ValueError(f"{place}, the base of the adapter {folder}, does not exist; name its place with --base")
    model = _load_base(place, vocabulary, dtype)
    scale = float(config["lora_alpha"]) / int(config["r"])
    matrices = _read(folder / WEIGHTS_FILE)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for key in sorted(key for key in matrices if ".lora_A." in key):
            name = key.removeprefix(_PREFIX).replace(".lora_A.weight", ".weight")
            down, up = matrices[key].float(), matrices[key.replace(".lora_A.", ".lora_B.")].float()
            weight = weights.get(name)
            if weight is None or weight.shape != (len(up), down.shape[1]):
                raise ValueError(f"{place} has no matrix {name} of {(len(up), down.shape[1])}; it is not the base")
            weight.copy_((weight.float() + scale * (up @ down)).to(weight.dtype))
        if (folder / ROWS_FILE).exists():
            _put_rows(model, _read(folder / ROWS_FILE))
    return model.eval(), vocabulary, provenance


@contextmanager
def whole_language(folder: str | Path, dtype: Dtype | None = None, base: str | Path | None = None) -> Iterator[Path]:
    """Yields a folder with a whole language model: the given one, or for an adapter a temporary one with it merged.

    Args:
        folder: `final` of a run, or the folder of its language model or adapter.
    """
    folder = Path(folder)
    place = folder if is_adapter(folder) else folder / "adapter"
    if not is_adapter(place):
        if base is not None:
            raise ValueError(f"{folder} holds no adapter, so it has no base")
        yield folder
        return
    with TemporaryDirectory(prefix="duologue-") as scratch:
        model, vocabulary, provenance = merge_adapter(place, dtype, base)
        language = Path(scratch) / "language"
        own = cast(Dtype, next(name for name, one in DTYPES.items() if one == model.dtype))
        save_language(language, model, provenance, own)
        save_for_transformers(vocabulary, language)
        yield Path(scratch)


def _load_base(place: Path, vocabulary: Vocabulary, dtype: Dtype | None) -> PreTrainedModel:
    if is_released(place):
        return load_released_language(place, dtype or "bfloat16")
    dtype = dtype or "float32"
    if (place / PROVENANCE_FILE).is_file():
        model = load_language(place, dtype)
        extend(model, vocabulary)
        return model
    model, own = load_backbone(place, vocabulary.codebook_size, dtype)
    if own.hash != vocabulary.hash:
        raise ValueError(f"{place} has another vocabulary than the adapter, so it is not its base")
    return model


def _trained_rows(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Indices (R,) and trained rows (R, D) of embedding and head; tied tables are one."""
    seen: set[int] = set()
    for name, table in _tables(model):
        if isinstance(table, RowsEmbedding | RowsHead):
            rows, values = table.table.rows, table.table.trained
        elif table.weight.requires_grad:
            rows, values = torch.arange(len(table.weight)), table.weight
        else:
            continue
        if id(values) not in seen:
            yield f"{name}.rows", rows.cpu().clone()
            yield f"{name}.values", values.detach().cpu().clone()
        seen.add(id(values))


def _put_rows(model: PreTrainedModel, rows: dict[str, Tensor]) -> None:
    for name, table in _tables(model):
        if f"{name}.rows" in rows:
            values = rows[f"{name}.values"].to(table.weight.dtype)
            table.weight.index_copy_(0, rows[f"{name}.rows"], values)


def _tables(model: PreTrainedModel) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
