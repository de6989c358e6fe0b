"""ggml's block types, which GGUF files hold: a run of columns is one block of bytes, with its scales inside.

Q4_0 and Q8_0 hold symmetric integers of 4 and 8 bits with a float16 scale for 32 columns, so they hold the codes and
scales of a quantized checkpoint exactly, whatever its groups. Everything else is rounded from floats by ggml's own
rule, bit for bit as its reference does it without an importance matrix (ggml-quants.c of llama.cpp).
"""

# R: a run of rows, I: input channels, W: words of a row, G: groups of a row, B: bytes of a row.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from shardxform.base.tensors import BLOCKS, TensorRef
from shardxform.errors import ExecutionError, SchemeError
from shardxform.formats.decoded import DecodedRows
from shardxform.formats.encoding import (
    DECODE_TILE,
    ROUND_TILE,
    Cut,
    PartSpec,
    Read,
    Role,
    Rows,
    Writable,
    Writing,
    row_tiles,
)
from shardxform.formats.integers import refuse_bad
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import Grid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardxform.formats.packing import IntRows
    from shardxform.formats.rounding import Backend, RtnStats

__all__ = [
    "EXACT",
    "FLOATS",
    "WRITTEN",
    "Ggml",
    "GgmlRows",
    "blocks_of_words",
    "encoding_of",
    "integer_type",
    "rounded_blocks",
]

FLOATS: Final = ("F32", "F16", "BF16")
"""Types of GGUF files that are plain floats."""

EXACT: Final[Mapping[str, tuple[int, ...]]] = {"Q4_0": (4,), "Q8_0": (4, 8)}
"""Types that hold symmetric integers exactly, and of how many bits."""

WRITTEN: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K")
"""Types that floats are rounded to; others are read."""

_UNKNOWN: Final = ("Q1_0", "Q2_0")  # to the gguf package too


def integer_type(grid: Grid) -> str:
    """The smallest type that holds integers of a grid."""
    return next(name for name, bits in EXACT.items() if grid.bits in bits)


def encoding_of(type_name: str, grid: Grid | None = None) -> Writable:
    """How a tensor of a GGUF file is stored, from the name of its type.

    Args:
        type_name: as ggml calls it, in capitals.
        grid: of the scheme whose integers a Q4_0 or Q8_0 is to hold; None to round by ggml's rule.

    Raises:
        SchemeError: no such type, or one that cannot hold integers of the grid.

    """
    return Plain(type_name) if type_name in FLOATS else Ggml(type_name, grid)


@dataclass(frozen=True, slots=True)
class Ggml:
    """Blocks of one type.

    Integers that the type holds stay as they are, whatever `grid` is.

    Attributes:
        type: as ggml calls it, in capitals.
        grid: floats are rounded to it, and so to the codes and scales of a quantized checkpoint; None to round them by
            ggml's own rule.

    """

    type: str
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.type not in BLOCKS:
            raise SchemeError(f"ggml type: expected one of {', '.join((*FLOATS, *BLOCKS))}, found {self.type!r}")
        if self.grid and self.grid.bits not in EXACT.get(self.type, ()):
            raise SchemeError(f"ggml type {self.type}: expected none for integers of {self.grid.bits} bits")

    def __str__(self) -> str:
        return self.type

    @property
    def columns(self) -> int:
        """Of a block."""
        return BLOCKS[self.type][0]

    @property
    def unreadable(self) -> str:
        """Why values cannot be read here; empty when they can."""
        if self.type in _UNKNOWN:
            return f"blocks of {self.type} are not read"
        if self.type not in WRITTEN and find_spec("gguf") is None:
            return f"blocks of {self.type} are read by the gguf package: pip install shardxform[gguf]"
        return ""

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.columns * BLOCKS[self.type][1]

    def misfit(self, rows: int, columns: int) -> str:
        """Say why a matrix cannot be stored so; empty when it can."""
        if self.type not in WRITTEN:
            return f"{self.type} is only read; expected one of {', '.join(WRITTEN)}"
        if columns == 0 or columns % self.columns:
            return f"[{rows}, {columns}]: {columns} input channels do not fill blocks of {self.columns}"
        if self.grid and columns % self.grid.span(columns):
            return f"{columns} input channels do not fill groups of {self.grid.span(columns)}"
        return ""

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the one tensor that holds the blocks; its shape is that of the values."""
        return (PartSpec("values", "weight", self.type, (rows, columns)),)

    def held(self, parts: Mapping[Role, TensorRef], cut: Cut | None) -> int:
        """All values where they are turned; else rows are read when they are asked for."""
        rows, columns = parts["values"].spec.shape[-2:]
        return 0 if cut is None or cut.is_run else 4 * rows * columns

    def gathered(self, _extent_bytes: int, _sources: int) -> int:
        """Nothing: rows are written as they come."""
        return 0

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> GgmlRows:
        """Open a tensor; rows are read when they are asked for.

        Raises:
            ExecutionError: nothing here reads the type.

        """
        if self.unreadable:
            raise ExecutionError(f"tensor '{parts['values'].name}': {self.unreadable}")
        return GgmlRows(parts["values"].name, 0, shape[0], parts["values"], read, self.type, checked)

    def written(self, sources: Iterable[Rows], writing: Writing) -> Iterator[tuple[Role, int, NDArray[Any]]]:
        """Give blocks, a tile of rows at a time: as they are stored, the same integers, or values that are rounded.

        Raises:
            ExecutionError: NaN or infinity, or a scale that float16 does not hold; names tensor and row.

        """
        row = 0
        for rows in sources:
            for start, stop in row_tiles(rows.count, writing.shape[1], ROUND_TILE if self.grid else DECODE_TILE):
                writing.stopped()
                blocks_RB = self._blocks(rows, start, stop, writing, row + start)
                yield "values", self.row_bytes(writing.shape[1]) * (row + start), blocks_RB
            row += rows.count

    def _blocks(self, rows: Rows, start: int, stop: int, writing: Writing, at: int) -> NDArray[np.uint8]:
        """Blocks of rows `start`..`stop - 1`, of which the first is row `at` of the matrix."""
        from shardxform.formats.packing import IntRows

        if isinstance(rows, GgmlRows) and rows.type == self.type:
            return rows.blocks(start, stop)
        if isinstance(rows, IntRows) and rows.grid.bits in EXACT.get(self.type, ()):
            return self._of_ints(rows, start, stop)
        if self.grid:
            return self._to_grid(rows, start, stop, writing, at)
        return self._rounded(rows, start, stop, writing.where, at)

    def _of_ints(self, rows: IntRows, start: int, stop: int) -> NDArray[np.uint8]:
        from shardxform.formats import packing

        words_RW, scale_RG = rows.turned(start, stop)
        half_RG = packing.half_bits_of(scale_RG)
        if bad := packing.not_held(half_RG, scale_RG, exact=True):
            raise ExecutionError(
                f"{rows.where(start + bad[0])}: scale {scale_RG[bad]} of group {bad[1]} is no float16, which scales of"
                f" {self.type} are; keep the weight in 16 bits"
            )
        return blocks_of_words(words_RW, half_RG, rows.grid, self.type)

    def _to_grid(self, rows: Rows, start: int, stop: int, writing: Writing, at: int) -> NDArray[np.uint8]:
        from shardxform.formats.rounding import QuantizedWeight

        assert self.grid is not None
        out = QuantizedWeight.empty("row", self.grid, (stop - start, writing.shape[1]))
        stats: RtnStats = writing.rounder(*rows.raw(start, stop), self.grid, out)
        refuse_bad(stats, writing.where, at)
        writing.groups += stats.groups
        writing.zero_groups += stats.zero_groups
        return blocks_of_words(out.words, out.scales, self.grid, self.type)

    def _rounded(self, rows: Rows, start: int, stop: int, where: str, at: int) -> NDArray[np.uint8]:
        import numpy as np

        from shardxform.formats import ggml_blocks, packing

        values_RI = rows.values(start, stop)
        if bad := packing.first_of(~np.isfinite(values_RI)):
            raise ExecutionError(
                f"{where}: NaN or infinity at row {at + bad[0]}, column {bad[1]}; expected finite weights"
            )
        blocks_RB = rounded_blocks(values_RI, self.type)
        if bad := ggml_blocks.overflowing(blocks_RB, self.type):
            raise ExecutionError(
                f"{where}: row {at + bad[0]} needs a scale beyond float16 in block {bad[1]} of {self.type}; keep the"
                " weight in BF16"
            )
        return blocks_RB


def blocks_of_words(
    words_RW: NDArray[np.int32], half_RG: NDArray[np.uint16], grid: Grid, type_name: str, backend: Backend = "auto"
) -> NDArray[np.uint8]:
    """Blocks of Q4_0 or Q8_0 that hold symmetric integers, to the same bytes with either backend.

    Args:
        words_RW: int32 [R, I * bits / 32], codes of a row in order, lowest bits first.
        half_RG: float16 bits [R, G] of the scales.
        grid: bits, at most as many as the type has, and groups.
        type_name: Q4_0 or Q8_0.
        backend: `auto` takes numba where it is installed.

    Raises:
        ValueError: the backend is not installed.

    """
    from shardxform.formats import ggml_blocks, packing
    from shardxform.formats.rounding import use_numba

    if type_name == "Q4_0" and use_numba(backend):
        from shardxform.formats import ggml_kernels

        return ggml_kernels.of_words(words_RW, half_RG, grid.span(words_RW.shape[1] * 8))
    return ggml_blocks.of_codes(packing.unpack(words_RW, grid.bits, "row"), half_RG, grid, type_name)


def rounded_blocks(values_RI: NDArray[np.float32], type_name: str, backend: Backend = "auto") -> NDArray[np.uint8]:
    """Blocks of values by ggml's rule, bit for bit, with either backend.

    Args:
        values_RI: float32 [R, I], finite; I a multiple of the columns of a block.
        type_name: one of `WRITTEN`.
        backend: `auto` takes numba where it is installed.

    Returns:
        uint8 [R, bytes of a row]; scales that float16 does not hold are infinite: see `ggml_blocks.overflowing`.

    Raises:
        ValueError: the backend is not installed.

    """
    import numpy as np

    from shardxform.formats.rounding import use_numba

    values_NS = np.ascontiguousarray(values_RI).reshape(-1, BLOCKS[type_name][0])
    if use_numba(backend):
        from shardxform.formats import ggml_kernels

        return ggml_kernels.rounded_numba(values_NS, type_name).reshape(len(values_RI), -1)
    from shardxform.formats import ggml_blocks

    return ggml_blocks.rounded_numpy(values_NS, type_name).reshape(len(values_RI), -1)


@dataclass(frozen=True, slots=True)
class GgmlRows(DecodedRows):
    """Rows of blocks, read when they are asked for.

    Attributes:
        ref: what is stored; its shape is that of the values.
        read: fills an array.
        type: of the blocks.
        checked: whether values that are no numbers are refused.

    """

    ref: TensorRef
    read: Read
    type: str
    checked: bool

    def blocks(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes of rows `start`..`stop - 1`, uint8 [R, bytes of a row]."""
        import numpy as np

        columns, nbytes = BLOCKS[self.type]
        ref = self.ref.rows(self.first + start, self.first + stop)
        blocks_RB = np.empty((stop - start, ref.spec.shape[1] // columns * nbytes), np.uint8)
        self.read(ref, blocks_RB)
        return blocks_RB

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows, as ggml decodes them.

        Raises:
            ExecutionError: a value is NaN or infinite; names it.

        """
        from shardxform.formats import ggml_blocks

        values_RI = ggml_blocks.block_values(self.blocks(start, stop), self.type)
        if self.checked:
            self.refuse_bad(values_RI, start)
        return values_RI
