"""Tensors as values: what they are (`TensorSpec`) and where their bytes lie (`TensorRef`).

A checkpoint is a table of `TensorRef`. Selecting experts, splitting a fused weight and renaming are functions from
one reference to another: slices along the leading dimension of a row-major tensor are contiguous byte ranges, so no
element is ever decoded. Nothing here opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shardxform.base.dtypes import BITS
from shardxform.errors import CheckpointError

__all__ = ["ByteRange", "TensorRef", "TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a shard's header says of one tensor, less its place: name, dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes at `offset` of `file`, a shard's name within its checkpoint."""

    file: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        """First byte after the range."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor and the byte ranges that hold it: their concatenation, in order, is its row-major data."""

    spec: TensorSpec
    ranges: tuple[ByteRange, ...]

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
        return replace(self, spec=replace(self.spec, name=name))

    def reshaped(self, shape: tuple[int, ...]) -> TensorRef:
        """Same bytes under another shape of as many elements."""
        if math.prod(shape) != math.prod(self.spec.shape):
            raise ValueError(f"{self.name}: cannot view {self.spec.shape} as {shape}")
        return replace(self, spec=replace(self.spec, shape=shape))

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
        return TensorRef(replace(self.spec, shape=(len(keep), *self.spec.shape[1:])), coalesce(pieces))

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows `start`..`stop - 1` of dim 0."""
        row = self._row_bytes()
        if not 0 <= start <= stop <= self.spec.shape[0]:
            raise IndexError(f"{self.name}: rows {start}..{stop} outside 0..{self.spec.shape[0]}")
        pieces = _cut(self.ranges, start * row, (stop - start) * row)
        return TensorRef(replace(self.spec, shape=(stop - start, *self.spec.shape[1:])), coalesce(pieces))

    def index(self, i: int) -> TensorRef:
        """Row `i` of dim 0, which is dropped: the 2-D weight of one expert of a fused tensor."""
        one = self.rows(i, i + 1)
        return one.reshaped(self.spec.shape[1:])

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
            out[-1] = replace(out[-1], length=out[-1].length + piece.length)
        else:
            out.append(piece)
    return tuple(out)


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
