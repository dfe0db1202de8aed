"""The folders of parity fixtures: random-weight models in the released formats, and what the released code made.

`DUOLOGUE_PARITY` (numbers) and `DUOLOGUE_RELEASED` (format folders) name them; else they are looked for beside the
checkout. Without them the parity tests skip. Names, shapes, seeds and tolerances come from the JSON files.
"""

import json
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SHARED = Path(__file__).parent.parent.parent / "shared"
PARITY = Path(os.environ.get("DUOLOGUE_PARITY") or SHARED / "parity")
RELEASED = Path(os.environ.get("DUOLOGUE_RELEASED") or SHARED / "released")


@cache
def facts(name: str) -> Any:
    """A JSON file of the parity folder; empty without the folder."""
    path = PARITY / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """A safetensors file of the parity folder."""
    return load_file(PARITY / name)


def params(group: str, names: Iterable[str], check: Callable[..., None]) -> list[Any]:
    """One test `group-name` for each case, or a single one that skips."""
    cases = [pytest.param(check, name, id=f"{group}-{name}") for name in names]
    absent = pytest.mark.skip(reason=f"there are no fixtures of {group}: see tests/parity.py")
    return cases or [pytest.param(check, "", id=f"{group}-absent", marks=absent)]


def assert_close(ours: Tensor, theirs: Tensor, absolute: float, relative: float = 0.0) -> None:
    """Within absolute + relative * |theirs| everywhere."""
    assert ours.shape == theirs.shape
    excess = (ours.double() - theirs.double()).abs() - relative * theirs.double().abs()
    worst = float(excess.max()) if excess.numel() else 0.0
    assert worst <= absolute, f"off by {worst:.3g} where {absolute:g} is allowed"
    assert bool(torch.isfinite(ours).all())
