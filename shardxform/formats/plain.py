"""Numbers as they are: one tensor of a floating-point dtype, or of any other whose bits are only moved."""

# O: output channels, I: input channels, R: a run of rows.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from shardxform.base.tensors import BITS, TensorRef
from shardxform.errors import ExecutionError
from shardxform.formats.encoding import (
    DECODE_TILE,
    Cut,
    Encoded,
    PartSpec,
    Read,
    Role,
    Rows,
    SourceDtype,
    Storage,
    Writing,
    row_tiles,
    taken,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Plain", "PlainRows", "storages_of"]


@dataclass(frozen=True, slots=True)
class Plain:
    """Values of one dtype. What has another is rounded to BF16 or F16 when it is written so, and is exact in F32."""

    dtype: str

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the one tensor that holds the values."""
        return (PartSpec("values", "weight", self.dtype, (rows, columns)),)

    def misfit(self, _rows: int, _columns: int) -> str:
        """Say nothing: every shape can be stored so."""
        return ""

    def open(self, parts: Mapping[Role, TensorRef], _shape: tuple[int, int], read: Read, _checked: bool) -> PlainRows:
        """Open a tensor; rows are read when they are asked for, or all of them for a cut that is no run of rows."""
        return PlainRows(parts["values"], read)

    def held(self, parts: Mapping[Role, TensorRef], cut: Cut | None) -> int:
        """The whole tensor, where the rows of a matrix are columns of it."""
        return parts["values"].nbytes if cut and cut.transposed else 0

    def gathered(self, _extent_bytes: int, _sources: int) -> int:
        """Nothing: rows are written as they come."""
        return 0

    def written(self, sources: Iterable[Rows], writing: Writing) -> Iterator[tuple[Role, int, NDArray[Any]]]:
        """Give the values a tile at a time; float16 must not overflow, nor round what it is known to hold exactly."""
        offset = 0
        for rows in sources:
            for start, stop in row_tiles(rows.count, writing.shape[1], DECODE_TILE):
                writing.stopped()
                bits_RI = self.bits(rows, start, stop)
                yield "values", offset, bits_RI
                offset += bits_RI.nbytes

    def bits(self, rows: Rows, start: int, stop: int) -> NDArray[Any]:
        """Rows in this dtype, as bits.

        Raises:
            ExecutionError: float16 cannot hold a value.

        """
        if isinstance(rows, PlainRows) and rows.dtype == self.dtype:
            return rows.bits(start, stop)
        from shardxform.formats import packing

        values_RI = rows.values(start, stop)
        if self.dtype == "F32":
            return values_RI
        if self.dtype == "BF16":
            return packing.bf16_bits_of(values_RI)
        assert self.dtype == "F16"
        bits_RI = packing.half_bits_of(values_RI)
        if bad := packing.not_held(bits_RI, values_RI, rows.fits_half):
            exactly = "" if int(bits_RI[bad]) & 0x7FFF == 0x7C00 else " exactly"  # not infinite
            raise ExecutionError(
                f"{rows.where(start + bad[0])}, column {bad[1]} stands for {values_RI[bad]}, which float16 cannot hold"
                f"{exactly}; use `target.format` bf16"
            )
        return bits_RI


@dataclass(slots=True)
class PlainRows:
    """Rows of a tensor, or of a `part` of it; what are its columns is read whole, once."""

    ref: TensorRef
    read: Read
    part: Cut | None = None
    _bits: list[NDArray[Any]] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        """Of the values."""
        return self.ref.spec.dtype

    @property
    def count(self) -> int:
        """How many rows."""
        return self.part.count if self.part else self.ref.spec.shape[0]

    @property
    def fits_half(self) -> bool:
        """Whether the values are float16 already."""
        return self.dtype == "F16"

    def where(self, row: int) -> str:
        """Name a row in a message."""
        return f"tensor '{self.ref.name}': row {row}"

    def cut(self, cut: Cut) -> Rows:
        """Rows of a part; what was read of the whole is theirs too."""
        if cut.is_run or cut.transposed:
            return PlainRows(self.ref, self.read, cut, self._bits)
        return taken(self, cut)

    def bits(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start`..`stop - 1`, one after the other; unsigned bits, but for F32."""
        import numpy as np

        if self.part and self.part.is_run:
            return self._read(self.ref.rows(self.part.first + start, self.part.first + stop))
        if self.part is None:
            return self._read(self.ref.rows(start, stop))
        if not self._bits:
            self._bits.append(self._read(self.ref))
        return np.ascontiguousarray(self.part.of(self._bits[0])[start:stop])

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        """The bits and what they mean."""
        return self.bits(start, stop), cast(SourceDtype, self.dtype)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows, exactly; of BF16, F16 and F32."""
        from shardxform.formats.packing import float32_of

        return float32_of(*self.raw(start, stop))

    def _read(self, ref: TensorRef) -> NDArray[Any]:
        import numpy as np

        array = np.empty(ref.spec.shape, "f4" if ref.spec.dtype == "F32" else f"u{BITS[ref.spec.dtype] // 8}")
        self.read(ref, array)
        return array


def storages_of(ref: TensorRef, cut: Cut | None = None) -> tuple[Storage, ...]:
    """What is stored for a matrix, or with a cut for a part of what `ref` holds; a vector is a matrix of one column."""
    if isinstance(ref, Encoded):
        return tuple(source.part(cut) for source in ref.sources) if cut else ref.sources
    whole = ref if len(ref.spec.shape) == 2 else ref.reshaped((*ref.spec.shape, 1))
    rows, columns = whole.spec.shape
    return (Storage(Plain(ref.spec.dtype), (("values", whole),), (rows, columns), cut),)
