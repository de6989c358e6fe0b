"""Values that OUT holds in 16 bits and that follow from the source, but are no bytes of it, worked out again.

The values that quantized weights of the source stand for, or 16-bit weights of it rounded as the record says and
dequantized, or in another order: the very bits that are written. A stored matrix and a tile of weights are in memory.
"""

# I: input channels, R: rows, over all experts where they are fused.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.base.tensors import BITS
from shardxform.formats import packing
from shardxform.formats.encoding import DECODE_TILE, Opener, Rows, row_tiles
from shardxform.formats.grid import Grid
from shardxform.formats.plain import Plain
from shardxform.formats.rounding import quantize
from shardxform.verification.values import Bytes
from shardxform.verification.wanted import Derived

__all__ = ["derived_bytes"]

_NOTHING: Final = np.uint16(0xFFFF)  # a NaN, which no dequantized weight is


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
