"""Strict configuration files: JSON and YAML read into frozen dataclasses.

An unknown key, a missing key or a wrong type raises an error that names the key's path and the choices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Config = TypeVar("Config")


def parse_config(cls: type[Config], mapping: Mapping[str, Any], where: str = "") -> Config:
    """Builds the dataclass `cls` and its nested dataclasses from a mapping of plain values.

    Args:
        cls: a dataclass of int, float, bool, str, Path, enums, literals, dataclasses, optional values, tuples, lists
            and dicts. Its class variable `RETIRED` maps retired keys to the only values still accepted.
        mapping: the content of a JSON or YAML file.
        where: the file's name for error messages.

    Raises:
        ValueError: names the path of the key, its value and the choices.
    """
    value = _parse_dataclass(cls, mapping, "", f" in {where}" if where else "")
    assert isinstance(value, cls)
    return value


def to_mapping(config: Any) -> dict[str, Any]:
    """Returns the plain values of a dataclass: `parse_config(type(config), to_mapping(config)) == config`."""
    plain = _plain(config)
    if not isinstance(plain, dict):
        raise ValueError(f"expected a dataclass, got {config!r}")
    return plain


def load_config(path: str | Path, cls: type[Config]) -> Config:
    """Reads a .json, .yaml or .yml file into the dataclass `cls`.

    Raises:
        ValueError: the file is missing, malformed or does not match `cls`.
    """
    path = Path(path)
    if path.suffix == ".json":
        return parse_config(cls, read_json(path), str(path))
    if path.suffix in (".yaml", ".yml"):
        return parse_config(cls, read_yaml(path), str(path))
    raise ValueError(f"{path} is no configuration file: its name must end in .json, .yaml or .yml")


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises ValueError if there is none."""
    try:
        data = json.loads(_read_text(Path(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from None
    return _object(path, data)


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yields the place (file and line) and the text of each line that is not blank, without reading the file whole.

    A line ends with a line feed or a carriage return. `str.splitlines` would also end it at separators that Unicode has
    and that texts hold.

    Raises:
        ValueError: the file is missing or is no text file.
    """
    try:
        with Path(path).open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if text := line.strip():
                    yield f"{path}, line {number},", text
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(Path(path), error) from None


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place (file and line) and the JSON object of each line. Raises ValueError if there is none."""
    for where, line in read_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{where} is not JSON") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object")
        yield where, row


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads the YAML mapping in a file; tags are refused. Raises ValueError if there is none."""
    try:
        data = yaml.load(_read_text(Path(path)), Loader=PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    return _object(path, data)


def parse_value(text: str) -> Any:
    """Parses `text` as a YAML value: "1e-4" is a number, "[a, b]" a list. Raises ValueError for other YAML."""
    try:
        return yaml.load(text, Loader=PlainLoader)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is not a value in plain YAML") from None


def write_json(path: str | Path, data: Mapping[str, Any], compact: bool = False) -> None:
    """Writes a JSON object atomically: readers see the old file or the new one.

    Args:
        compact: on one line, for long tables that nobody reads.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    layout: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 2}
    scratch.write_text(json.dumps(data, ensure_ascii=False, allow_nan=False, **layout) + "\n", encoding="utf-8")
    scratch.replace(path)


class PlainLoader(yaml.SafeLoader):
    """A YAML 1.1 loader that also reads 1e-4 as a number and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> ValueError:
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{path} does not exist")
    if isinstance(error, IsADirectoryError):
        return ValueError(f"{path} is a folder, not a file")
    if isinstance(error, UnicodeDecodeError):
        return ValueError(f"{path} is not a text file")
    return ValueError(f"{path} cannot be read: {error.strerror}")


def _object(path: str | Path, data: object) -> dict[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{path} must hold keys with values, not {type(data).__name__}")
    return data


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _parse_dataclass(cls: type, mapping: object, path: str, where: str) -> Any:
    named = f"{path or 'the configuration'}{where}"
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{named} must hold keys with values, got {mapping!r}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    retired: Mapping[str, object] = getattr(cls, "RETIRED", {})
    for key in mapping:
        full = f"{path}.{key}" if path else str(key)
        if key in retired:
            if mapping[key] != retired[key]:
                raise ValueError(f"{full}{where} is {mapping[key]!r}; only {retired[key]!r} is still supported")
        elif key not in fields:
            raise ValueError(f"unknown key {full!r}{where}; the keys are {', '.join(fields)}")
    values = {}
    for name, field in fields.items():
        full = f"{path}.{name}" if path else name
        if name in mapping:
            values[name] = _parse(hints[name], mapping[name], full, where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"key {full!r}{where} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from None


def _parse(hint: Any, value: Any, path: str, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _parse_union(args, value, path, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path}{where} is {value!r}; the choices are {', '.join(map(repr, args))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _parse_dataclass(hint, value, path, where)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        if origin is list or args[-1] is Ellipsis:
            items = [_parse(args[0], item, f"{path}[{i}]", where) for i, item in enumerate(value)]
        elif len(args) == len(value):
            items = [_parse(args[i], item, f"{path}[{i}]", where) for i, item in enumerate(value)]
        else:
            raise ValueError(f"{path}{where} needs {len(args)} values, got {value!r}")
        return origin(items)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {_parse(args[0], k, path, where): _parse(args[1], v, f"{path}.{k}", where) for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            choices = ", ".join(repr(member.value) for member in hint)
            raise ValueError(f"{path}{where} is {value!r}; the choices are {choices}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"{path}{where} must be {name}, got {value!r}")


def _parse_union(args: tuple[Any, ...], value: Any, path: str, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [arg for arg in args if arg is not type(None)]
    if len(choices) == 1:
        return _parse(choices[0], value, path, where)
    for choice in choices:
        try:
            return _parse(choice, value, path, where)
        except ValueError:
            continue
    names = ", ".join(getattr(arg, "__name__", str(arg)) for arg in args)
    raise ValueError(f"{path}{where} is {value!r}, which is none of {names}")


def check_type(name: str, value: object, *kinds: type) -> None:
    """Checks the type of an argument.

    Raises:
        TypeError: names the argument, the type of its value and the types that it takes.
    """
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}")
