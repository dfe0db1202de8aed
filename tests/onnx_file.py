"""Writes small ONNX models without the package onnx: a chain of operators on one float32 input.

Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FLOAT, INT, INTS = 1, 2, 7  # TensorProto.FLOAT, AttributeProto.INT, AttributeProto.INTS


def write_onnx(
    path: Path, input_name: str, shape: Sequence[int | str], operators: Sequence[tuple[str, dict[str, object]]]
) -> Path:
    """Writes a model; each operator takes the output of the one before.

    Args:
        shape: sizes, or names of free dimensions.
        operators: type and attributes, which are whole numbers or lists of them.
    """
    nodes, last = b"", input_name
    for number, (kind, attributes) in enumerate(operators):
        out = f"out{number}"
        encoded = b"".join(_bytes(5, _attribute(*one)) for one in attributes.items())
        nodes += _bytes(1, _text(1, last) + _text(2, out) + _text(4, kind) + encoded)
        last = out
    graph = nodes + _text(2, "graph") + _bytes(11, _value(input_name, shape)) + _bytes(12, _value(last, None))
    path.write_bytes(_number(1, 8) + _bytes(8, _text(1, "") + _number(2, 13)) + _bytes(7, graph))
    return path


def _value(name: str, shape: Sequence[int | str] | None) -> bytes:
    tensor = _number(1, FLOAT)
    if shape is not None:
        dims = (_bytes(1, _text(2, one) if isinstance(one, str) else _number(1, one)) for one in shape)
        tensor += _bytes(2, b"".join(dims))
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


def _attribute(name: str, value: object) -> bytes:
    if isinstance(value, int):
        return _text(1, name) + _number(3, value) + _number(20, INT)
    assert isinstance(value, list)
    return _text(1, name) + b"".join(_number(8, one) for one in value) + _number(20, INTS)


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())
