"""Columns that are stored in one order and written in another: heads that other clients take in turns.

Only the order of whole runs of columns changes. What is rounded in groups of columns is rounded in the order in which
it is stored, so that its codes and scales do not depend on who they are written for.
"""

# R: a run of rows, I: input channels.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from shardxform.base.tensors import TensorRef
from shardxform.formats.encoding import Cut, Encoding, PartSpec, Read, Role, Rows, SourceDtype, Turned

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    _Scalar = TypeVar("_Scalar", bound=np.generic)

__all__ = ["Regrouped", "RegroupedRows", "Runs"]


@dataclass(frozen=True, slots=True)
class Runs:
    """An order of columns: they are stored as [outer, inner, width], and meant as [inner, outer, width]."""

    outer: int
    inner: int
    width: int

    @property
    def columns(self) -> int:
        """All of them."""
        return self.outer * self.inner * self.width

    def turned(self, stored: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """Columns of rows [R, I], or their bytes, as they are meant."""
        runs = stored.reshape(len(stored), self.outer, self.inner, -1)
        return runs.swapaxes(1, 2).reshape(stored.shape)


@dataclass(frozen=True, slots=True)
class Regrouped:
    """Matrices of another encoding whose columns are meant in another order. Read only."""

    encoding: Encoding
    runs: Runs

    def __str__(self) -> str:
        return str(self.encoding)

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List those of the encoding."""
        return self.encoding.parts(rows, columns)

    def held(self, parts: Mapping[Role, TensorRef], cut: Cut | None) -> int:
        """As the encoding."""
        return self.encoding.held(parts, cut)

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> RegroupedRows:
        """Open the matrix as it is stored; raises as the encoding does."""
        return RegroupedRows(self.encoding.open(parts, shape, read, checked), self.runs)


@dataclass(frozen=True, slots=True)
class RegroupedRows:
    """Rows of `stored` with their columns in another order."""

    stored: Rows
    runs: Runs

    @property
    def count(self) -> int:
        """How many rows."""
        return self.stored.count

    @property
    def fits_half(self) -> bool:
        """As they are stored."""
        return self.stored.fits_half

    def where(self, row: int) -> str:
        """Name a row in a message."""
        return self.stored.where(row)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows, float32 [R, I]."""
        return self.runs.turned(self.stored.values(start, stop))

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        """The same in the float in which they are stored."""
        bits_RI, dtype = self.stored.raw(start, stop)
        return self.runs.turned(bits_RI), dtype

    def cut(self, cut: Cut) -> Rows:
        """A run of the rows, or of those of the transpose."""
        return RegroupedRows(self.stored.cut(cut), self.runs) if cut.is_run else Turned(self, cut)
