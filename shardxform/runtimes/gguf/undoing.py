"""Weights of a checkpoint, as a GGUF file that was made of it holds them: rows, columns and values put back.

Integers in blocks of Q4_0 and Q8_0 come out as integers with their scales; everything else as float32.
"""

# O: output channels, I: input channels, R: rows, N: blocks of a row, W: words of a row, G: groups of a row.

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from shardxform.base.tensors import TensorRef, TensorSpec, coalesce
from shardxform.errors import ExecutionError, SchemeError
from shardxform.formats.encoding import Cut, Encoded, Encoding, PartSpec, Read, Role, Rows, SourceDtype, Storage
from shardxform.formats.ggml import EXACT, encoding_of
from shardxform.formats.scheme import Bits, Grid
from shardxform.runtimes.gguf.architecture import Named, Piece
from shardxform.runtimes.gguf.transforms import BLOCK, Order, Transform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardxform.formats.packing import IntRows

__all__ = ["Undone", "put_back", "storage_in"]

_MOST_RUNS: Final = 1024  # of rows of one matrix that lie together in a file
_BIAS: Final = ".bias"
_BITS: Final[Mapping[str, Bits]] = {"Q4_0": 4, "Q8_0": 8}


@dataclass(frozen=True, slots=True)
class Undone:
    """A matrix [O, I] of the checkpoint, as some rows of a tensor of the file hold it.

    Attributes:
        type: of the tensor, as ggml calls it.
        first, count: of its rows.
        transform: what was done to the matrix; None where it was taken as it is.
        grid: of integers whose groups span several blocks, which must then have one scale; None for a scale a block.

    """

    type: str
    first: int
    count: int
    transform: Transform | None = None
    grid: Grid | None = None

    def __str__(self) -> str:
        return self.type

    @property
    def encoding(self) -> Encoding:
        """How the tensor is stored."""
        return encoding_of(self.type)

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the tensor."""
        return (PartSpec("values", "weight", self.type, (rows, columns)),)

    def held(self, parts: Mapping[Role, TensorRef], _cut: Cut | None) -> int:
        """All values of the rows, twice; integers take less."""
        columns = parts["values"].spec.shape[-1] if len(parts["values"].spec.shape) > 1 else 1
        return 8 * self.count * columns

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> Rows:
        """Read the matrix and put its rows, columns and values back.

        Raises:
            ExecutionError: it is no such matrix: a value is not finite, or blocks of a group have several scales.

        """
        ref = parts["values"]
        columns = ref.spec.shape[-1] if len(ref.spec.shape) > 1 else 1
        whole = ref.reshaped((math.prod(ref.spec.shape) // columns, columns))
        if self.type in EXACT and (self.transform is None or self.transform.keeps_codes()):
            return self._integers(whole, read)
        rows = self.encoding.open({"values": whole}, (whole.spec.shape[0], columns), read, checked)
        rows = rows.cut(Cut(self.first, self.count))
        return rows if self.transform is None else _values(rows, self.transform, shape, ref.name)

    def _integers(self, whole: TensorRef, read: Read) -> IntRows:
        """Codes and scales of the rows, as the checkpoint has them."""
        import numpy as np

        from shardxform.formats import packing

        bits, columns = _BITS[self.type], whole.spec.shape[1]
        ref = whole.rows(self.first, self.first + self.count)
        blocks_RNB = np.empty((self.count, columns // BLOCK, ref.nbytes // self.count // (columns // BLOCK)), np.uint8)
        read(ref, blocks_RNB)
        if self.transform and self.transform.columns:
            blocks_RNB = blocks_RNB[:, _inverse(self.transform.columns, BLOCK, ref.name)]
        if self.transform and self.transform.rows:
            blocks_RNB = blocks_RNB[_inverse(self.transform.rows, 1, ref.name)]
        scales_RN = np.ascontiguousarray(blocks_RNB[..., :2]).view("<u2")[..., 0].astype(np.uint16)
        codes_RI = _codes(blocks_RNB[..., 2:], bits).reshape(self.count, columns)
        grid = replace(self.grid or Grid(bits=bits, scale_grid="fp16"), group_size=BLOCK)
        if self.grid and self.grid.span(columns) != BLOCK:
            scales_RN, grid = _grouped(scales_RN, self.grid.span(columns), ref.name), self.grid
        spec = TensorSpec(ref.name, "F16", scales_RN.shape)
        return packing.IntRows(
            packing.pack(codes_RI, bits, "row"), scales_RN, "row", grid, spec, ref.name, 0, self.count
        )


def _codes(bytes_RNB: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes with zero in the middle, uint8 [R, N, 32]."""
    import numpy as np

    if bits == 8:
        return np.ascontiguousarray(bytes_RNB) + np.uint8(128)
    return np.concatenate((bytes_RNB & np.uint8(15), bytes_RNB >> np.uint8(4)), axis=-1)


def _grouped(scales_RN: NDArray[np.uint16], span: int, name: str) -> NDArray[np.uint16]:
    """One scale for each group; raises `ExecutionError` where its blocks have several."""
    import numpy as np

    scales_RGN = scales_RN.reshape(len(scales_RN), -1, span // BLOCK)
    if bad := np.argwhere((scales_RGN != scales_RGN[..., :1]).any(axis=-1)).tolist():
        row, group = bad[0]
        raise ExecutionError(f"tensor '{name}': blocks of group {group} of row {row} have several scales; expected one")
    return np.ascontiguousarray(scales_RGN[..., 0])


def _inverse(order: Order, size: int, name: str) -> NDArray[np.int64]:
    """Where each row, or block of columns, of the checkpoint stands in the file."""
    import numpy as np

    found = order.blocks(size)
    if found is None or sorted(found.tolist()) != list(range(found.size)):
        raise ExecutionError(
            f"tensor '{name}': it has a part of the checkpoint's rows or columns, which is not put back; evaluate the"
            " same weights in another format"
        )
    return np.argsort(found)


def _values(rows: Rows, transform: Transform, shape: tuple[int, int], name: str) -> _Dense:
    """All values, as the checkpoint means them: float32 [O, I]."""
    import numpy as np

    values_RI = rows.values(0, rows.count)
    if transform.value == "one more":
        values_RI = values_RI - np.float32(1)
    elif transform.value == "minus exp":
        values_RI = np.log(-values_RI.astype(np.float64)).astype(np.float32)
    if transform.columns:
        values_RI = values_RI[:, _inverse(transform.columns, 1, name)]
    if transform.rows:
        values_RI = values_RI[_inverse(transform.rows, 1, name)]
    if transform.transposed:
        values_RI = values_RI.T
    return _Dense(name, np.ascontiguousarray(values_RI.reshape(shape)))


@dataclass(frozen=True, slots=True)
class _Dense:
    """Rows in memory."""

    name: str
    held_RI: NDArray[np.float32]

    @property
    def count(self) -> int:
        return len(self.held_RI)

    @property
    def fits_half(self) -> bool:
        return False

    def where(self, row: int) -> str:
        return f"tensor '{self.name}': row {row} of a matrix"

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        return self.held_RI[start:stop]

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        return self.values(start, stop), "F32"

    def cut(self, cut: Cut) -> Rows:
        import numpy as np

        return _Dense(self.name, np.ascontiguousarray(cut.of(self.held_RI)))


# -- a whole checkpoint -----------------------------------------------------------------------------------------------


def storage_in(piece: Piece, first: int, held: TensorRef, grid: Grid | None = None) -> Storage:
    """Where the matrix of a piece lies in a file: the rows from `first` on of the tensor `held`."""
    undone = Undone(held.spec.dtype, first, piece.shape[0], piece.transform, grid)
    return Storage(undone, (("values", _as_matrix(piece, held)),), piece.storage.shape)


def _as_matrix(piece: Piece, held: TensorRef) -> TensorRef:
    """A tensor [N, I] that has a piece among its rows."""
    columns = piece.shape[1]
    return held.reshaped((math.prod(held.spec.shape) // columns, columns))


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of a matrix, and where they lie: the rows from `first` on of the tensor `held`."""

    piece: Piece
    first: int
    held: TensorRef

    @property
    def order(self) -> Order:
        """Which rows they are."""
        assert self.piece.transform is not None
        assert self.piece.transform.rows is not None
        return self.piece.transform.rows

    @property
    def rest(self) -> Transform:
        """What else was done to them."""
        assert self.piece.transform is not None
        return replace(self.piece.transform, rows=None)

    @property
    def rows(self) -> TensorRef:
        """They alone, as a matrix."""
        return _as_matrix(self.piece, self.held).rows(self.first, self.first + self.piece.shape[0])

    def runs(self) -> Iterator[tuple[int, Storage]]:
        """Where the matrix's rows lie, run by run, with its first row of each.

        Raises:
            SchemeError: rows that take turns one by one, of which there would be millions of runs.

        """
        positions = self.order.positions().tolist()
        starts = [at for at, row in enumerate(positions) if at == 0 or row != positions[at - 1] + 1]
        if len(starts) > _MOST_RUNS:
            raise SchemeError(
                f"tensor '{self.held.name}': it has every second row of {self.piece.matrix}, and those between are of"
                " another type: not put back; evaluate the same weights in another format"
            )
        columns, rest = self.piece.storage.shape[1], self.rest
        for start, stop in pairwise([*starts, len(positions)]):
            transform = rest if rest != Transform() else None
            undone = Undone(self.held.spec.dtype, self.first + start, stop - start, transform)
            yield positions[start], Storage(undone, (("values", self.held),), (stop - start, columns))


def _together(parts: Sequence[_Part]) -> Iterator[tuple[int, Storage]]:
    """Where a matrix lies whose rows are in several tensors: all as one, or run by run where others are elsewhere.

    Heads of one kind of a projection that has several, such as that of Qwen3-Next, are a tensor of their own; so are
    gate and up projection where they take turns row by row.

    Raises:
        SchemeError: see `_Part.runs`.

    """
    refs = [part.rows for part in parts]
    count, columns = sum(ref.spec.shape[0] for ref in refs), refs[0].spec.shape[1]
    alike = len({(part.held.spec.dtype, part.rest) for part in parts}) == 1
    if not alike or count < parts[0].piece.storage.shape[0]:
        for part in parts:
            yield from part.runs()
        return
    spec = refs[0].spec.of_shape((count, columns))
    ref = TensorRef(spec, coalesce(piece for each in refs for piece in each.ranges))
    order = Order(tuple(run for part in parts for run in part.order.runs))
    undone = Undone(spec.dtype, 0, count, replace(parts[0].rest, rows=order))
    yield 0, Storage(undone, (("values", ref),), (count, parts[0].piece.storage.shape[1]))


def put_back(
    tensors: Iterable[Named], held: Mapping[str, TensorRef], view: Mapping[str, TensorRef]
) -> dict[str, TensorRef]:
    """The table of a checkpoint, as a file holds it.

    Args:
        tensors: of the file, and what they were made of.
        held: the file's own.
        view: what they were made of, which gives names and shapes; routed experts come out one by one.

    Raises:
        SchemeError: the file lacks a tensor.

    """
    found: dict[str, list[tuple[int, Storage]]] = {}
    parts: dict[str, list[_Part]] = {}
    for named in tensors:
        if named.name not in held:
            raise SchemeError(f"tensor '{named.name}' is missing")
        first = 0
        for piece in named.pieces:
            cut = piece.storage.cut
            at = cut.first if cut and f"{piece.matrix}.weight" in view else 0
            name = _name(piece, view)
            if piece.is_part:
                parts.setdefault(name, []).append(_Part(piece, first, held[named.name]))
            else:
                found.setdefault(name, []).append((at, storage_in(piece, first, held[named.name])))
            first += piece.shape[0]
    for name, each in parts.items():
        found.setdefault(name, []).extend(_together(each))
    out: dict[str, TensorRef] = {}
    for name, stored in found.items():
        sources = tuple(storage for _, storage in sorted(stored, key=lambda each: each[0]))
        shape = view[name].spec.shape if name in view else _shape(name, sources)
        out[name] = Encoded(TensorSpec(name, "F32", shape), (), sources)
    return out


def _name(piece: Piece, view: Mapping[str, TensorRef]) -> str:
    """Name of the tensor that a piece is of; of one expert where it is of a stack."""
    return piece.matrix if piece.matrix in view or piece.matrix.endswith(_BIAS) else f"{piece.matrix}.weight"


def _shape(name: str, sources: Sequence[Storage]) -> tuple[int, ...]:
    """Shape of the tensor of one expert."""
    rows = sum(source.shape[0] for source in sources)
    return (rows,) if name.endswith(_BIAS) else (rows, sources[0].shape[1])
