"""What is trained of a language model: low-rank adapters (LoRA, arXiv:2106.09685), or some rows of its tables.

Shapes: V ids of the vocabulary, R trained rows, D width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from duologue.interleave import Kind
from duologue.quantization import Scheme, check_available, quantize
from duologue.vocabulary import Vocabulary

_FROZEN_KINDS = (Kind.TEXT, Kind.PADDING)


@dataclass(frozen=True)
class LoraOptions:
    """Settings of low-rank adapters.

    Attributes:
        rank, alpha: the update of a matrix is B A alpha / rank; alpha is twice the rank by default.
        targets: names of the adapted layers, or "all-linear" for all but the output head.
        train_embeddings: rows of embedding and head that are trained beside: all, those of speech and controls, or
            none.
        merge: whether the result is the whole model; else it is the adapter alone, beside its base.
        quantization: "int4" (QLoRA, arXiv:2305.14314) or "int8" for the frozen matrices; needs bitsandbytes on CUDA.
    """

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    train_embeddings: Literal["speech", "all", "none"] = "speech"
    merge: bool = True
    quantization: Scheme | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")


def add_lora(model: PreTrainedModel, vocabulary: Vocabulary, options: LoraOptions, device: torch.device) -> None:
    """Freezes a model and adds adapters to it in place.

    Args:
        device: where the model will be trained; a quantized model is moved there.

    Raises:
        ValueError: peft or bitsandbytes is not installed, or no layer has the name of a target.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora needs peft, which is not installed: pip install peft")
    if options.quantization is not None:
        if device.type != "cuda":
            raise ValueError(
                f"lora.quantization is {options.quantization!r}, which needs bitsandbytes on CUDA: train with --device "
                "cuda, or leave the key out"
            )
        check_available(options.quantization, device)
    import peft

    model.requires_grad_(False)
    if options.quantization is not None:
        quantize(model.to(device).base_model, options.quantization)
        # peft looks here for the kind of adapter layer
        setattr(model, "is_loaded_in_4bit" if options.quantization == "int4" else "is_loaded_in_8bit", True)
    peft.inject_adapter_in_model(lora_config(options), model)
    if options.train_embeddings == "speech":
        train_rows(model, vocabulary)
    elif options.train_embeddings == "all":
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.requires_grad_(True)


def lora_config(options: LoraOptions) -> Any:
    """The settings as a `peft.LoraConfig`."""
    import peft

    return peft.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank if options.alpha is None else options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules=options.targets if isinstance(options.targets, str) else list(options.targets),
        task_type="CAUSAL_LM",
    )


def train_rows(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Freezes the text rows of embedding and head in place; rows of speech and controls stay trainable.

    Raises:
        ValueError: the model has tables of other classes than `nn.Embedding` and `nn.Linear` without bias.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"the text rows of {type(model).__name__} cannot be frozen: its tables are of another kind")
    kinds = torch.from_numpy(vocabulary.kinds)
    chosen = torch.ones(len(embedding.weight), dtype=torch.bool)
    for kind in _FROZEN_KINDS:
        chosen[: len(kinds)] &= kinds != int(kind)
    chosen[len(kinds) :] = False
    rows = chosen.nonzero()[:, 0]
    table = TrainedRows(embedding.weight.detach(), rows)
    tied = head.weight is embedding.weight
    model.set_input_embeddings(RowsEmbedding(table))
    model.set_output_embeddings(RowsHead(table if tied else TrainedRows(head.weight.detach(), rows)))


class TrainedRows(nn.Module):
    """A table (V, D) of which some rows (R,) are trained, in float32, and the others are frozen."""

    rows: Tensor
    place: Tensor

    def __init__(self, table: Tensor, rows: Tensor) -> None:
        super().__init__()
        place = torch.full((len(table),), -1)
        place[rows] = torch.arange(len(rows))
        self.frozen = nn.Parameter(table, requires_grad=False)
        self.trained = nn.Parameter(table[rows].float())
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("place", place, persistent=False)

    def merged(self) -> Tensor:
        """Returns the whole table (V, D)."""
        return self.frozen.detach().index_copy(0, self.rows, self.trained.detach().to(self.frozen.dtype))


class _OverRows(nn.Module):
    """A layer over a table; `weight` is the whole table (V, D)."""

    def __init__(self, table: TrainedRows) -> None:
        super().__init__()
        self.table = table

    @property
    def weight(self) -> Tensor:
        return self.table.merged()


class RowsEmbedding(_OverRows):
    """An embedding with some trained rows."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) -> vectors (..., D)."""
        table = self.table
        place = table.place[ids]
        trained = functional.embedding(place.clamp(min=0), table.trained).to(table.frozen.dtype)
        return torch.where((place >= 0)[..., None], trained, functional.embedding(ids, table.frozen))


class RowsHead(_OverRows):
    """An output head with some trained rows."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Vectors (..., D) -> scores (..., V)."""
        scores = functional.linear(hidden, self.table.frozen)
        trained = functional.linear(hidden, self.table.trained.to(hidden.dtype))
        return scores.index_copy(-1, self.table.rows, trained.to(scores.dtype))


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict that the model would have without adapters and divided tables.

    Tied tables stay one tensor.
    """
    inside: set[str] = set()
    merged: dict[str, Tensor] = {}
    tables: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, RowsEmbedding | RowsHead):
            table = module.table
            if id(table) not in tables:
                tables[id(table)] = table.merged()
            merged[f"{name}.weight"] = tables[id(table)]
            inside.add(f"{name}.")
        elif _is_adapted(module):
            merged |= {f"{name}.{key}": value for key, value in _merged_layer(module)}
            inside.add(f"{name}.")
    plain = {key: value for key, value in model.state_dict().items() if not key.startswith(tuple(inside))}
    return plain | merged


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight") and hasattr(module, "get_base_layer")


@torch.no_grad()
def _merged_layer(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of an adapted layer."""
    base = module.get_base_layer()
    weight = base.weight
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(base)
    delta = sum(module.get_delta_weight(name).float() for name in module.active_adapters)
    yield "weight", (weight.detach().float() + delta).to(weight.dtype)
    if base.bias is not None:
        yield "bias", base.bias.detach()
