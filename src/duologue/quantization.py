"""Weight-only quantization: int8 or int4 matrices, computed in the model's dtype.

It needs bitsandbytes on CUDA and torchao elsewhere; both are optional. Embeddings and output head are not quantized.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

Scheme = Literal["int8", "int4"]
SCHEMES = ("int8", "int4")
INT4_GROUPS = (128, 64, 32)  # values of a row that share a scale, with torchao


def check_available(scheme: str, device: torch.device) -> None:
    """Raises ValueError if the scheme is unknown or its library is not installed."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown quantization {scheme!r}; the choices are {', '.join(SCHEMES)}")
    for name in _libraries(scheme, device):
        _imported(name, scheme, device)


def quantize(module: nn.Module, scheme: Scheme) -> None:
    """Quantizes all linear layers of a module in place.

    Args:
        module: already on its device, in floating point.

    Raises:
        ValueError: as `check_available`; without CUDA, int4 for rows that are no multiple of 32 values.
    """
    device = next(module.parameters()).device
    check_available(scheme, device)
    if device.type == "cuda":
        _with_bitsandbytes(module, scheme, device)
    else:
        _with_torchao(module, scheme, device)


def _with_torchao(module: nn.Module, scheme: Scheme, device: torch.device) -> None:
    torchao, *_ = (_imported(name, scheme, device) for name in _libraries("int8", device))
    for name, linear in _linears(module):
        if scheme == "int8":
            config = torchao.Int8WeightOnlyConfig()
        else:
            group = next((group for group in INT4_GROUPS if linear.in_features % group == 0), None)
            if group is None:
                raise ValueError(
                    f"{name} has rows of {linear.in_features} values, but int4 needs a multiple of {INT4_GROUPS[-1]}: "
                    "use int8"
                )
            packed = _imported("torchao.prototype.quantization.int4", scheme, device)
            config = packed.PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
        torchao.quantize_(linear, config)


def _with_bitsandbytes(module: nn.Module, scheme: Scheme, device: torch.device) -> None:
    library = _imported("bitsandbytes", scheme, device)
    for name, linear in _linears(module):
        sizes = linear.in_features, linear.out_features
        has_bias = linear.bias is not None
        stored = linear.weight.data.cpu()  # these classes quantize on the way from the CPU to the GPU
        new: Any
        if scheme == "int8":
            new = library.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
            new.weight = library.nn.Int8Params(stored, requires_grad=False, has_fp16_weights=False).to(device)
        else:
            new = library.nn.Linear4bit(
                *sizes, bias=has_bias, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta"
            )
            new.weight = library.nn.Params4bit(stored, requires_grad=False, quant_type="nf4").to(device)
        new.bias = linear.bias
        holder, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(holder), attribute, new)


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]


def _libraries(scheme: str, device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        return ("bitsandbytes",)
    return ("torchao.quantization", "torchao.prototype.quantization.int4")[: 1 + (scheme == "int4")]


def _imported(name: str, scheme: str, device: torch.device) -> ModuleType:
    library = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name == library:
            reason = f"is not installed: pip install {library}"
        else:
            reason = f"of the version that is installed does not have it ({error}): pip install -U {library}"
        raise ValueError(f"{scheme} on the device '{device.type}' needs {library}, which {reason}") from None
