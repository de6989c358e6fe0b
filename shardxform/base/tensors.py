"""Tensors as values: what they are (`TensorSpec`) and where their bytes lie (`TensorRef`).

A checkpoint is a table of `TensorRef`. Selecting experts, splitting a fused weight and renaming are functions from
one reference to another: slices along the leading dimension of a row-major tensor are contiguous byte ranges, so no
element is ever decoded. Nothing here opens a file.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Final, Literal, NamedTuple, TypeVar

from shardxform.base.strict_json import JsonError, parse_object
from shardxform.errors import CheckpointError, PlanError

__all__ = [
    "BITS",
    "BLOCKS",
    "FLOATS",
    "FP8",
    "ID_DTYPES",
    "LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "RANK",
    "ByteRange",
    "Entry",
    "Remade",
    "TensorRef",
    "TensorSpec",
    "data_start",
    "decode",
    "encode",
    "layout",
    "many",
    "natural_key",
    "padded",
    "parse_size",
    "shard_names",
    "show_size",
    "split",
    "uncollected",
]


T = TypeVar("T", bound=tuple[object, ...])


def many(kind: type[T], rows: Iterable[tuple[object, ...]]) -> Iterator[T]:
    """Make a named tuple of every row: tables of 100,000 tensors are made so in half the time of calling `kind`."""
    return map(tuple.__new__, itertools.repeat(kind), rows)


@functools.lru_cache(maxsize=1024)
def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    if bits := BITS.get(dtype):
        return math.prod(shape) * bits // 8
    elements, size = BLOCKS[dtype]
    return math.prod(shape) // elements * size


class TensorSpec(NamedTuple):
    """What a shard's header says of one tensor, less its place: name, dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __repr__(self) -> str:  # as tuples with names give it, in half the time: plans are fingerprinted by it
        return f"TensorSpec(name={self.name!r}, dtype={self.dtype!r}, shape={self.shape!r})"

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return _nbytes(self.shape, self.dtype)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def of_shape(self, shape: tuple[int, ...]) -> TensorSpec:
        """The same name and dtype with another shape."""
        return TensorSpec(self.name, self.dtype, shape)


class ByteRange(NamedTuple):
    """`length` bytes at `offset` of `file`, a shard's name within its checkpoint."""

    file: str
    offset: int
    length: int

    def __repr__(self) -> str:
        return f"ByteRange(file={self.file!r}, offset={self.offset}, length={self.length})"

    @property
    def end(self) -> int:
        """First byte after the range."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Remade:
    """How a matrix is made whose values are not byte ranges of `source` [R, C], each row by itself.

    Attributes:
        source: what it is made of.
        keep: columns, or ids of experts, that stay, ascending.
        what: `columns` stay as they are, those in `keep`; or its values are `ids` of experts, which are renumbered.
        experts: number of those that ids may name.

    """

    source: TensorRef
    keep: tuple[int, ...]
    what: Literal["columns", "ids"]
    experts: int = 0


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor and the byte ranges that hold it: their concatenation, in order, is its row-major data.

    Where there is `remade`, no ranges hold it: its values are to be worked out, as a plan's own step does it.
    """

    spec: TensorSpec
    ranges: tuple[ByteRange, ...]
    remade: Remade | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        remade = f", remade={self.remade!r}" if self.remade else ""
        return f"TensorRef(spec={self.spec!r}, ranges={self.ranges!r}{remade})"

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.spec.name

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return _nbytes(self.spec.shape, self.spec.dtype)

    def renamed(self, name: str) -> TensorRef:
        """Same bytes under another name."""
        _, dtype, shape = self.spec
        return TensorRef(TensorSpec(name, dtype, shape), self.ranges, remade=self.remade)

    def reshaped(self, shape: tuple[int, ...]) -> TensorRef:
        """Same bytes under another shape of as many elements."""
        if math.prod(shape) != math.prod(self.spec.shape):
            raise ValueError(f"{self.name}: cannot view {self.spec.shape} as {shape}")
        return TensorRef(self.spec.of_shape(shape), self.ranges, remade=self.remade)

    def select(self, keep: Sequence[int]) -> TensorRef:
        """Rows `keep` of dim 0, in that order: `result[i] == self[keep[i]]`.

        Raises:
            CheckpointError: the tensor has no dim 0, or its rows are no whole number of bytes.
            IndexError: an id is outside dim 0.

        """
        row = self._row_bytes()
        rows = self.spec.shape[0]
        if any(not 0 <= index < rows for index in keep):
            raise IndexError(f"{self.name}: row outside 0..{rows - 1}")
        pieces = (piece for index in keep for piece in _cut(self.ranges, index * row, row))
        return TensorRef(self.spec.of_shape((len(keep), *self.spec.shape[1:])), coalesce(pieces))

    def take(self, axis: int, keep: Sequence[int]) -> TensorRef:
        """Positions `keep` of dimension `axis`, in that order; as many runs of bytes as there are before it."""
        if not axis:
            return self.select(keep)
        before, (rows, *after) = self.spec.shape[:axis], self.spec.shape[axis:]
        flat = self.reshaped((math.prod(before) * rows, *after))
        picked = flat.select([first * rows + each for first in range(math.prod(before)) for each in keep])
        return picked.reshaped((*before, len(keep), *after))

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows `start`..`stop - 1` of dim 0."""
        row = self._row_bytes()
        if not 0 <= start <= stop <= self.spec.shape[0]:
            raise IndexError(f"{self.name}: rows {start}..{stop} outside 0..{self.spec.shape[0]}")
        pieces = _cut(self.ranges, start * row, (stop - start) * row)
        return TensorRef(self.spec.of_shape((stop - start, *self.spec.shape[1:])), coalesce(pieces))

    def index(self, i: int) -> TensorRef:
        """Row `i` of dim 0, which is dropped: the 2-D weight of one expert of a fused tensor."""
        one = self.rows(i, i + 1)
        return one.reshaped(self.spec.shape[1:])

    def slabs(self, count: int = 1) -> Iterator[TensorRef]:
        """The 2-D weights that a stack holds, each cut into `count` of as many rows: `index` and `rows` in one walk."""
        rows, *columns = self.spec.shape[1:]
        if rows % count:
            raise ValueError(f"{self.name}: {rows} rows do not fill {count} parts")
        spec = self.spec.of_shape((rows // count, *columns))
        length = self._row_bytes() // count
        for pieces in _runs(self.ranges, length, self.spec.shape[0] * count):
            yield TensorRef(spec, pieces)

    def _row_bytes(self) -> int:
        if self.remade:
            raise CheckpointError(f"tensor '{self.name}' is to be worked out first: it has no bytes to take rows from")
        if not self.spec.shape:
            raise CheckpointError(f"tensor '{self.name}' is a scalar; expected a leading dimension to slice")
        dtype, shape = self.spec.dtype, self.spec.shape
        if dtype in BLOCKS:
            elements, size = BLOCKS[dtype]
            if len(shape) < 2 or shape[-1] % elements:
                raise CheckpointError(f"tensor '{self.name}': rows of {dtype} {shape} split a block of {elements}")
            return math.prod(shape[1:]) // elements * size
        bits = math.prod(shape[1:]) * BITS[dtype]
        if bits % 8:
            raise CheckpointError(f"tensor '{self.name}': rows of {dtype} {shape} split a byte")
        return bits // 8


def coalesce(pieces: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """Join neighbours that touch in the same file; empty ranges vanish."""
    out: list[ByteRange] = []
    for piece in pieces:
        if not piece.length:
            continue
        if out and out[-1].file == piece.file and out[-1].end == piece.offset:
            out[-1] = ByteRange(piece.file, out[-1].offset, out[-1].length + piece.length)
        else:
            out.append(piece)
    return tuple(out)


def _runs(ranges: Iterable[ByteRange], length: int, count: int) -> Iterator[tuple[ByteRange, ...]]:
    """The first `count` runs of `length` bytes of the concatenation of `ranges`, which holds as many, in one walk."""
    pieces = iter(ranges)
    piece, at = ByteRange("", 0, 0), 0
    for _ in range(count):
        run: list[ByteRange] = []
        left = length
        while left:
            if at == piece.length:
                piece, at = next(pieces), 0
                continue
            take = min(left, piece.length - at)
            run.append(ByteRange(piece.file, piece.offset + at, take))
            at += take
            left -= take
        yield coalesce(run) if len(run) > 1 else tuple(run)


def _cut(ranges: Sequence[ByteRange], start: int, length: int) -> Iterable[ByteRange]:
    """Bytes `start`..`start + length` of the concatenation of `ranges`."""
    for piece in ranges:
        if length <= 0:
            return
        if start < piece.length:
            take = min(piece.length - start, length)
            yield ByteRange(piece.file, piece.offset + start, take)
            length -= take
            start = 0
        else:
            start -= piece.length


# -- dtypes -------------------------------------------------------------------------------------------------------


BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Width of one element in bits, by dtype name."""

BLOCKS: Final[dict[str, tuple[int, int]]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ3_XXS": (256, 98),
    "IQ1_S": (256, 50),
    "IQ4_NL": (32, 18),
    "IQ3_S": (256, 110),
    "IQ2_S": (256, 82),
    "IQ4_XS": (256, 136),
    "IQ1_M": (256, 56),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "Q1_0": (128, 18),
    "Q2_0": (64, 18),
}
"""Elements and bytes of one block, by name of GGML's block types; rows are whole blocks. No header of safetensors names
them. Q8_1 and Q8_K are left out: they are of values under way, and in no file."""

RANK: Final[dict[str, int]] = {name: rank for rank, name in enumerate(BITS)}
"""Position in the reference writer's order; tensors of the highest rank come first in a shard."""

FLOATS: Final[frozenset[str]] = frozenset({"F16", "BF16", "F32", "F64"})
"""Plain floating-point dtypes: what a weight that is not quantized is stored in."""

FP8: Final = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""Dtypes of weights that mean nothing without a scale."""

ID_DTYPES: Final[frozenset[str]] = frozenset({"I32", "I64"})
"""Dtypes of tables of ids."""


# -- header ------------------------------------------------------------------------------------------------------------
# The header of a shard: pure functions between bytes and specs, no I/O.
#
# Layout of a shard (safetensors): 8 bytes little-endian length N, N bytes of JSON, the data. `layout` and `encode`
# reproduce the reference writer (tensors by dtype rank descending, then name; header padded with spaces to 8 bytes),
# so a shard written through them equals what `safetensors.torch.save_file` writes, byte for byte. `decode` refuses
# whatever the reference reader refuses, and what is ambiguous besides, such as a name that occurs twice.

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000  # the reference reader's own limit
_LFS_POINTER: Final = b"version "
_LIMIT: Final = 1 << 64  # the reference reader computes in 64 bits, and refuses what overflows on the way


class Entry(NamedTuple):
    """One tensor of a header: its spec, and where its data begins and ends, in bytes from the start of the data."""

    spec: TensorSpec
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.begin


def data_start(prefix: bytes, file_bytes: int, where: str) -> int:
    """Offset of the data in a file of `file_bytes` bytes, from its first 8 bytes.

    Raises:
        CheckpointError: the file is shorter than its header claims, or the header exceeds the reader's limit.

    """
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"{where}: {file_bytes} bytes, too short for a safetensors header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        why = f"header claims {length} bytes, the limit is {MAX_HEADER_BYTES}"
        if prefix[:LENGTH_BYTES] == _LFS_POINTER:
            why = "a pointer of Git LFS, which stands for the file; fetch it with: git lfs pull"
        raise CheckpointError(f"{where}: expected a safetensors file, found none: {why}")
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(f"{where}: header claims {length} bytes, but the file has {file_bytes}")
    return LENGTH_BYTES + length


def decode(text: bytes, data_bytes: int, where: str) -> tuple[Entry, ...]:
    """Entries of a header's JSON, by offset; `data_bytes` is what follows the header in the file.

    Raises:
        CheckpointError: anything the reference reader would refuse: bad JSON, unknown dtype, absurd shape, a hole, an
            overlap, data beyond the file or not reaching its end.

    """
    return tuple(_usual(text, data_bytes) or _entries(text, data_bytes, where))


def _entries(text: bytes, data_bytes: int, where: str) -> list[Entry]:
    """Entries of any header, by offset."""
    try:
        header = parse_object(text)
    except JsonError as e:
        raise CheckpointError(f"{where}: header is {e}") from e
    _check_metadata(header.pop("__metadata__", {}), where)
    entries = [_entry(name, info, where) for name, info in header.items()]
    entries.sort(key=lambda e: (e.begin, e.end))
    expected = 0
    for entry in entries:
        if entry.begin != expected:
            kind = "overlaps its predecessor" if entry.begin < expected else "leaves a hole before it"
            raise CheckpointError(
                f"{where}: tensor '{entry.spec.name}' {kind}: begins at {entry.begin}, expected {expected}"
            )
        expected = entry.end
    if expected != data_bytes:
        fault = "truncated" if expected > data_bytes else "longer than its header says"
        raise CheckpointError(f"{where}: {fault}: header describes {expected} bytes of data, the file has {data_bytes}")
    return entries


_NUMBER: Final = "(?:0|[1-9][0-9]{0,18})"
_METADATA: Final = '{"__metadata__":{"format":"pt"},'
_OFFSETS: Final = f'"data_offsets":\\[({_NUMBER}),({_NUMBER})\\]'
_ONE: Final = re.compile(f'"([^"\\\\\\x00-\\x1f]*)":{{("dtype":[^]]*]),{_OFFSETS}}}(?:,|}}\\Z)')
_AROUND: Final = len('"":{,"data_offsets":[,]},')
_KIND: Final = re.compile(f'"dtype":"([A-Z0-9_]+)","shape":\\[((?:{_NUMBER},)*{_NUMBER})?\\]')


def _usual(text: bytes, data_bytes: int) -> list[Entry] | None:
    """Entries of a header that is written as the reference writer does it, by offset; None for any other.

    What opens a checkpoint of a hundred thousand tensors takes a fourth of the time so: most of it is reading JSON.
    """
    try:
        body = text.decode("utf-8").rstrip(" ")
    except UnicodeDecodeError:
        return None
    start = len(_METADATA) if body.startswith(_METADATA) else 1
    found = _ONE.findall(body, start)
    if not found or not body.startswith("{") or not body.endswith("]}}"):
        return None
    names, texts, *offsets = zip(*found, strict=True)
    length = sum(sum(map(len, column)) for column in (names, texts, *offsets))
    if start + length + _AROUND * len(found) != len(body) or "__metadata__" in names or len(set(names)) < len(names):
        return None  # something between them, or one of them twice
    begins, ends = (list(map(int, column)) for column in offsets)
    kinds = {each: kind for each in set(texts) if (kind := _kind_of(each))}
    if len(kinds) < len(set(texts)) or begins != [0, *ends[:-1]] or ends[-1] != data_bytes:
        return None
    dtypes, shapes, sizes = zip(*map(kinds.__getitem__, texts), strict=True)
    if any(map(operator.ne, map(operator.sub, ends, begins), sizes)):
        return None
    specs = many(TensorSpec, zip(names, dtypes, shapes, strict=True))
    return list(many(Entry, zip(specs, begins, ends, strict=True)))


def _kind_of(text: str) -> tuple[str, tuple[int, ...], int] | None:
    """Dtype, shape and bytes of tensors that a header describes so; None where they are no whole number of bytes."""
    match = _KIND.fullmatch(text)
    if not match or match[1] not in BITS:
        return None
    shape = [int(size) for size in match[2].split(",")] if match[2] else []
    bits = _bits(shape, match[1]) if _is_sizes(shape) else None
    return None if bits is None or bits % 8 else (match[1], tuple(shape), bits // 8)


def padded(nbytes: int, alignment: int) -> int:
    """`nbytes`, or the next multiple of `alignment` after it."""
    return -(-nbytes // alignment) * alignment


def layout(specs: Iterable[TensorSpec]) -> tuple[Entry, ...]:
    """Place tensors in the reference writer's order: dtype rank descending, then name."""
    by_dtype: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        by_dtype.setdefault(spec.dtype, []).append(spec)
    ordered: list[TensorSpec] = []
    for dtype in sorted(by_dtype, key=RANK.__getitem__, reverse=True):
        ordered += sorted(by_dtype[dtype], key=operator.itemgetter(0))  # its name
    ends = list(itertools.accumulate(_nbytes(shape, dtype) for _, dtype, shape in ordered))
    return tuple(many(Entry, zip(ordered, [0, *ends], ends, strict=False)))


def encode(entries: Iterable[Entry]) -> bytes:
    """Length prefix and header for entries in file order.

    `__metadata__` is exactly `{"format": "pt"}`: the reference writer orders several keys at random.
    """
    described = [
        f'{encode_basestring(spec.name)}:{{{_kind(spec.dtype, spec.shape)},"data_offsets":[{begin},{end}]}}'
        for spec, begin, end in entries
    ]
    text = ",".join(['{"__metadata__":{"format":"pt"}', *described]).encode("utf-8") + b"}"
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


@functools.lru_cache(maxsize=1024)
def _kind(dtype: str, shape: tuple[int, ...]) -> str:
    """What the tensors of one dtype and shape have in common in a header."""
    return f'"dtype":"{dtype}","shape":[{",".join(map(str, shape))}]'


def _check_metadata(metadata: object, where: str) -> None:
    if metadata is None:  # which the reference reader takes for none
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ is not a map of strings")


def _entry(name: str, info: object, where: str) -> Entry:
    at = f"{where}: tensor '{name}'"
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{at}: expected dtype, shape and data_offsets, found {_brief(info)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{at}: unknown dtype {_brief(dtype)}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{at}: shape {_brief(shape)} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{at}: data_offsets {_brief(offsets)} are not [begin, end]")
    bits = _bits(shape, dtype)
    if bits is None or bits % 8:
        fault = "is beyond 64 bits" if bits is None else "ends within a byte"
        raise CheckpointError(f"{at}: {dtype} {_brief(shape)} {fault}")
    if bits // 8 != offsets[1] - offsets[0]:
        span = offsets[1] - offsets[0]
        raise CheckpointError(f"{at}: {dtype} {_brief(shape)} needs {bits // 8} bytes, but data_offsets span {span}")
    return Entry(TensorSpec(name, dtype, tuple(shape)), *offsets)


def _bits(shape: list[int], dtype: str) -> int | None:
    """Size in bits, or None when it overflows, multiplied in the reference reader's order."""
    total = 1
    for factor in (*shape, BITS[dtype]):
        total *= factor
        if total >= _LIMIT:
            return None
    return total


def _is_sizes(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(v) is int and 0 <= v < _LIMIT for v in value)  # bool is an int: type() tells them apart
    )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# -- sharding ----------------------------------------------------------------------------------------------------------
# Which tensor goes into which shard, and what the shards are called: Hugging Face's policy, as pure functions.

_UNITS: Final = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` (decimal), `512MiB` or `1000000`.

    Raises:
        PlanError: not a positive size.

    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]I?B|)\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size <= 0:
        raise PlanError(f"expected a size such as 5GB or 512MiB, found {text!r}")
    return size


def show_size(nbytes: float) -> str:
    """Size in decimal units, as on model hubs: `71.90 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key under which `layers.2` comes before `layers.10`; ids come before words."""
    module, dot, last = name.rpartition(".")
    return (*_module_key(module), _part_key(last)) if dot else (_part_key(last),)


@functools.lru_cache(maxsize=4096)
def _module_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Key of a module, whose tensors are asked for one after the other."""
    return tuple(map(_part_key, name.split(".")))


@functools.lru_cache(maxsize=4096)
def _part_key(part: str) -> tuple[bool, int, str]:
    """Key of one part of a name; a checkpoint of 100,000 tensors has a few hundred parts."""
    return (False, int(part), part) if part.isascii() and part.isdigit() else (True, 0, part)


def split(specs: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in the given order up to `max_bytes` of data each; a larger tensor has a shard of its own."""
    shards: list[list[TensorSpec]] = []
    filled = 0
    for spec in specs:
        nbytes = spec.nbytes
        if not shards or (filled and filled + nbytes > max_bytes):
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """`model.safetensors` for one shard, else `model-0000i-of-0000n.safetensors`."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


# -- collecting --------------------------------------------------------------------------------------------------------
# Making many values without looks for cyclic garbage.
#
# A plan of 72 GB is a million small frozen values that hold no cycle. While they are made, the interpreter looks
# through all of them for cycles again and again, which takes longer than making them.


_MANY_OBJECTS: Final = 100_000  # those of a plan of some ten thousand tensors


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Look for no cycles meanwhile; also a decorator. For short work on values: tensors may be held in cycles."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # What was made counts as old, and is not looked through just after; where it is little, asking takes longer.
        if gc.get_count()[0] > _MANY_OBJECTS and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        gc.enable()
