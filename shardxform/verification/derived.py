"""Values that OUT holds in 16 bits and that follow from the source, but are no bytes of it, worked out again.

The values that packed weights of the source stand for, or 16-bit weights of it rounded as the record says and
dequantized: the very bits that `convert --to bf16` or `--to fp16` writes. A stored module and a tile of weights are in
memory.
"""

# I: input channels, R: rows, over all experts where they are fused; W: words of a row, G: groups of a row.

from __future__ import annotations

from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from shardxform.base.tensors import BITS, TensorRef
from shardxform.formats import packing
from shardxform.formats.grid import Grid
from shardxform.formats.rounding import QuantizedWeight, SourceDtype, quantize_into
from shardxform.formats.stored import Stored, StoredModule, rows_of
from shardxform.model.matrices import Cut
from shardxform.verification.rounding import NUMPY, TILE_WEIGHTS, Read, load, turned
from shardxform.verification.values import Bytes
from shardxform.verification.wanted import Derived

__all__ = ["Deriver"]

_NOTHING: Final = np.uint16(0xFFFF)  # a NaN, which no dequantized weight is
_Parts = tuple[NDArray[np.int32], NDArray[np.float32]]


class Deriver:
    """Works out bytes of derived tensors; keeps the last stored module, of which the next piece often has more rows."""

    def __init__(self) -> None:
        self._last: tuple[StoredModule, _Parts] | None = None
        self._cut: tuple[tuple[TensorRef, Cut], Bytes] | None = None

    def data(self, derived: Derived, start: int, stop: int, read: Read) -> Bytes:
        """Bytes `start`..`stop - 1` of the tensor, as they must be.

        Args:
            derived: where its values come from.
            start: first byte.
            stop: the byte after the last.
            read: fills an array with bytes of the source.

        """
        if derived.cut is not None:
            return self._gather(derived.weight, derived.cut, read)[start:stop]
        row = 2 * derived.weight.spec.shape[1]
        first, last = start // row, -(-stop // row)
        bits_RI = np.empty((last - first, derived.weight.spec.shape[1]), "<u2")
        rows = derived.weight.rows(first, last)
        if derived.packed is not None:
            self._dequantize(rows, derived.packed, derived.dtype, read, bits_RI)
        else:
            assert derived.grid is not None
            _round(rows, derived.grid, derived.dtype, read, bits_RI)
        return bits_RI.reshape(-1).view(np.uint8)[start - first * row : stop - first * row]

    def _gather(self, weight: TensorRef, cut: Cut, read: Read) -> Bytes:
        """Bytes of a cut of a tensor, which is read whole; the last one is kept."""
        if self._cut is None or self._cut[0] != (weight, cut):
            self._cut = None
            bits = np.empty(weight.spec.shape, f"<u{BITS[weight.spec.dtype] // 8}")
            read(weight, bits)
            self._cut = (weight, cut), np.ascontiguousarray(cut.of(bits)).reshape(-1).view(np.uint8)
        return self._cut[1]

    def _dequantize(
        self, weight: TensorRef, packed: Stored, dtype: str, read: Read, out_RI: NDArray[np.uint16]
    ) -> None:
        """What rows of stored modules stand for."""
        done = 0
        for module, start, stop in rows_of(weight, packed.modules):
            words, scales = (turned(array, packed.scheme.layout, start, stop) for array in self._load(module, read))
            _values(words, scales, packed.scheme.grid, dtype, out_RI[done : done + stop - start])
            done += stop - start

    def _load(self, module: StoredModule, read: Read) -> _Parts:
        if self._last is None or self._last[0] is not module:
            self._last = None  # freed before the next one is read
            self._last = (module, load(module, read))
        return self._last[1]


def _round(weight: TensorRef, grid: Grid, dtype: str, read: Read, out_RI: NDArray[np.uint16]) -> None:
    """What 16-bit weights become by rounding and dequantizing."""
    for rows in _tiles(*weight.spec.shape):
        part = weight.rows(rows.start, rows.stop)
        bits_RI = np.empty(part.spec.shape, NUMPY[part.spec.dtype])
        read(part, bits_RI)
        again = QuantizedWeight.empty("row", grid, cast(tuple[int, int], part.spec.shape))
        if quantize_into(bits_RI, cast(SourceDtype, part.spec.dtype), grid, again).ok:
            _values(again.words, again.scales.view(np.float16).astype(np.float32), grid, dtype, out_RI[rows])
        else:
            out_RI[rows] = _NOTHING


def _values(
    words_RW: NDArray[Any], scale_RG: NDArray[np.float32], grid: Grid, dtype: str, out_RI: NDArray[np.uint16]
) -> None:
    bits_of = packing.half_bits_of if dtype == "F16" else packing.bf16_bits_of
    for rows in _tiles(*out_RI.shape):
        codes_RI = packing.unpack(words_RW[rows], grid.bits, "row")
        out_RI[rows] = bits_of(packing.dequantize(codes_RI, scale_RG[rows], grid.bits, grid.group_size))


def _tiles(rows: int, columns: int) -> list[slice]:
    step = max(1, TILE_WEIGHTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
