"""What llama.cpp's converter does to the numbers of a tensor, as values: rows and columns moved, values mapped.

A transform wraps rows as they are read. Integers with scales stay integers under it where rows move, and where columns
move in runs that a block of GGUF fills; so they are repacked, and no value changes.
"""

# O: output channels, I: input channels, R: a run of rows, G: groups of columns.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from shardxform.formats.encoding import Cut, Rows, SourceDtype, Turned, taken

if TYPE_CHECKING:
    from typing import TypeVar

    import numpy as np
    from numpy.typing import NDArray

    from shardxform.formats.packing import IntRows

    _Scalar = TypeVar("_Scalar", bound=np.generic)

__all__ = ["BLOCK", "Order", "Run", "Transform", "Value"]

BLOCK: Final = 32
"""Columns of a block of GGUF that share a scale."""

Value = Literal["", "one more", "minus exp"]
"""What becomes of every value: itself, 1 + x as norms are stored, or -e^x as decay rates are."""

_SLACK: Final = 256  # rows that are read for nothing, so that neighbours are read at once


@dataclass(frozen=True, slots=True)
class Run:
    """Positions from `first` on, seen as an array of this shape, of which a part is taken and axes change places.

    Attributes:
        first: position of its first element.
        shape: of the array.
        axes: which of them stands where; as they are where empty.
        taken: what is taken of each axis, from and to; all of it where empty.

    """

    first: int
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    taken: tuple[tuple[int, int], ...] = ()

    @property
    def count(self) -> int:
        """How many positions it gives."""
        return math.prod(stop - start for start, stop in self.taken) if self.taken else math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Order:
    """Which rows or columns stand where: positions in what is stored, run after run."""

    runs: tuple[Run, ...]

    @classmethod
    def every(cls, step: int, first: int, count: int) -> Order:
        """`count` positions, `step` apart, from `first` on, which is less."""
        return cls((Run(0, (count, step), (), ((0, count), (first, first + 1))),))

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(run.count for run in self.runs)

    def positions(self) -> NDArray[np.int64]:
        """The position of each in what is stored."""
        import numpy as np

        out: list[NDArray[np.int64]] = []
        for run in self.runs:
            grid = np.arange(run.first, run.first + math.prod(run.shape), dtype=np.int64).reshape(run.shape)
            if run.taken:
                grid = grid[tuple(slice(start, stop) for start, stop in run.taken)]
            out.append((grid.transpose(run.axes) if run.axes else grid).reshape(-1))
        return np.concatenate(out)

    def blocks(self, size: int) -> NDArray[np.int64] | None:
        """The same of blocks of `size`; None where it takes blocks apart."""
        import numpy as np

        found = self.positions()
        if found.size % size:
            return None
        found_BS = found.reshape(-1, size)
        whole = (found_BS[:, :1] % size == 0).all() and (found_BS == found_BS[:, :1] + np.arange(size)).all()
        return found_BS[:, 0] // size if whole else None


@dataclass(frozen=True, slots=True)
class Transform:
    """What is done to a stored matrix [O, I], in the order of the fields.

    Attributes:
        transposed: its columns become rows.
        rows, columns: which of them stand where; as they are where None.
        value: what becomes of every value, in float32.

    """

    transposed: bool = False
    rows: Order | None = None
    columns: Order | None = None
    value: Value = ""

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of what comes of a matrix of so many rows and columns."""
        if self.transposed:
            rows, columns = columns, rows
        return (self.rows.count if self.rows else rows, self.columns.count if self.columns else columns)

    def keeps_codes(self, block: int = BLOCK) -> bool:
        """Whether integers stay as they are, with a scale for every `block` columns: else the weight goes wider."""
        if self.transposed or self.value:
            return False
        return self.columns is None or self.columns.blocks(block) is not None

    def held(self, rows: int, columns: int) -> int:
        """Bytes in memory for it, at most, beside what the matrix itself holds: its codes or values once more."""
        return rows * columns * (4 if self.transposed else 1) if self != Transform(value=self.value) else 0

    def of(self, rows: Rows, columns: int) -> Rows:
        """Rows of what comes of a matrix of so many columns.

        Of integers in memory come integers, where they stay as they are; their groups are of 32 columns where columns
        moved.
        """
        from shardxform.formats.packing import IntRows

        if isinstance(rows, IntRows) and self.keeps_codes() and (self.rows or self.columns):
            return _moved_integers(rows, self, columns)
        if self.transposed:
            rows = Turned(rows, Cut(0, columns, transposed=True))
        return Transformed(rows, replace(self, transposed=False)) if self != Transform(self.transposed) else rows


def _moved_integers(rows: IntRows, transform: Transform, columns: int) -> IntRows:
    """Integers with their rows, and blocks of columns with their scales, where the transform has them."""
    import numpy as np

    from shardxform.formats import packing

    grid = rows.grid
    words_RW = np.empty(grid.word_shape("row", rows.count, columns), np.int32)
    scales_RG = np.empty(grid.scale_shape("row", rows.count, columns), np.uint16)
    packing.move([rows], (words_RW, scales_RG), "row", rows.scale_spec.dtype)
    if transform.rows:
        at = transform.rows.positions()
        words_RW, scales_RG = words_RW[at], scales_RG[at]
    if transform.columns:
        blocks = transform.columns.blocks(BLOCK)
        assert blocks is not None
        words_RB = words_RW.reshape(len(words_RW), columns // BLOCK, -1)
        span = grid.span(columns)
        words_RW = np.ascontiguousarray(words_RB[:, blocks]).reshape(len(words_RW), -1)
        scales_RG = np.ascontiguousarray(scales_RG[:, blocks * BLOCK // span])
        grid = replace(grid, group_size=BLOCK)
    return replace(rows, words=words_RW, scales=scales_RG, layout="row", grid=grid, first=0, count=len(words_RW))


@dataclass(slots=True)
class Transformed:
    """Rows of a matrix that are moved and mapped as they are read, `count` from `first` on."""

    whole: Rows
    transform: Transform
    first: int = 0
    part: int | None = None
    _positions: list[tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many rows."""
        if self.part is not None:
            return self.part
        return self.transform.rows.count if self.transform.rows else self.whole.count

    @property
    def fits_half(self) -> bool:
        """As the whole, unless its values change."""
        return self.whole.fits_half and not self.transform.value

    def where(self, row: int) -> str:
        """Name a row in a message by where it is stored."""
        rows, _ = self._at()
        return self.whole.where(int(rows[self.first + row]) if rows is not None else self.first + row)

    def cut(self, cut: Cut) -> Rows:
        """Some of the rows, or of those of the transpose."""
        return replace(self, first=self.first + cut.first, part=cut.count) if cut.is_run else taken(self, cut)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows, float32 [R, I]."""
        import numpy as np

        _, columns = self._at()
        values_RI = self._read(start, stop, lambda a, b: self.whole.values(a, b))
        if columns is not None:
            values_RI = values_RI[:, columns]
        if self.transform.value == "one more":
            values_RI = values_RI + np.float32(1)
        elif self.transform.value == "minus exp":  # in float64, so that every machine rounds to the same float32
            values_RI = -np.exp(values_RI.astype(np.float64)).astype(np.float32)
        return np.ascontiguousarray(values_RI)

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        """The stored bits, where they only move; else the values."""
        import numpy as np

        if self.transform.value:
            return self.values(start, stop), "F32"
        dtypes: list[SourceDtype] = []

        def bits(a: int, b: int) -> NDArray[Any]:
            found, dtype = self.whole.raw(a, b)
            dtypes.append(dtype)
            return found

        _, columns = self._at()
        raw_RI = self._read(start, stop, bits)
        return np.ascontiguousarray(raw_RI if columns is None else raw_RI[:, columns]), dtypes[-1]

    def _at(self) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
        if not self._positions:
            rows, columns = self.transform.rows, self.transform.columns
            self._positions.append((rows.positions() if rows else None, columns.positions() if columns else None))
        return self._positions[0]

    def _read(self, start: int, stop: int, read: Callable[[int, int], NDArray[_Scalar]]) -> NDArray[_Scalar]:
        """Rows as `read` gives runs of them: those that lie close by in one, others run by run."""
        import numpy as np

        rows, _ = self._at()
        begin, end = self.first + start, self.first + stop
        if rows is None:
            return read(begin, end)
        wanted = rows[begin:end]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low <= 2 * wanted.size + _SLACK:
            return read(low, high)[wanted - low]
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        return np.concatenate([read(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, breaks)])
