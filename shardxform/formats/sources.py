"""Sources of what is written that are no stored matrix: given values, weights that are rounded first, parts of some."""

# R: a run of rows, I: input channels.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardxform.base.tensors import ByteRange, TensorRef, TensorSpec
from shardxform.formats.encoding import ROUND_TILE, Cut, Opener, Rows, Source, SourceDtype, Storage, row_tiles
from shardxform.formats.integers import refuse_bad
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import Grid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardxform.formats.packing import IntRows

__all__ = ["Constant", "PartOfMatrix", "Rounded"]


@dataclass(frozen=True, slots=True)
class Constant:
    """Values that no file holds, as a matrix of one column."""

    name: str
    given: tuple[float, ...]

    @property
    def storage(self) -> Storage:
        """Nowhere."""
        shape = (len(self.given), 1)
        return Storage(Plain("F32"), (("values", TensorRef(TensorSpec(self.name, "F32", shape), ())),), shape)

    @property
    def shape(self) -> tuple[int, int]:
        """[O, 1]."""
        return len(self.given), 1

    @property
    def held(self) -> int:
        """The values."""
        return 4 * len(self.given)

    @property
    def reads(self) -> tuple[ByteRange, ...]:
        """Nothing."""
        return ()

    def open(self, _opener: Opener) -> _ConstantRows:
        """Its rows."""
        return _ConstantRows(self.name, self.given)

    def of(self, rows: Rows) -> Rows:
        """Take other rows as they are."""
        return rows


@dataclass(frozen=True, slots=True)
class _ConstantRows:
    name: str
    given: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.given)

    @property
    def fits_half(self) -> bool:
        return False

    def where(self, row: int) -> str:
        return f"tensor '{self.name}': row {row}"

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        import numpy as np

        return np.array(self.given[start:stop], np.float32)[:, None]

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        return self.values(start, stop), "F32"

    def cut(self, cut: Cut) -> Rows:
        assert cut.is_run
        return _ConstantRows(self.name, self.given[cut.first : cut.first + cut.count])


@dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix that is rounded to a grid as it is stored, before anything is made of its columns: in its own groups.

    On the CPU, whatever else rounds: the bits are the same everywhere, and there are few such matrices.
    """

    source: Source
    grid: Grid

    @property
    def storage(self) -> Storage:
        """Where the matrix lies."""
        return self.source.storage

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of what comes of it."""
        return self.source.shape

    @property
    def held(self) -> int:
        """Its words and scales too, as they are and as they become."""
        rows, columns = self.storage.shape
        return self.source.held + 2 * rows * (columns * self.grid.bits // 8 + 2 * self.grid.groups(columns))

    @property
    def reads(self) -> Iterator[ByteRange]:
        """The bytes of the matrix."""
        yield from self.source.reads

    def open(self, opener: Opener) -> Rows:
        """What comes of its integers.

        Raises:
            ExecutionError: a weight is not finite, or needs a scale beyond float16; names tensor and row.

        """
        return self.source.of(rounded_rows(opener.open(self.storage), self.storage, self.grid))

    def of(self, rows: Rows) -> Rows:
        """As the source."""
        return self.source.of(rows)


@dataclass(frozen=True, slots=True)
class PartOfMatrix:
    """Some rows of a matrix, of which a tuner gives all."""

    whole: Storage
    rows: Cut

    @property
    def storage(self) -> Storage:
        """Where the rows lie."""
        return self.whole.part(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of the rows."""
        return self.rows.shape(self.whole.shape)

    @property
    def held(self) -> int:
        """As much as for those that are stored."""
        return self.storage.held

    @property
    def reads(self) -> Iterator[ByteRange]:
        """The bytes of the matrix."""
        return self.whole.reads

    def open(self, opener: Opener) -> Rows:
        """The rows; raises like `Opener.open`."""
        return opener.open(self.storage)

    def of(self, rows: Rows) -> Rows:
        """The same of other rows than the stored ones."""
        return rows.cut(self.rows)


def rounded_rows(rows: Rows, storage: Storage, grid: Grid) -> IntRows:
    """All rows of a matrix as integers.

    Raises:
        ExecutionError: see `Rounded.open`.

    """
    from shardxform.formats.packing import IntRows
    from shardxform.formats.rounding import QuantizedWeight, quantize_into

    out = QuantizedWeight.empty("row", grid, storage.shape)
    name = storage.parts[0][1].name
    for start, stop in row_tiles(rows.count, storage.shape[1], ROUND_TILE):
        stats = quantize_into(*rows.raw(start, stop), grid, out.rows(start, stop))
        refuse_bad(stats, f"tensor '{name}'", start)
    spec = TensorSpec(f"{storage.name}.scales", "F16", out.scales.shape)
    return IntRows(out.words, out.scales, "row", grid, spec, storage.name, 0, rows.count)
