"""Numbers by the definitions of their formats, for `independent`: floats of all widths, their scales, and rounding.

Nothing here is shared with what writes outputs; it is written to be checked by reading.
"""

# O: rows of a weight, I: its columns, R: a run of rows.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["SMALL", "floats", "nearest_bf16", "nearest_half", "rounded", "small_floats", "spread"]

SMALL: Final = ("F8_E4M3", "F8_E5M2", "U8", "I8")
"""Dtypes of small floats; of the last two, a byte holds two of four bits."""

_SMALLEST: Final = np.float32(np.float16(1e-5))  # of a scale, auto-round's


def small_floats(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """What codes [R, bytes of a row] stand for, before any scale.

    E4M3 and E5M2 have a sign, 4 or 5 bits of exponent with a bias of 7 or 15, and 3 or 2 of the fraction. All bits but
    the sign's set is NaN in the first; the largest exponent is no number in the second. E2M1 has a bias of 1 and is
    always a number; the lower half of a byte comes first.
    """
    codes = bits.view(np.uint8).astype(np.int64)
    if dtype in ("U8", "I8"):
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(len(codes), -1)
        return _float(codes, 1, 1, 3)
    if dtype == "F8_E5M2":
        return np.where(codes & 127 >= 124, np.float32(np.nan), _float(codes, 2, 15, 7))
    return np.where(codes & 127 == 127, np.float32(np.nan), _float(codes, 3, 7, 7))


def _float(codes: NDArray[np.int64], fraction: int, bias: int, sign: int) -> NDArray[np.float32]:
    exponent = (codes >> fraction) & (2 ** (sign - fraction) - 1)
    part = (codes & (2**fraction - 1)) / 2**fraction
    size = np.where(exponent > 0, (1 + part) * 2.0 ** (exponent - bias), part * 2.0 ** (1 - bias))
    return np.asarray(np.where(codes >> sign & 1, -size, size), np.float32)


def spread(
    scales: NDArray[np.float32], rows: NDArray[np.int64], columns: int, block: tuple[int, int] | None
) -> NDArray[np.float32]:
    """The scale of each weight [R, I]: of its block of rows and columns, or else of its row or its share of that."""
    if block is not None:
        return np.asarray(scales[rows[:, None] // block[0], np.arange(columns) // block[1]])
    if scales.size == 1:
        return np.asarray(scales.reshape(1, 1))
    share = columns // scales.shape[1]
    if share * scales.shape[1] != columns:
        raise ValueError(f"{columns} columns with {scales.shape[1]} scales")
    return np.repeat(scales[rows], share, axis=1)


def floats(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Values of bits of a dtype; those of bytes are scales.

    Raises:
        ValueError: another dtype.

    """
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("F16", "F32", "F64"):
        return bits.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float32)
    if dtype in ("U8", "F8_E8M0"):  # powers of two
        return np.where(bits == 255, np.nan, 2.0 ** (bits.astype(np.float64) - 127)).astype(np.float32)
    if dtype == "F8_E4M3":
        return small_floats(bits, dtype)
    raise ValueError(f"{dtype} holds no weights that are understood")


def nearest_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, by the definition: of the two neighbours the one that is nearer."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    below, rest = bits >> np.uint32(16), bits & np.uint32(0xFFFF)
    up = (rest > 0x8000) | ((rest == 0x8000) & (below & np.uint32(1) == 1))
    return np.asarray(below + up, np.uint16)


def nearest_half(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest float16, ties to even: to whole units of the last of 11 bits, 2^-24 at least, in float64."""
    size = np.abs(values.astype(np.float64))
    exponent = np.frexp(np.maximum(size, 2.0**-30))[1]  # of zero, as of all that is smaller than the last unit
    unit = np.ldexp(1.0, np.maximum(exponent - 11, -24))
    steps = np.rint(size / unit)  # to even, as numpy rounds
    normal = np.maximum(exponent + 13, 0) * 1024 + steps  # the leading bit of a normal number adds one to its exponent
    return np.asarray(normal.astype(np.uint16) | np.where(np.signbit(values), 0x8000, 0).astype(np.uint16))


def rounded(values: NDArray[np.float32], grid: Mapping[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Round to nearest: the largest weight of a group goes to the lower end of the range, by the sign of its scale."""
    end, columns = np.float32(2 ** (grid["bits"] - 1)), values.shape[1]
    span = columns if grid["group_size"] == -1 else grid["group_size"]
    groups = values.reshape(len(values), -1, span)
    high, low = np.maximum(groups.max(axis=2), 0), np.maximum(-groups.min(axis=2), 0)
    size = np.maximum(high, low) / end
    if grid["scale_grid"] == "bf16":
        size = floats(nearest_bf16(size), "BF16")
    size = size.astype(np.float16).astype(np.float32)
    scale = np.where((high >= low) & (size > 0), -1, 1).astype(np.float32) * np.maximum(size, _SMALLEST)
    spread = np.repeat(scale, span, axis=1)
    return np.clip(np.rint(values / spread), -end, end - 1).astype(np.int32), spread
