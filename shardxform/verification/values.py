"""What runs of a tensor's bytes show: non-finite values, zeros, differences; and bytes that follow from the source.

Functions over bytes as they were read; what they return counts elements from the tensor's start. Every piece of a
tensor can be looked at by itself, in any order. Values that OUT holds, and that are no bytes of the source, are worked
out again: those that its quantized weights stand for, or 16-bit weights rounded as the record says, or in another
order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.base.tensors import BITS
from shardxform.formats import packing
from shardxform.formats.encoding import DECODE_TILE, Fault, Opener, Rows, row_tiles
from shardxform.formats.grid import Grid
from shardxform.formats.plain import Plain
from shardxform.formats.rounding import quantize
from shardxform.verification.wanted import Derived

__all__ = ["FLOATS", "Bytes", "FloatBits", "derived_bytes", "differing_bytes", "merged", "scan_floats"]

Bytes = NDArray[np.uint8]

_NOTHING: Final = np.uint16(0xFFFF)  # a NaN, which no dequantized weight is


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


# -- values that follow from the source -----------------------------------------------------------------------------

# I: input channels, R: rows, over all experts where they are fused.


def derived_bytes(derived: Derived, start: int, stop: int, opener: Opener) -> Bytes:
    """Bytes `start`..`stop - 1` of the tensor, as they must be.

    Args:
        derived: where its values come from.
        start: first byte.
        stop: the byte after the last.
        opener: opens matrices of the source.

    """
    columns = derived.shape[1]
    row = columns * BITS[derived.dtype] // 8
    first, last = start // row, -(-stop // row)
    runs = [_bits(derived, rows, begin, end) for rows, begin, end in _rows(derived, first, last, opener)]
    data = np.concatenate(runs).reshape(-1).view(np.uint8)
    return data[start - first * row : stop - first * row]


def _rows(derived: Derived, first: int, last: int, opener: Opener) -> Iterator[tuple[Rows, int, int]]:
    """Tiles of rows `first`..`last - 1` of all sources."""
    home = 0
    for source in derived.sources:
        rows, columns = source.shape
        begin, end = max(first - home, 0), min(last - home, rows)
        if begin < end:
            opened = opener.open(source)
            for start, stop in row_tiles(end - begin, columns, DECODE_TILE):
                yield opened, begin + start, begin + stop
        home += rows


def _bits(derived: Derived, rows: Rows, start: int, stop: int) -> NDArray[Any]:
    """Bits of rows of one source in the tensor's dtype; a NaN where nothing can have been written."""
    if derived.grid is not None:
        values_RI = _rounded(rows, start, stop, derived.grid)
        if values_RI is None:
            return np.full((stop - start, derived.shape[1]), _NOTHING)
        return packing.half_bits_of(values_RI) if derived.dtype == "F16" else packing.bf16_bits_of(values_RI)
    if derived.dtype == "F16" and not derived.moves:
        return packing.half_bits_of(rows.values(start, stop))  # infinite where `convert` would have refused
    return Plain(derived.dtype).bits(rows, start, stop)


def _rounded(rows: Rows, start: int, stop: int, grid: Grid) -> NDArray[np.float32] | None:
    """What rounding makes of rows; None where it refuses."""
    bits_RI, dtype = rows.raw(start, stop)
    again, stats = quantize(bits_RI, dtype, grid, layout="row")
    if not stats.ok:
        return None
    codes_RI = packing.unpack(again.words, grid.bits, "row")
    return packing.dequantize(codes_RI, again.scales, grid.bits, grid.group_size)
