"""How the numbers of a matrix are stored: what every encoding says, whatever it is.

An encoding is a frozen value, one file of this room each. Which tensors stand for a matrix follows from its shape
alone, so that planning needs no array library; what reads and writes numbers imports one when it is called.
"""

# O: output channels, I: input channels, R: a run of rows.

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from shardxform.base.tensors import ByteRange, TensorRef, TensorSpec, coalesce

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardxform.formats.scheme import Grid

__all__ = [
    "ROUNDED",
    "Cut",
    "Encoded",
    "Encoding",
    "Fault",
    "Gridded",
    "Nearest",
    "Opener",
    "PartSpec",
    "Read",
    "Role",
    "Rows",
    "Source",
    "SourceDtype",
    "Storage",
    "Taken",
    "Turned",
    "Writable",
    "Writing",
    "in_turns",
    "ranges_of",
    "round_to",
    "shown",
    "taken",
]

Role = Literal["values", "words", "zeros", "scales", "biases", "shape", "g_idx", "whole"]
"""What a stored tensor holds of a matrix."""

ROUNDED: Final[frozenset[Role]] = frozenset({"values", "words", "scales"})
"""What rounding other values to the same encoding changes."""

SourceDtype = Literal["BF16", "F16", "F32"]
"""Floats that are rounded."""

Read = Callable[[TensorRef, "NDArray[Any]"], object]
"""Fills an array with the bytes of a tensor."""

ROUND_TILE: Final = 1 << 21
"""Most weights that are read and rounded at a time."""

DECODE_TILE: Final = 1 << 18
"""Most weights that are decoded at a time: few enough for the cache, unless a row has more."""

TILE_BYTES: Final = 6 * ROUND_TILE
"""Memory of a tile: as it is read, and as float32."""


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One of the tensors that stand for a matrix: what it holds, the last part of its name, its dtype and shape."""

    role: Role
    suffix: str
    dtype: str
    shape: tuple[int, ...]

    def spec(self, module: str) -> TensorSpec:
        """The same for a matrix of that name."""
        return TensorSpec(f"{module}.{self.suffix}", self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Cut:
    """Which rows of what is stored a matrix is: `count` of them from `first` on, of the stored matrix or its transpose.

    Attributes:
        first, count: of the rows.
        transposed: whether the stored matrix is [I, O].
        step: from one row to the next, where every second one is taken, or every third.
        turns: of how many matrices, stored one below the other, the rows are counted in turn.

    """

    first: int
    count: int
    transposed: bool = False
    step: int = 1
    turns: int = 1

    @property
    def is_run(self) -> bool:
        """Whether the rows are stored one after the other, so that a reference to them says it all."""
        return not self.transposed and self.step == self.turns == 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Shape [O, I] of the matrix in what has the shape `stored`."""
        return self.count, stored[0] if self.transposed else stored[1]

    def then(self, cut: Cut, stored: tuple[int, int]) -> Cut:
        """The part `cut` of the matrix that this one is of what has the shape `stored`, as one cut.

        Columns of a matrix are no cut: of a turned one, only what is turned back is, whose columns are all there.
        """
        if not cut.transposed:
            assert cut.turns == 1
            first = self.first + cut.first * self.step
            return replace(self, first=first, count=cut.count, step=self.step * cut.step)
        assert self == Cut(0, self.shape(stored)[0], self.transposed)
        return replace(cut, transposed=not self.transposed)

    def of(self, stored: Any) -> Any:  # noqa: ANN401
        """View of the matrix in an array or tensor of what is stored."""
        whole = stored.T if self.transposed else stored
        if self.turns > 1:
            whole = whole.reshape(self.turns, -1, *whole.shape[1:]).swapaxes(0, 1).reshape(whole.shape)
        return whole[self.first : self.first + self.count * self.step : self.step]


class Rows(Protocol):
    """The rows of a matrix, open to be read."""

    @property
    def count(self) -> int:
        """How many."""
        ...

    @property
    def fits_half(self) -> bool:
        """Whether float16 is known to hold every value."""
        ...

    def where(self, row: int) -> str:
        """Name a row, and what it is stored in, for a message."""
        ...

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows `start`..`stop - 1`, float32 [R, I]."""
        ...

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        """The same, exactly, in the narrowest of BF16, F16 and F32 in which they are at hand, and which that is."""
        ...

    def cut(self, cut: Cut) -> Rows:
        """Those of a matrix that is a part of this one."""
        ...


class Encoding(Protocol):
    """A way to store the numbers of a matrix [O, I]."""

    def __hash__(self) -> int: ...

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the tensors that stand for a matrix, in the order in which they are written."""
        ...

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> Rows:
        """Open a stored matrix; unless it is not to be `checked`, refuse what only its data tells.

        Raises:
            ExecutionError: it is not what the encoding means; names the tensor.

        """
        ...

    def held(self, parts: Mapping[Role, TensorRef], cut: Cut | None) -> int:
        """Bytes in memory while a matrix is open."""
        ...


@dataclass(frozen=True, slots=True)
class Fault:
    """Elements of one tensor that are wrong in one way; `found` and `wanted` are those of the first."""

    code: str
    what: str
    count: int
    first: int
    found: str
    wanted: str = ""


class Writable(Encoding, Protocol):
    """An encoding that can be written."""

    def misfit(self, rows: int, columns: int) -> str:
        """Say why a matrix of this shape cannot be stored so; empty when it can."""
        ...

    def written(self, sources: Iterable[Rows], writing: Writing) -> Iterator[tuple[Role, int, NDArray[Any]]]:
        """Encode rows of all sources, one below the other: runs of the parts' bytes, and where in a part they begin.

        Sources are opened as they are asked for: a stack of experts has hundreds.

        Raises:
            ExecutionError: values that cannot be stored so; names tensor and row.

        """
        ...

    def gathered(self, extent_bytes: int, sources: int) -> int:
        """Bytes of the parts of so many sources that are in memory before they are written."""
        ...


class Gridded(Writable, Protocol):
    """An encoding of integers on a grid: what it rounds values to, and what a tuner gives it, are codes and scales."""

    @property
    def grid(self) -> Grid | None:
        """Bits and groups; None where values are rounded in another way."""
        ...


class Nearest(Encoding, Protocol):
    """An encoding of codes with scales that values can be rounded to; `whole` is a scale of the whole tensor."""

    def maxima(self, values_OI: NDArray[np.float32]) -> NDArray[np.float32]:
        """The largest magnitude under each scale."""
        ...

    def scale_bits(self, most: NDArray[np.float32], whole: NDArray[np.float32] | None = None) -> NDArray[Any]:
        """Scales for largest magnitudes, as they are stored; a larger magnitude has no smaller a scale."""
        ...

    def scales(self, bits: NDArray[Any], whole: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Scales of what is stored for them."""
        ...

    def codes(self, values_RI: NDArray[np.float32], scales: NDArray[np.float32], begin: int) -> NDArray[np.uint8]:
        """Codes of rows `begin`.. as they are stored; a larger value has no smaller a code's value."""
        ...

    def decoded(self, codes_RB: NDArray[np.uint8], scales: NDArray[np.float32], begin: int) -> NDArray[np.float32]:
        """Values of such codes."""
        ...

    def laid_out(self, codes_OB: NDArray[np.uint8], bits: NDArray[Any]) -> dict[Role, NDArray[Any]]:
        """What is stored for all codes and scales."""
        ...


def round_to(
    encoding: Nearest, values_OI: NDArray[np.float32], whole: NDArray[np.float32] | None = None
) -> dict[Role, NDArray[Any]]:
    """Round a weight to an encoding, in place: what is stored for it, less the scale of the whole tensor."""
    import numpy as np

    bits = encoding.scale_bits(encoding.maxima(values_OI), whole)
    scales, codes = encoding.scales(bits, whole), []
    for start, stop in row_tiles(len(values_OI), values_OI.shape[1], DECODE_TILE):
        codes.append(encoding.codes(values_OI[start:stop], scales, start))
        values_OI[start:stop] = encoding.decoded(codes[-1], scales, start)
    return encoding.laid_out(np.concatenate(codes), bits)


@functools.lru_cache(maxsize=256)
def shown(encoding: Hashable) -> str:
    """What `repr` gives of an encoding: matrices share a few."""
    return repr(encoding)


class Storage(NamedTuple):
    """Where a matrix lies, and how.

    Attributes:
        encoding: of what is stored.
        parts: of it, in order.
        whole: its shape [O, I].
        cut: what of it the matrix is; None for all of it.

    """

    encoding: Encoding
    parts: tuple[tuple[Role, TensorRef], ...]
    whole: tuple[int, int]
    cut: Cut | None = None

    def __repr__(self) -> str:  # as dataclasses give it, in a third of the time: plans are fingerprinted by it
        return f"Storage(encoding={shown(self.encoding)}, parts={self.parts!r}, whole={self.whole!r}, cut={self.cut!r})"

    @property
    def name(self) -> str:
        """Of the module, as it is stored."""
        return self.parts[0][1].name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        return self.cut.shape(self.whole) if self.cut else self.whole

    @property
    def nbytes(self) -> int:
        """Size of all parts in bytes."""
        return sum(ref.nbytes for _, ref in self.parts)

    def part(self, cut: Cut) -> Storage:
        """Where a part of the matrix lies."""
        return self._replace(cut=self.cut.then(cut, self.whole) if self.cut else cut)

    @property
    def held(self) -> int:
        """Bytes in memory while it is open."""
        return self.encoding.held(dict(self.parts), self.cut)

    @property
    def reads(self) -> Iterator[ByteRange]:
        """The bytes of all parts."""
        return (piece for _, ref in self.parts for piece in ref.ranges)

    @property
    def storage(self) -> Storage:
        """Itself."""
        return self

    def is_of(self, other: Storage) -> bool:
        """Whether it is a part of the same matrix as another."""
        same = self.parts is other.parts or self.parts == other.parts
        return same and self.whole == other.whole and self.encoding == other.encoding

    def open(self, opener: Opener) -> Rows:
        """Its rows; raises like `Opener.open`."""
        return opener.open(self)

    def of(self, rows: Rows) -> Rows:
        """Take rows that are to be written in place of what is stored: as they are."""
        return rows


def in_turns(matrices: Sequence[Storage], named: int = 0) -> Storage:
    """The matrix in which the rows of several take turns, which have one shape and encoding, and are stored whole.

    Its parts are called as those of the one that is `named`.
    """

    def below(role: Role) -> TensorRef:
        refs = [dict(each.parts)[role] for each in matrices]
        rows, *others = refs[0].spec.shape
        spec = refs[named].spec.of_shape((len(refs) * rows, *others))
        return TensorRef(spec, coalesce(piece for ref in refs for piece in ref.ranges))

    encoding, parts, (rows, columns), *_ = matrices[0]
    count = len(matrices) * rows
    both = tuple((role, below(role)) for role, _ in parts)
    return Storage(encoding, both, (count, columns), Cut(0, count, turns=len(matrices)))


class Source(Protocol):
    """What is written of a matrix: one that is stored, or something that is made of its rows."""

    @property
    def storage(self) -> Storage:
        """Where the matrix lies."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of what it gives."""
        ...

    @property
    def held(self) -> int:
        """Bytes in memory while it is open."""
        ...

    @property
    def reads(self) -> Iterable[ByteRange]:
        """The bytes that it is made of."""
        ...

    def open(self, opener: Opener) -> Rows:
        """Its rows; raises like `Opener.open`."""
        ...

    def of(self, rows: Rows) -> Rows:
        """Make it of other rows than the stored ones, such as tuned ones."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class Encoded(TensorRef):
    """A tensor none of whose values is a byte of the source: what is stored for its rows, one below the other.

    It stands in tables among plain tensors; its dtype is what its values are decoded to. It has no ranges.
    """

    sources: tuple[Storage, ...] = field(default=())

    @classmethod
    def of(cls, storage: Storage, name: str) -> Encoded:
        """Give one matrix a name."""
        return cls(TensorSpec(name, "BF16", storage.shape), (), (storage,))

    def __repr__(self) -> str:
        return f"Encoded(spec={self.spec!r}, sources={self.sources!r})"

    def renamed(self, name: str) -> Encoded:
        """The same under another name."""
        return replace(self, spec=self.spec._replace(name=name))

    def rows(self, start: int, stop: int) -> Encoded:
        """Matrices of a stack, or rows of the one matrix that it is."""
        return self.select(range(start, stop))

    def index(self, i: int) -> Encoded:
        """Matrix `i` of a stack, each of which is stored by itself."""
        return Encoded(self.spec.of_shape(self.spec.shape[1:]), (), (self.sources[i],))

    def slabs(self, count: int = 1) -> Iterator[Encoded]:
        """The matrices of a stack, each cut into `count` of as many rows."""
        rows = self.spec.shape[1] // count
        spec = self.spec.of_shape((rows, self.spec.shape[2]))
        for source in self.sources:
            yield from (Encoded(spec, (), (source.part(Cut(part * rows, rows)),)) for part in range(count))

    def select(self, keep: Sequence[int]) -> Encoded:
        """Matrices `keep` of a stack, or rows of the one matrix that it is."""
        if len(self.spec.shape) > 2:
            stacked = tuple(self.sources[each] for each in keep)
            return Encoded(self.spec.of_shape((len(keep), *self.spec.shape[1:])), (), stacked)
        (source,) = self.sources
        rows = tuple(source.part(Cut(row, 1)) for row in keep)
        return Encoded(self.spec.of_shape((len(keep), *self.spec.shape[1:])), (), rows)


def ranges_of(ref: TensorRef) -> Iterator[ByteRange]:
    """The bytes that a tensor's values come from: its own, or those of what is stored for it."""
    yield from ref.ranges
    if isinstance(ref, Encoded):
        yield from (piece for source in ref.sources for _, part in source.parts for piece in part.ranges)


@dataclass(slots=True)
class Writing:
    """What an encoding needs to write one matrix, and what it found.

    Attributes:
        where: the matrix, for messages.
        shape: [O, I].
        rounder: rounds a run of rows to a grid of integers; see `execution.transcoding.rounder_on`.
        stopped: raises when the run is to stop.
        groups, zero_groups: of integers that share a scale; those that hold nothing but zeros.

    """

    where: str
    shape: tuple[int, int]
    rounder: Callable[..., Any]
    stopped: Callable[[], None]
    groups: int = 0
    zero_groups: int = 0


_NEAR: Final = 8
"""Rows from one that is wanted to the next between which others are read for nothing."""


@dataclass(slots=True)
class Turned:
    """Rows of the transpose of a matrix whose rows are decoded, or of a run of them: held in float32, once."""

    whole: Rows
    part: Cut
    _values: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many rows."""
        return self.part.count

    @property
    def fits_half(self) -> bool:
        """As the whole."""
        return self.whole.fits_half

    def where(self, row: int) -> str:
        """Name a row in a message."""
        return f"{self.whole.where(0)}, column {self.part.first + row * self.part.step}"

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows, float32 [R, I]."""
        import numpy as np

        if not self._values:
            self._values.append(self.whole.values(0, self.whole.count))
        return np.ascontiguousarray(self.part.of(self._values[0])[start:stop])

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        """The values."""
        return self.values(start, stop), "F32"

    def cut(self, cut: Cut) -> Rows:
        """Some of the rows."""
        assert not cut.transposed
        return Turned(self.whole, self.part.then(cut, (0, 0)), self._values)


@dataclass(frozen=True, slots=True)
class Taken:
    """Rows of a matrix in another order, or some of them: those at `positions`."""

    whole: Rows
    positions: NDArray[np.int64]

    @property
    def count(self) -> int:
        """How many rows."""
        return len(self.positions)

    @property
    def fits_half(self) -> bool:
        """As the whole."""
        return self.whole.fits_half

    def where(self, row: int) -> str:
        """Name a row in a message by where it is stored."""
        return self.whole.where(int(self.positions[row]))

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows, float32 [R, I]."""
        import numpy as np

        runs = list(self._runs(start, stop))
        values_RI = np.concatenate([self.whole.values(low, low + span)[inside] for _, low, span, inside in runs])
        return _put(values_RI, [at for at, *_ in runs])

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        """The same, as they are at hand."""
        import numpy as np

        runs = list(self._runs(start, stop))
        found = [self.whole.raw(low, low + span) for _, low, span, _ in runs]
        bits_RI = np.concatenate([bits[inside] for (bits, _), (*_, inside) in zip(found, runs, strict=True)])
        return _put(bits_RI, [at for at, *_ in runs]), found[0][1]

    def _runs(self, start: int, stop: int) -> Iterator[tuple[NDArray[np.int64], int, int, NDArray[np.int64]]]:
        """Runs of stored rows that hold these: which of these, the first row, how many rows, which of them."""
        import numpy as np

        wanted = self.positions[start:stop]
        order = np.argsort(wanted, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(wanted[order]) > _NEAR) + 1):
            low, high = int(wanted[at[0]]), int(wanted[at[-1]])
            yield at, low, high + 1 - low, wanted[at] - low

    def cut(self, cut: Cut) -> Rows:
        """Some of the rows, or of those of the transpose."""
        return Turned(self, cut) if cut.transposed else Taken(self.whole, cut.of(self.positions))


def _put(rows: NDArray[Any], at: Sequence[NDArray[np.int64]]) -> NDArray[Any]:
    """Rows where they belong."""
    import numpy as np

    out = np.empty_like(rows)
    out[np.concatenate(at)] = rows
    return out


def taken(rows: Rows, cut: Cut) -> Rows:
    """Rows of a cut that is no run: of those whose values are worked out when they are asked for."""
    import numpy as np

    return Turned(rows, cut) if cut.transposed else Taken(rows, cut.of(np.arange(rows.count)))


class Opener:
    """Opens stored matrices; keeps the last one, of which the next matrix is often another part."""

    def __init__(self, read: Read, *, checked: bool = True) -> None:
        self._read = read
        self._checked = checked
        self._last: tuple[Storage, Rows] | None = None

    def open(self, storage: Storage) -> Rows:
        """Open a matrix; raises like `Encoding.open`."""
        if self._last is None or not storage.is_of(self._last[0]):
            self._last = None  # freed before the next one is read
            rows = storage.encoding.open(dict(storage.parts), storage.whole, self._read, self._checked)
            self._last = (storage, rows)
        return self._last[1].cut(storage.cut) if storage.cut else self._last[1]


def row_tiles(rows: int, columns: int, weights: int) -> Iterator[tuple[int, int]]:
    """Runs of rows of at most so many weights, and of one row at least."""
    step = max(1, weights // max(columns, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
