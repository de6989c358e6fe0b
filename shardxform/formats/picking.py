"""Some rows or columns of a matrix, however it is stored: what is left of an expert whose channels are pruned."""

# O: output channels, I: input channels, R: a run of rows.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from shardxform.base.tensors import TensorRef
from shardxform.formats.encoding import Cut, Encoding, PartSpec, Read, Role, Rows, SourceDtype, taken

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Picked", "bitmap_of", "picked_ids"]


def bitmap_of(ids: Iterable[int], count: int) -> bytes:
    """Which of `count` are among `ids`, a bit each, the first being the lowest of the first byte."""
    bits = 0
    for each in ids:
        bits |= 1 << each
    return bits.to_bytes(-(-count // 8), "little")


def picked_ids(bitmap: bytes) -> tuple[int, ...]:
    """The ids that a bitmap holds, ascending."""
    bits = int.from_bytes(bitmap, "little")
    return tuple(each for each in range(8 * len(bitmap)) if bits >> each & 1)


@dataclass(frozen=True, slots=True)
class Picked:
    """Rows or columns of a stored matrix.

    Attributes:
        inner: how it is stored.
        whole: its shape [O, I].
        kept: a bitmap of what stays, see `bitmap_of`.
        axis: what is picked.
        blocks: of how many runs of as many rows, one below the other, the same rows stay: gate and up projection.

    """

    inner: Encoding
    whole: tuple[int, int]
    kept: bytes
    axis: Literal["rows", "columns"]
    blocks: int = 1

    def positions(self) -> NDArray[np.int64]:
        """The rows or columns that stay, ascending."""
        import numpy as np

        size = self.whole[self.axis == "columns"] // self.blocks
        ids = np.array(picked_ids(self.kept), np.int64)
        return np.concatenate([ids + block * size for block in range(self.blocks)])

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the tensors that hold the whole."""
        return self.inner.parts(rows, columns)

    def open(self, parts: Mapping[Role, TensorRef], _shape: tuple[int, int], read: Read, checked: bool) -> Rows:
        """Open what is stored; raises as that does."""
        at = self.positions()
        whole = self.inner.open(parts, self.whole, read, checked)
        return PickedRows(whole, at, None, len(at)) if self.axis == "rows" else PickedRows(whole, None, at, whole.count)

    def held(self, parts: Mapping[Role, TensorRef], _cut: Cut | None) -> int:
        """As much as what is stored."""
        return self.inner.held(parts, None)


@dataclass(frozen=True, slots=True, eq=False)
class PickedRows:
    """Rows that are picked, or rows with picked columns: `count` from `first` on."""

    whole: Rows
    rows: NDArray[np.int64] | None
    columns: NDArray[np.int64] | None
    count: int
    first: int = 0

    @property
    def fits_half(self) -> bool:
        """As the whole."""
        return self.whole.fits_half

    def where(self, row: int) -> str:
        """Name a row in a message by where it is stored."""
        return self.whole.where(self.first + row if self.rows is None else int(self.rows[self.first + row]))

    def cut(self, cut: Cut) -> Rows:
        """Some of the rows, or of those of the transpose."""
        return replace(self, first=self.first + cut.first, count=cut.count) if cut.is_run else taken(self, cut)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows, float32 [R, I]."""
        low, high = self._run(start, stop)
        return self._of(self.whole.values(low, high), start, stop)

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        """The same, as they are at hand."""
        low, high = self._run(start, stop)
        found, dtype = self.whole.raw(low, high)
        return self._of(found, start, stop), dtype

    def _run(self, start: int, stop: int) -> tuple[int, int]:
        """The shortest run of stored rows that holds these; at least every second of them is wanted, as a rule."""
        first, last = self.first + start, self.first + stop - 1
        return (first, last + 1) if self.rows is None else (int(self.rows[first]), int(self.rows[last]) + 1)

    def _of(self, found: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
        import numpy as np

        if self.rows is not None:
            wanted = self.rows[self.first + start : self.first + stop]
            picked: NDArray[Any] = found[wanted - wanted[0]]
            return picked
        return np.ascontiguousarray(found[:, self.columns])
