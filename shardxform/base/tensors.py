"""Tensors as values: what they are (`TensorSpec`) and where their bytes lie (`TensorRef`).

A checkpoint is a table of `TensorRef`. Selecting experts, splitting a fused weight and renaming are functions from
one reference to another: slices along the leading dimension of a row-major tensor are contiguous byte ranges, so no
element is ever decoded. Nothing here opens a file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from shardxform.errors import CheckpointError

__all__ = ["BITS", "FLOATS", "RANK", "ByteRange", "TensorRef", "TensorSpec"]


@functools.lru_cache(maxsize=1024)
def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a shard's header says of one tensor, less its place: name, dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __repr__(self) -> str:  # as dataclasses give it, in half the time: plans are fingerprinted by it
        return f"TensorSpec(name={self.name!r}, dtype={self.dtype!r}, shape={self.shape!r})"

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return _nbytes(self.shape, self.dtype)

    def of_shape(self, shape: tuple[int, ...]) -> TensorSpec:
        """The same name and dtype with another shape."""
        return TensorSpec(self.name, self.dtype, shape)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes at `offset` of `file`, a shard's name within its checkpoint."""

    file: str
    offset: int
    length: int

    def __repr__(self) -> str:
        return f"ByteRange(file={self.file!r}, offset={self.offset}, length={self.length})"

    @property
    def end(self) -> int:
        """First byte after the range."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor and the byte ranges that hold it: their concatenation, in order, is its row-major data."""

    spec: TensorSpec
    ranges: tuple[ByteRange, ...]

    def __repr__(self) -> str:
        return f"TensorRef(spec={self.spec!r}, ranges={self.ranges!r})"

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.spec.name

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.spec.nbytes

    def renamed(self, name: str) -> TensorRef:
        """Same bytes under another name."""
        return TensorRef(TensorSpec(name, self.spec.dtype, self.spec.shape), self.ranges)

    def reshaped(self, shape: tuple[int, ...]) -> TensorRef:
        """Same bytes under another shape of as many elements."""
        if math.prod(shape) != math.prod(self.spec.shape):
            raise ValueError(f"{self.name}: cannot view {self.spec.shape} as {shape}")
        return TensorRef(self.spec.of_shape(shape), self.ranges)

    def select(self, keep: Sequence[int]) -> TensorRef:
        """Rows `keep` of dim 0, in that order: `result[i] == self[keep[i]]`.

        Raises:
            CheckpointError: the tensor has no dim 0, or its rows are no whole number of bytes.
            IndexError: an id is outside dim 0.

        """
        row = self._row_bytes()
        rows = self.spec.shape[0]
        if any(not 0 <= index < rows for index in keep):
            raise IndexError(f"{self.name}: row outside 0..{rows - 1}")
        pieces = (piece for index in keep for piece in _cut(self.ranges, index * row, row))
        return TensorRef(self.spec.of_shape((len(keep), *self.spec.shape[1:])), coalesce(pieces))

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows `start`..`stop - 1` of dim 0."""
        row = self._row_bytes()
        if not 0 <= start <= stop <= self.spec.shape[0]:
            raise IndexError(f"{self.name}: rows {start}..{stop} outside 0..{self.spec.shape[0]}")
        pieces = _cut(self.ranges, start * row, (stop - start) * row)
        return TensorRef(self.spec.of_shape((stop - start, *self.spec.shape[1:])), coalesce(pieces))

    def index(self, i: int) -> TensorRef:
        """Row `i` of dim 0, which is dropped: the 2-D weight of one expert of a fused tensor."""
        one = self.rows(i, i + 1)
        return one.reshaped(self.spec.shape[1:])

    def slabs(self, count: int = 1) -> Iterator[TensorRef]:
        """The 2-D weights that a stack holds, each cut into `count` of as many rows: `index` and `rows` in one walk."""
        rows, *columns = self.spec.shape[1:]
        if rows % count:
            raise ValueError(f"{self.name}: {rows} rows do not fill {count} parts")
        spec = self.spec.of_shape((rows // count, *columns))
        length = self._row_bytes() // count
        for pieces in _runs(self.ranges, length, self.spec.shape[0] * count):
            yield TensorRef(spec, pieces)

    def _row_bytes(self) -> int:
        if not self.spec.shape:
            raise CheckpointError(f"tensor '{self.name}' is a scalar; expected a leading dimension to slice")
        bits = math.prod(self.spec.shape[1:]) * BITS[self.spec.dtype]
        if bits % 8:
            raise CheckpointError(f"tensor '{self.name}': rows of {self.spec.dtype} {self.spec.shape} split a byte")
        return bits // 8


def coalesce(pieces: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """Join neighbours that touch in the same file; empty ranges vanish."""
    out: list[ByteRange] = []
    for piece in pieces:
        if not piece.length:
            continue
        if out and out[-1].file == piece.file and out[-1].end == piece.offset:
            out[-1] = ByteRange(piece.file, out[-1].offset, out[-1].length + piece.length)
        else:
            out.append(piece)
    return tuple(out)


def _runs(ranges: Iterable[ByteRange], length: int, count: int) -> Iterator[tuple[ByteRange, ...]]:
    """The first `count` runs of `length` bytes of the concatenation of `ranges`, which holds as many, in one walk."""
    pieces = iter(ranges)
    piece, at = ByteRange("", 0, 0), 0
    for _ in range(count):
        run: list[ByteRange] = []
        left = length
        while left:
            if at == piece.length:
                piece, at = next(pieces), 0
                continue
            take = min(left, piece.length - at)
            run.append(ByteRange(piece.file, piece.offset + at, take))
            at += take
            left -= take
        yield coalesce(run) if len(run) > 1 else tuple(run)


def _cut(ranges: Sequence[ByteRange], start: int, length: int) -> Iterable[ByteRange]:
    """Bytes `start`..`start + length` of the concatenation of `ranges`."""
    for piece in ranges:
        if length <= 0:
            return
        if start < piece.length:
            take = min(piece.length - start, length)
            yield ByteRange(piece.file, piece.offset + start, take)
            length -= take
            start = 0
        else:
            start -= piece.length


# -- dtypes -------------------------------------------------------------------------------------------------------


BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Width of one element in bits, by dtype name."""

RANK: Final[dict[str, int]] = {name: rank for rank, name in enumerate(BITS)}
"""Position in the reference writer's order; tensors of the highest rank come first in a shard."""

FLOATS: Final[frozenset[str]] = frozenset({"F16", "BF16", "F32", "F64"})
"""Plain floating-point dtypes: what a weight that is not quantized is stored in."""
