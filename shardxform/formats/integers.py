"""Integers of 4 or 8 bits with a float16 or bfloat16 scale for each group of columns, in the forms that clients load.

Two orders of the words: as GPTQ has them, with zero points that are always the same, and by rows, as compressed-tensors
packs them. Which tensors come out follows from the shape; `formats.rounding` computes their values, or a tuner does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardxform.base.tensors import TensorRef
from shardxform.errors import ExecutionError
from shardxform.formats.encoding import ROUND_TILE, Cut, Part, Read, Role, Rows, Writing, tiles
from shardxform.formats.grid import Grid, Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardxform.formats.packing import IntRows
    from shardxform.formats.rounding import QuantizedWeight, RtnStats

__all__ = ["Ints"]


@dataclass(frozen=True, slots=True)
class Ints:
    """Symmetric integers.

    Attributes:
        grid: bits and group size; and how scales are chosen, which decides whether bfloat16 holds them.
        layout: the order of the words: `gptq`, or `row`.
        scale_dtype: F16, or BF16.
        g_idx: whether the order of the columns, which is their own, is stored too.

    """

    grid: Grid
    layout: Layout = "gptq"
    scale_dtype: str = "F16"
    g_idx: bool = False

    @property
    def fits_half(self) -> bool:
        """Whether 11 significant bits hold every value: 8 of a bfloat16 scale, and 3 of a code of at most 8 in size."""
        return self.grid.bits == 4 and self.grid.scale_grid == "bf16"

    def misfit(self, rows: int, columns: int) -> str:
        """Say why a matrix cannot be stored so; empty when it can."""
        group = self.grid.span(columns)
        if columns % 32 or rows % 32:
            return f"[{rows}, {columns}] is no multiple of 32"
        if columns % group:
            return f"{columns} input channels do not fill groups of {group}"
        return ""

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """List the tensors that stand for a matrix, in the order in which they are written."""
        return _parts(self, rows, columns)

    def held(self, parts: Mapping[Role, TensorRef], _cut: Cut | None) -> int:
        """Everything twice: as it is read, and turned."""
        return 2 * sum(ref.nbytes for ref in parts.values())

    def gathered(self, extent_bytes: int) -> int:
        """All parts: words run across rows."""
        return extent_bytes

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> IntRows:
        """Read a matrix; zero points, columns in another order and scales that are not finite are refused.

        Raises:
            ExecutionError: says what is there instead.

        """
        from shardxform.formats import packing

        arrays = {role: packing.empty_of(ref) for role, ref in parts.items() if checked or role in ("words", "scales")}
        for role, array in arrays.items():
            read(parts[role], array)
            if checked:
                packing.refuse_odd(role, parts[role], array, shape, self.grid)
        name = parts["words"].name.rpartition(".")[0]
        return packing.IntRows(
            arrays["words"], arrays["scales"], self.layout, self.grid, parts["scales"].spec, name, 0, shape[0]
        )

    def written(self, sources: Sequence[Rows], writing: Writing) -> Iterator[tuple[Role, int, NDArray[Any]]]:
        """Give the parts of a matrix: the same integers and scales where the sources are integers, else rounded ones.

        Raises:
            ExecutionError: NaN, infinity, a scale beyond float16, or one that would be rounded; names the tensor.

        """
        from shardxform.formats import packing
        from shardxform.formats.rounding import QuantizedWeight

        out = QuantizedWeight.empty(self.layout, self.grid, writing.shape)
        integers = [rows for rows in sources if isinstance(rows, packing.IntRows)]
        if integers:
            packing.move(integers, (out.words, out.scales), self.layout, self.scale_dtype)
        else:
            self._round(sources, out, writing)
        for role, array in self.stored(out, writing.shape, as_read=bool(integers)):
            yield role, 0, array

    def _round(self, sources: Sequence[Rows], out: QuantizedWeight, writing: Writing) -> None:
        """Round rows, tile by tile."""
        row = 0
        for rows in sources:
            for start, stop in tiles(rows.count, writing.shape[1], ROUND_TILE):
                stats: RtnStats = writing.rounder(*rows.raw(start, stop), self.grid, out.rows(row, row + stop - start))
                _refuse_bad(stats, writing.where, row)
                writing.groups += stats.groups
                writing.zero_groups += stats.zero_groups
                row += stop - start

    def stored(
        self, out: QuantizedWeight, shape: tuple[int, int], *, as_read: bool = False
    ) -> Iterator[tuple[Role, NDArray[Any]]]:
        """Give what is stored of packed words and scales; scales are float16, unless they are as they were read."""
        from shardxform.formats import packing

        rows, columns = shape
        for part in self.parts(rows, columns):
            if part.role == "words":
                yield part.role, out.words
            elif part.role == "scales":
                narrow = self.scale_dtype == "BF16" and not as_read
                yield part.role, packing.bf16_bits_of(packing.decode(out.scales, "F16")) if narrow else out.scales
            elif part.role == "zeros":
                yield part.role, packing.qzeros(self.grid.groups(columns), rows, self.grid.bits)
            else:
                yield part.role, packing.determined(part.role, shape, self.grid)


@functools.lru_cache(maxsize=64)
def _parts(ints: Ints, rows: int, columns: int) -> tuple[Part, ...]:
    words = ints.grid.word_shape(ints.layout, rows, columns)
    scales = ints.grid.scale_shape(ints.layout, rows, columns)
    if ints.layout == "row":
        return (
            Part("words", "weight_packed", "I32", words),
            Part("scales", "weight_scale", ints.scale_dtype, scales),
            Part("shape", "weight_shape", "I64", (2,)),
        )
    return (
        Part("words", "qweight", "I32", words),
        Part("zeros", "qzeros", "I32", (scales[0], rows // ints.grid.codes_per_word)),
        Part("scales", "scales", "F16", scales),
        *((Part("g_idx", "g_idx", "I32", (columns,)),) if ints.g_idx else ()),
    )


def _refuse_bad(stats: RtnStats, where: str, first_row: int) -> None:
    if stats.nonfinite is not None:
        row, column = stats.nonfinite
        raise ExecutionError(
            f"{where}: NaN or infinity at row {first_row + row}, column {column}; expected finite weights"
        )
    if stats.overflow_row is not None:
        raise ExecutionError(
            f"{where}: row {first_row + stats.overflow_row} needs a scale beyond float16; expected weights"
            " below 524,000 in magnitude"
        )
