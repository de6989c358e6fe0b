"""Numbers by the definitions of their formats, in plain numpy: what the second opinion of `independent` is made of.

Nothing here is shared with what writes or rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["floats", "nearest_bf16", "nearest_half", "rounded"]

_SMALLEST: Final = np.float32(np.float16(1e-5))  # of a scale, auto-round's


def floats(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Values of bits, exactly but for float64's.

    Raises:
        ValueError: of another dtype.

    """
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("F16", "F32", "F64"):
        return bits.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float32)
    raise ValueError(f"{dtype} holds no weights that are understood")


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
