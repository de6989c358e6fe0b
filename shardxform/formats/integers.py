"""Integers of 4 or 8 bits with a float16 or bfloat16 scale for each group of columns, in the forms that clients load.

Two orders of the words: as GPTQ has them, with zero points that are always the same, and by rows, as compressed-tensors
packs them, and MLX, which has the value of code 0 beside each scale. Which tensors come out follows from the shape;
`formats.rounding` computes their values, or a tuner does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from shardxform.base.tensors import TensorRef
from shardxform.errors import ExecutionError
from shardxform.formats.encoding import (
    ROUND_TILE,
    Cut,
    Encoded,
    Fault,
    PartSpec,
    Read,
    Role,
    Rows,
    SourceDtype,
    Turned,
    Writing,
    row_tiles,
)
from shardxform.formats.scheme import ROW_FORMATS, Grid, Layout, Scheme

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardxform.formats.packing import IntRows
    from shardxform.formats.rounding import QuantizedWeight, RtnStats

__all__ = ["Ints", "ValueRows", "Values", "refuse_bad", "reread"]

_SMALLEST_SCALE: Final = 1e-5  # below it a scale is a denormal that no tool writes: auto-round and we clamp there
_SIGMAS: Final = 8
_ANOTHER: Final = 1.5  # a mean that is farther off is no error by one, but of weights that have one


@dataclass(frozen=True, slots=True)
class Ints:
    """Symmetric integers.

    Attributes:
        grid: bits and group size; and how scales are chosen, which decides whether bfloat16 holds them.
        layout: the order of the words: `gptq`, or `row`.
        scale_dtype: F16, or BF16.
        g_idx: whether the order of the columns, which is their own, is stored too.
        biases: whether the value of code 0 is, for every scale: as MLX has it, with names of its own for all parts.

    """

    grid: Grid
    layout: Layout = "gptq"
    scale_dtype: str = "F16"
    g_idx: bool = False
    biases: bool = field(default=False, repr=False)  # the names of the parts tell it in every plan

    def __str__(self) -> str:
        groups = "a scale a row" if self.grid.group_size == -1 else f"groups of {self.grid.group_size}"
        return f"{self.grid.bits}-bit integers, {groups}"

    @classmethod
    def of(cls, scheme: Scheme) -> Ints:
        """How weights of a scheme are stored; scales are BF16 where the format allows it and nothing is lost."""
        layout: Layout = "row" if scheme.format in ROW_FORMATS else "gptq"
        bf16 = layout == "row" and scheme.grid.scale_grid == "bf16"
        return cls(scheme.grid, layout, "BF16" if bf16 else "F16", scheme.g_idx, scheme.format == "mlx")

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.grid.bits

    @property
    def fits_half(self) -> bool:
        """Whether 11 significant bits hold every value: 8 of a bfloat16 scale, and 3 of a code of at most 8 in size."""
        return self.grid.bits == 4 and self.grid.scale_grid == "bf16"

    def holds(self, other: Ints) -> bool:
        """Whether integers and scales of another kind are stored so without a change, but for the type of a scale."""
        ours, theirs = self.grid, other.grid
        exact = ours.scale_grid == "fp16" or theirs.scale_grid == "bf16"
        return exact and (ours.bits, ours.group_size) == (theirs.bits, theirs.group_size)

    def misfit(self, rows: int, columns: int) -> str:
        """Say why a matrix cannot be stored so; empty when it can."""
        group = self.grid.span(columns)
        if columns % 32 or rows % 32:
            return f"[{rows}, {columns}] is no multiple of 32"
        if columns % group:
            return f"{columns} input channels do not fill groups of {group}"
        return ""

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the tensors that stand for a matrix, in the order in which they are written."""
        return _parts(self, rows, columns)

    def held(self, parts: Mapping[Role, TensorRef], _cut: Cut | None) -> int:
        """Everything twice: as it is read, and turned."""
        return 2 * sum(ref.nbytes for ref in parts.values())

    def gathered(self, extent_bytes: int, sources: int) -> int:
        """All parts, since words run across rows; or those of one of the matrices that MLX stacks."""
        return -(-extent_bytes // sources) if self.biases else extent_bytes

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> IntRows:
        """Read a matrix; zero points, columns in another order and scales that are not finite are refused.

        Raises:
            ExecutionError: says what is there instead.

        """
        import numpy as np

        from shardxform.formats import packing

        arrays = {role: packing.empty_of(ref) for role, ref in parts.items() if checked or role in ("words", "scales")}
        for role, array in arrays.items():
            read(parts[role], array)
            if checked:
                packing.refuse_odd(role, parts[role], array, shape, self.grid)
        if "biases" in arrays:
            biases, scales = (arrays[role].view(np.uint16) for role in ("biases", "scales"))
            packing.refuse_asymmetric(parts["biases"], biases, scales, self.grid.bits)
        name = parts["words"].name.rpartition(".")[0]
        return packing.IntRows(
            arrays["words"].view(np.int32),
            arrays["scales"].view(np.uint16),
            self.layout,
            self.grid,
            parts["scales"].spec,
            name,
            0,
            shape[0],
        )

    def written(self, sources: Iterable[Rows], writing: Writing) -> Iterator[tuple[Role, int, NDArray[np.generic]]]:
        """Give the parts of a matrix: the same integers and scales where the sources are integers, else rounded ones.

        Raises:
            ExecutionError: NaN, infinity, a scale beyond float16, or one that would be rounded; names the tensor.

        """
        from shardxform.formats import packing
        from shardxform.formats.rounding import QuantizedWeight

        offsets: dict[Role, int] = {}
        columns, row = writing.shape[1], 0
        for opened in ([rows] for rows in sources) if self.biases else [list(sources)]:
            writing.stopped()
            shape = sum(rows.count for rows in opened), columns
            out = QuantizedWeight.empty(self.layout, self.grid, shape)
            if integers := [rows for rows in opened if isinstance(rows, packing.IntRows)]:
                packing.move(integers, (out.words, out.scales), self.layout, self.scale_dtype)
            else:
                self._round(opened, out, writing, row)
            for role, array in self.stored(out, shape, as_read=bool(integers)):
                yield role, offsets.get(role, 0), array
                offsets[role] = offsets.get(role, 0) + array.nbytes
            row += shape[0]

    def faults(
        self, role: Role, dtype: str, shape: tuple[int, int], data: NDArray[np.uint8], start: int
    ) -> Iterator[Fault]:
        """Judge a run of a part's bytes, from byte `start` on: what a symmetric weight determines, and its scales.

        Args:
            role: of the part.
            dtype: of the part.
            shape: of the weight.
            data: the bytes.
            start: where in the part they begin.

        """
        import numpy as np

        from shardxform.formats import packing

        if role == "zeros":
            words, zero = data.view("<u4"), 0x77777777 if self.grid.bits == 4 else 0x7F7F7F7F
            at = words != zero
            yield from _fault("qzeros", "zero points are not those of a symmetric weight", at, start // 4, words, zero)
        elif role == "g_idx":
            groups, first = data.view("<i4"), start // 4
            wanted = np.arange(first, first + groups.size) // self.grid.span(shape[1])
            what = "columns are not in the group of their place"
            yield from _fault("g-idx", what, groups != wanted, first, groups, wanted)
        elif role == "shape":
            width = 4 if dtype == "I32" else 8
            sizes, first = data.view(f"<i{width}"), start // width
            wanted = np.array(shape)[first : first + sizes.size]
            yield from _fault("weight-shape", "sizes are not the weight's", sizes != wanted, first, sizes, wanted)
        elif role == "scales":
            values = packing.float32_of(data.view("<u2"), dtype)
            finite = np.isfinite(values)  # the others are found as all non-finite floats are
            small = finite & (np.abs(values) < np.float32(_SMALLEST_SCALE))
            yield from _fault("scale", "scales are zero, or below 1e-05 in magnitude", small, start // 2, values)
            if self.grid.scale_grid == "bf16" and dtype == "F16":
                lost = finite & ((values.view(np.uint32) & 0xFFFF) != 0)
                what = "scales are off the bf16 grid that the record promises"
                yield from _fault("scale-grid", what, lost, start // 2, values)

    def asymmetric(
        self, dtype: str, biases: NDArray[np.uint8], scales: NDArray[np.uint8], start: int
    ) -> Iterator[Fault]:
        """Judge a run of MLX's biases, from byte `start` on, by that of the scales."""
        from shardxform.formats import packing

        found, wanted = biases.view("<u2"), packing.zero_values(scales.view("<u2"), dtype, self.grid.bits)
        values = (packing.float32_of(bits, dtype) for bits in (found, wanted))
        what = f"biases are not {-self.grid.zero_code} times the scale, as those of a symmetric weight are"
        yield from _fault("biases", what, found != wanted, start // 2, *values)

    def off_centre(self, codes: int, count: int, columns: int) -> str:
        """Say that codes of 4 bits, `count` of them with the sum `codes`, are off by one; empty where they are not.

        The mean of a weight is about zero, so that of its codes is as well. Where scales are signed, for the largest
        weight of each group to reach the lower end of the range, it is 8 / S less, with S weights in a group. Beside
        that a third of a code is allowed, for weights whose mean is a tenth of their spread, and 8 standard deviations
        of the mean of codes that are spread by 4. Codes of 8 bits are spread by 45 and more: to be off by one is
        nothing beside that.
        """
        if self.grid.bits != 4:
            return ""
        zero = self.grid.zero_code
        allowed = 1 / 3 + _SIGMAS * zero / 2 / math.sqrt(count)
        low, high = -zero / self.grid.span(columns) - allowed, allowed
        mean = codes / count - zero
        if low <= mean <= high or abs(mean) > _ANOTHER:
            return ""
        return (
            f"the mean of its codes is {mean:+.3f} from zero, expected {low:.3f} to {high:.3f}, as if all were off by"
            " one"
        )

    def _round(self, sources: Iterable[Rows], out: QuantizedWeight, writing: Writing, first: int) -> None:
        """Round rows, tile by tile, the matrix's from `first` on."""
        row = 0
        for rows in sources:
            for start, stop in row_tiles(rows.count, writing.shape[1], ROUND_TILE):
                stats: RtnStats = writing.rounder(*rows.raw(start, stop), self.grid, out.rows(row, row + stop - start))
                refuse_bad(stats, writing.where, first + row)
                writing.groups += stats.groups
                writing.zero_groups += stats.zero_groups
                row += stop - start

    def stored(
        self, out: QuantizedWeight, shape: tuple[int, int], *, as_read: bool = False
    ) -> Iterator[tuple[Role, NDArray[np.generic]]]:
        """Give what is stored of packed words and scales; scales are float16, unless they are as they were read."""
        from shardxform.formats import packing

        rows, columns = shape
        for part in self.parts(rows, columns):
            if part.role == "words":
                yield part.role, out.words
            elif part.role in ("scales", "biases"):
                narrow = self.scale_dtype == "BF16" and not as_read
                scales = packing.bf16_bits_of(packing.float32_of(out.scales, "F16")) if narrow else out.scales
                is_scale = part.role == "scales"
                yield part.role, scales if is_scale else packing.zero_values(scales, part.dtype, self.grid.bits)
            elif part.role == "zeros":
                yield part.role, packing.qzeros(self.grid.groups(columns), rows, self.grid.bits)
            else:
                yield part.role, packing.determined(part.role, shape, self.grid)


# -- as values --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Values:
    """Symmetric integers as values alone, which are rounded where the integers themselves would be moved. Read only."""

    integers: Ints

    def __str__(self) -> str:
        return str(self.integers)

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.integers.width

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List those of the integers."""
        return self.integers.parts(rows, columns)

    def held(self, parts: Mapping[Role, TensorRef], cut: Cut | None) -> int:
        """As the integers."""
        return self.integers.held(parts, cut)

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> ValueRows:
        """Read a matrix; raises as the integers do."""
        return ValueRows(self.integers.open(parts, shape, read, checked))


@dataclass(frozen=True, slots=True)
class ValueRows:
    """Rows of `integers` that give their values."""

    integers: IntRows

    @property
    def count(self) -> int:
        """How many rows."""
        return self.integers.count

    @property
    def fits_half(self) -> bool:
        """As the integers."""
        return self.integers.fits_half

    def where(self, row: int) -> str:
        """Name a row in a message."""
        return self.integers.where(row)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows, float32 [R, I]."""
        return self.integers.values(start, stop)

    def raw(self, start: int, stop: int) -> tuple[NDArray[np.generic], SourceDtype]:
        """The values."""
        return self.integers.raw(start, stop)

    def cut(self, cut: Cut) -> Rows:
        """Some of the rows, or of those of the transpose."""
        return Turned(self, cut) if cut.transposed else ValueRows(self.integers.cut(cut))


def reread(ref: TensorRef) -> TensorRef:
    """The same tensor, with symmetric integers as values alone."""
    if not isinstance(ref, Encoded):
        return ref
    sources = (
        source._replace(encoding=Values(source.encoding)) if isinstance(source.encoding, Ints) else source
        for source in ref.sources
    )
    return replace(ref, sources=tuple(sources))


# -- parts ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _parts(ints: Ints, rows: int, columns: int) -> tuple[PartSpec, ...]:
    words = ints.grid.word_shape(ints.layout, rows, columns)
    scales = ints.grid.scale_shape(ints.layout, rows, columns)
    if ints.biases:
        return (
            PartSpec("words", "weight", "U32", words),
            PartSpec("scales", "scales", ints.scale_dtype, scales),
            PartSpec("biases", "biases", ints.scale_dtype, scales),
        )
    if ints.layout == "row":
        return (
            PartSpec("words", "weight_packed", "I32", words),
            PartSpec("scales", "weight_scale", ints.scale_dtype, scales),
            PartSpec("shape", "weight_shape", "I64", (2,)),
        )
    return (
        PartSpec("words", "qweight", "I32", words),
        PartSpec("zeros", "qzeros", "I32", (scales[0], rows // ints.grid.codes_per_word)),
        PartSpec("scales", "scales", "F16", scales),
        *((PartSpec("g_idx", "g_idx", "I32", (columns,)),) if ints.g_idx else ()),
    )


def refuse_bad(stats: RtnStats, where: str, first_row: int) -> None:
    """Refuse weights that a grid cannot say, `first_row` being that of the run that was rounded.

    Raises:
        ExecutionError: names tensor and row.

    """
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


def _fault(
    code: str,
    what: str,
    at: NDArray[np.bool_],
    start: int,
    found: NDArray[np.generic],
    wanted: NDArray[np.generic] | int | None = None,
) -> Iterator[Fault]:
    if not at.any():
        return
    first = int(at.argmax())
    if isinstance(wanted, int):
        yield Fault(code, what, int(at.sum()), start + first, f"0x{int(found[first]):08X}", f"0x{wanted:08X}")
        return
    expected = "" if wanted is None else str(wanted[first])
    yield Fault(code, what, int(at.sum()), start + first, f"{found[first]:.6g}", expected)
