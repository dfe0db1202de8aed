"""Configuration files are read strictly into dataclasses."""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest

from duologue.config import (
    load_config,
    parse_config,
    read_json,
    read_json_lines,
    read_lines,
    read_yaml,
    to_mapping,
    write_json,
)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    width: int = 8
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError(f"width must be positive, got {self.width}")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    colour: Colour = Colour.RED
    mode: Literal["fixed", "utterance"] = "fixed"
    seed: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    layers: tuple[Inner, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    folder: Path | None = None
    fast: bool = False


FULL: dict[str, Any] = {
    "name": "x",
    "inner": {"width": 4, "rate": 1},
    "colour": "blue",
    "mode": "utterance",
    "seed": 7,
    "betas": [0.8, 0.9],
    "layers": [{"width": 2}, {}],
    "weights": {"ctc": 1},
    "folder": "runs/a",
    "fast": True,
}


def test_every_type_is_read_and_written_back() -> None:
    config = parse_config(Outer, FULL)
    assert config == Outer(
        "x",
        Inner(4, 1.0),
        Colour.BLUE,
        "utterance",
        7,
        (0.8, 0.9),
        (Inner(2), Inner()),
        {"ctc": 1.0},
        Path("runs/a"),
        True,
    )
    assert isinstance(config.inner.rate, float)
    assert parse_config(Outer, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "y"}, "unknown key 'nam' in F; the keys are name, inner"),
        ({"inner": {"widht": 3}}, "unknown key 'inner.widht' in F; the keys are width, rate"),
        ({"layers": [{"depth": 3}]}, r"unknown key 'layers\[0\].depth' in F"),
        ({"inner": 3}, "inner in F must hold keys with values, got 3"),
        ({"inner": {"width": -3}}, "inner in F: width must be positive, got -3"),
        ({"inner": {"width": 2.0}}, "inner.width in F must be int, got 2.0"),
        ({"inner": {"rate": "fast"}}, "inner.rate in F must be float, got 'fast'"),
        ({"fast": 1}, "fast in F must be bool, got 1"),
        ({"seed": True}, "seed in F must be int, got True"),
        ({"name": None}, "name in F must be str, got None"),
        ({"colour": "green"}, "colour in F is 'green'; the choices are 'red', 'blue'"),
        ({"mode": "other"}, "mode in F is 'other'; the choices are 'fixed', 'utterance'"),
        ({"betas": [0.9]}, r"betas in F needs 2 values, got \[0.9\]"),
        ({"betas": 0.9}, r"betas in F must be tuple\[float, float\], got 0.9"),
    ],
)
def test_wrong_values_are_named_with_the_choices(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(Outer, {**FULL, **change}, "F")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="key 'name' in F is missing"):
        parse_config(Outer, {}, "F")


def test_yaml_is_read_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\ninner: {width: 3, rate: 1e-4}\nbetas: [0.9, 5E-1]\n")
    assert load_config(path, Outer) == Outer("x", Inner(3, 1e-4), betas=(0.9, 0.5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nname: y\n", "key 'name' is given twice"),
        ("name: !!python/name:os.system\n", "not plain YAML"),
        ("- 1\n", "must hold keys with values, not list"),
        ("a: [1\n", "not plain YAML"),
        ("", "must hold keys with values, not NoneType"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_json(tmp_path)
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="is not JSON"):
        read_json(tmp_path / "cut.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a text file"):
        read_json(tmp_path / "bytes.json")
    with pytest.raises(ValueError, match="must end in .json, .yaml or .yml"):
        load_config(tmp_path / "recipe.txt", Outer)


def test_lines_end_where_the_file_ends_them(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    rows = [{"text": "one\u2028two"}, {"text": "three\x85\x1efour"}, {"text": "字"}]
    lines = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("\ufeff" + lines, encoding="utf-8", newline="")
    assert [row for _, row in read_json_lines(file)] == rows
    assert next(read_lines(file)) == (f"{file}, line 1,", '{"text": "one\u2028two"}')


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
