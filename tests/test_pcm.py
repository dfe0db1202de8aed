"""Samples as integers and as floating point."""

import numpy as np

from duologue.pcm import as_float, from_int16, to_int16


def test_integers_come_back_as_they_were() -> None:
    every = np.arange(-32768, 32768, dtype=np.int16)
    assert (to_int16(from_int16(every)) == every).all()
    assert (from_int16(every) >= -1).all()
    assert (from_int16(every) < 1).all()


def test_what_lies_outside_is_clipped() -> None:
    wav = np.array([-2.0, -1.0, 0.0, 0.4 / 32768, 0.6 / 32768, 1.0, 5.0], np.float32)
    assert to_int16(wav).tolist() == [-32768, -32768, 0, 0, 1, 32767, 32767]


def test_bytes_are_little_endian() -> None:
    assert as_float(b"\x00\x80\x01\x00").tolist() == [-1.0, 1 / 32768]
    assert as_float(bytearray(b"\x00\x40")).tolist() == [0.5]
