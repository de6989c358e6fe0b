"""What runs of a tensor's bytes show: non-finite values, zeros, differences.

Pure functions over bytes as they were read; what they return counts elements from the tensor's start. Every piece of a
tensor can be looked at by itself, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardxform.formats.encoding import Fault

__all__ = ["FLOATS", "Bytes", "FloatBits", "differing_bytes", "merged", "scan_floats"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class FloatBits:
    """A floating-point dtype as integers: those whose magnitude reaches `limit` are NaN or infinite."""

    unsigned: str
    signed: str
    limit: int

    @property
    def nbytes(self) -> int:
        """Width of a value."""
        return int(self.unsigned[-1])

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (8 * self.nbytes - 1)


FLOATS: Final[Mapping[str, FloatBits]] = {
    "BF16": FloatBits("<u2", "<i2", 0x7F80),
    "F16": FloatBits("<u2", "<i2", 0x7C00),
    "F32": FloatBits("<u4", "<i4", 0x7F80_0000),
    "F64": FloatBits("<u8", "<i8", 0x7FF0_0000_0000_0000),
    "F8_E4M3": FloatBits("<u1", "<i1", 0x7F),  # has no infinities
    "F8_E5M2": FloatBits("<u1", "<i1", 0x7C),
}


def scan_floats(data: Bytes, kind: FloatBits, slab: int) -> tuple[NDArray[np.bool_], int, int]:
    """Look for NaN, infinities and zeros.

    Two reductions without a copy: as unsigned integers the largest is the largest negative number in magnitude, as
    signed ones the largest positive.

    Returns:
        whether each slab of so many bytes has a value that is not zero; the number of non-finite values; the position
        of the first of them in `data`, or -1.

    """
    bits = data.view(kind.unsigned)
    slabs = bits.reshape(-1, slab // kind.nbytes)
    negative = slabs.max(axis=1)
    positive = slabs.view(kind.signed).max(axis=1)
    nonzero: NDArray[np.bool_] = (negative > kind.sign) | (positive > 0)
    if not ((negative >= kind.sign + kind.limit).any() or (positive >= kind.limit).any()):
        return nonzero, 0, -1
    bad = (bits & (kind.sign - 1)) >= kind.limit
    return nonzero, int(np.count_nonzero(bad)), int(bad.argmax())


def differing_bytes(data: Bytes, other: Bytes) -> tuple[int, int]:
    """Count differing bytes; also the position of the first, or -1."""
    wide = "<u8" if len(data) % 8 == 0 else "<u1"
    if np.array_equal(data.view(wide), other.view(wide)):
        return 0, -1
    differing = data != other
    return int(np.count_nonzero(differing)), int(differing.argmax())


def merged(one: Fault | None, other: Fault) -> Fault:
    """What two runs of one tensor showed of one kind."""
    if one is None:
        return other
    first = one if one.first <= other.first else other
    return replace(first, count=one.count + other.count)
