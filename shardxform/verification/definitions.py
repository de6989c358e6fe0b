"""Numbers by the definitions of their formats, for `independent`: what is stored, what it stands for, and rounding.

Nothing here is shared with what writes outputs; it is written to be checked by reading.
"""

# O: rows of a weight, I: its columns, G: groups of a row, R: a run of rows.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SMALL",
    "Moved",
    "Narrowed",
    "PackedWeight",
    "Shifted",
    "Small",
    "StoredBytes",
    "floats",
    "nearest_bf16",
    "nearest_half",
    "rounded_to_grid",
]

SMALL: Final = ("F8_E4M3", "F8_E5M2", "U8", "I8")
"""Dtypes of small floats; of the last two, a byte holds two of four bits."""

_SMALLEST: Final = np.float32(np.float16(1e-5))  # of a scale, auto-round's


_RUN: Final = 1 << 18  # elements at a time
_ROUNDED_TOO: Final = 1.5  # times the steps of healing, for what rounding adds
_TYPES: Final = {"BF16": "<u2", "F16": "<u2", "F32": "<u4", "F64": "<u8", "I32": "<i4", "I64": "<i8"}
_WIDTHS: Final = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def slab(self, index: int) -> StoredBytes:
        """One of what its first dimension counts."""
        length = self.count // self.shape[0] * np.dtype(self._code).itemsize
        return replace(self, shape=self.shape[1:], begin=self.begin + index * length)

    @property
    def _code(self) -> str:
        return _TYPES.get(self.dtype, f"<u{_WIDTHS.get(self.dtype, 1)}")

    def array(self) -> NDArray[Any]:
        """Its bits, mapped: [rows, columns], rows counted over all dimensions but the last."""
        code = self._code
        shape = (
            (int(np.prod(self.shape[:-1])), self.shape[-1]) if len(self.shape) > 1 else (int(np.prod(self.shape)), 1)
        )
        if 0 in shape:
            return np.zeros(shape, code)
        return np.memmap(self.file, code, "r", self.begin, shape)


class Beside:
    """Weights whose steps in healing are of one size: the inner projections of an expert, or any other by itself."""

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        self._weights = weights

    @cached_property
    def size(self) -> float:
        """The root of the sum of their squares, which are read when this is asked for."""
        runs = ((weight, start, stop) for weight in self._weights for start, stop in weight.runs())
        squares = (np.square(weight.values(start, stop), dtype=np.float64) for weight, start, stop in runs)
        return math.sqrt(math.fsum(float(each.sum()) for each in squares))


class Experts:
    """The same projections of all experts of a block, one or several of which a merged expert is a mean of."""

    def __init__(self, each: Sequence[Beside]) -> None:
        self._each = each

    @cached_property
    def largest(self) -> float:
        """Size of the largest: no mean of some of them is larger, in whatever order their channels are."""
        return max(each.size for each in self._each)


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """How far healing, and merging before it, can have taken a weight.

    Attributes:
        reach: sum of the steps, each a part of the root mean square of what is `beside`.
        beside: the weight, and those that have one root mean square with it.
        merged: experts of which it may be a mean; None where that is not so.

    """

    reach: float
    beside: Beside
    merged: Experts | None = None

    def farthest(self, size: float) -> float:
        """Most that its distance from a source's weight of that size can be, rounded too; reads weights.

        What healing leaves is nearer to that than zero is, or within its steps where these are large.
        """
        steps = _ROUNDED_TOO * self.reach
        if self.merged is None:
            return max(size, steps * self.beside.size)
        return size + max(2.0, 1 + steps) * self.merged.largest


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Rows `rows`, each first and number, of a tensor; of words that hold `bits` each, with scales, where quantized.

    With a `slab`, an index of the first dimension and a first column, its rows are columns of that slab. Of some only
    `columns` are there; with `ids` its values are numbers of experts, of which these stay. Scales of its first row are
    those of row `scaled_from` of theirs. With a `part` it is some of those rows: from the first on, a step apart. With
    `moved` it was healed, and what is written is another weight.
    """

    name: str
    tensor: StoredBytes
    shape: tuple[int, ...]
    rows: Rows
    scales: StoredBytes | None = None
    bits: int = 0
    group: int = 0
    slab: tuple[int, int] | None = None
    columns: tuple[int, ...] | None = None
    ids: tuple[int, ...] | None = None
    scaled_from: int = 0
    part: tuple[int, int] | None = None
    moved: Moved | None = None

    @property
    def decoded(self) -> bool:
        """Whether its values are worked out from small floats."""
        return False

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        rows = self.shape[0] if self.part else sum(number for _, number in self.rows)
        return rows, self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def _chosen(self) -> slice:
        """Which of the rows it is."""
        if self.part is None:
            return slice(None)
        first, step = self.part
        return slice(first, first + self.shape[0] * step, step)

    def runs(self) -> Iterator[tuple[int, int]]:
        """First row and the one after the last of runs that fit into memory."""
        step = max(1, _RUN // max(self.size[1], 1))
        return ((start, min(start + step, self.size[0])) for start in range(0, self.size[0], step))

    def _picked(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.concatenate([np.arange(first, first + number) for first, number in self.rows])[self._chosen][
            start:stop
        ]

    def bits_of(self, start: int, stop: int) -> NDArray[Any]:
        """Bits of a run of rows of a plain weight."""
        if self.slab is not None:
            index, first = self.slab
            whole = self.tensor.array().reshape(self.tensor.shape)[index]
            columns = whole[..., first : first + sum(number for _, number in self.rows)][..., self._chosen]
            return np.ascontiguousarray(columns.T if whole.ndim > 1 else columns[:, None])[start:stop]
        found = np.asarray(self.tensor.array()[self._picked(start, stop)])
        if self.ids is not None:
            return np.array([_renumbered_row(row, self.ids) for row in found.tolist()], found.dtype)
        return found if self.columns is None else found[:, list(self.columns)]

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """A run of rows, of a quantized weight each code times its scale."""
        if self.scales is not None:
            codes, scale = self.codes(start, stop)
            return np.asarray(codes.astype(np.float32) * scale)
        return floats(self.bits_of(start, stop), self.tensor.dtype)

    def codes(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Codes less the zero point [R, I], and the scale of each [R, I], of a run of rows of a quantized weight."""
        assert self.scales is not None
        rows, words, scales = self._picked(start, stop), self.tensor.array(), self.scales.array()
        if self.name.endswith("qweight"):
            words, scales = words.T, scales.T
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
        packed = np.ascontiguousarray(words[rows]).view(np.uint32)
        codes = ((packed[:, :, None] >> shifts) & np.uint32(2**self.bits - 1)).reshape(len(rows), -1)
        spread = np.repeat(
            floats(np.ascontiguousarray(scales[rows + self.scaled_from]), self.scales.dtype), self.group, axis=1
        )
        return codes.astype(np.int32) - 2 ** (self.bits - 1), spread[:, : codes.shape[1]]


_NIBBLES: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # which of a word of AWQ's holds the first row of eight, the second, ...


@dataclass(frozen=True, slots=True)
class Shifted(PackedWeight):
    """Rows of a weight of integers whose zero points are stored, and perhaps the group of each column.

    Words run along columns, and those of zero points along rows, eight rows of four bits in one; AWQ's run along rows
    both, which take turns in them. `less` is what was taken from zero points when they were stored.
    """

    zeros: StoredBytes | None = None
    groups: StoredBytes | None = None
    awq: bool = False
    less: int = 0

    def codes(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Codes less the zero point of their group [R, I], and the scale of each [R, I]."""
        assert self.scales is not None
        assert self.zeros is not None
        rows, columns = self._picked(start, stop), self.size[1]
        beside = self.name.endswith("qweight")  # zero points and scales are stored [G, O], else [O, G]
        zero_RG = self._across(np.asarray(self.zeros.array()).T if not beside else self.zeros.array(), rows)
        scale = np.asarray(self.scales.array())
        scale_RG = floats(np.ascontiguousarray((scale.T if beside else scale)[rows]), self.scales.dtype)
        of_I = np.arange(columns) // self.group if self.groups is None else self.groups.array()[:, 0].astype(np.int64)
        if self.awq:
            code_RI = self._across(self.tensor.array(), rows)
        else:
            words = np.asarray(self.tensor.array())
            packed = np.ascontiguousarray((words.T if beside else words)[rows]).view(np.uint32)
            shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
            code_RI = (packed[:, :, None] >> shifts & np.uint32(2**self.bits - 1)).reshape(len(rows), -1)
        zero_RI = (zero_RG.astype(np.int64) + self.less)[:, of_I]
        return (code_RI[:, :columns].astype(np.int64) - zero_RI).astype(np.int32), scale_RG[:, of_I]

    def _across(self, words: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Of words [N, O / 8] along rows what they hold for some of these [R, N]."""
        count = 32 // self.bits
        place = np.array(_NIBBLES)[rows % 8] if self.awq else rows % count
        picked = np.ascontiguousarray(words[:, rows // count]).view(np.uint32).T
        return np.asarray(picked >> (self.bits * place).astype(np.uint32)[:, None] & np.uint32(2**self.bits - 1))


@dataclass(frozen=True, slots=True)
class Small(PackedWeight):
    """Rows of a weight of small floats: scales, of blocks where it has some, and what multiplies or divides them.

    Its codes may lie transposed, [I, O], and so may its scales; with `whole_bytes` they are integers with a sign.
    """

    factors: StoredBytes | None = None
    block: tuple[int, int] | None = None
    times: StoredBytes | None = None
    over: StoredBytes | None = None
    turned: bool = False
    scales_turned: bool = False
    whole_bytes: bool = False

    @property
    def decoded(self) -> bool:
        """As its class is for."""
        return True

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """A run of rows, by the definition of the format."""
        assert self.factors is not None
        rows, tensor = self._picked(start, stop), self.tensor
        total = math.prod(tensor.shape[: 2 if len(tensor.shape) == 4 else -1])
        bits = tensor.array().T if self.turned else tensor.array().reshape(total, -1)
        codes = np.ascontiguousarray(bits[rows])
        numbers = codes.view(np.int8).astype(np.float32) if self.whole_bytes else small_floats(codes, tensor.dtype)
        scales = floats(np.asarray(self.factors.array()), self.factors.dtype)
        scales = scales.T if self.scales_turned else scales
        for whole in filter(None, (self.times, self.over)):
            size = floats(np.asarray(whole.array()), whole.dtype).reshape(-1)[0]
            scales = scales * size if whole is self.times else scales / size
        return numbers * spread(scales, rows, numbers.shape[1], self.block)


@dataclass(frozen=True, slots=True)
class Narrowed(PackedWeight):
    """Some rows, or some columns, of another weight, however that is stored: those `picked`, in that order."""

    whole: PackedWeight | None = None
    picked: tuple[int, ...] = ()
    axis: int = 0

    @classmethod
    def of(cls, whole: PackedWeight, picked: tuple[int, ...], axis: int) -> Narrowed:
        """Take rows, with `axis` 0, or columns out of a weight."""
        shape = (*whole.shape[:axis], len(picked), *whole.shape[axis + 1 :])
        new = cls(whole.name, whole.tensor, shape, ((0, shape[0]),), whole.scales, whole.bits, whole.group)
        return replace(new, moved=whole.moved, whole=whole, picked=picked, axis=axis)

    @property
    def decoded(self) -> bool:
        """As the whole."""
        return self.whole is not None and self.whole.decoded

    def bits_of(self, start: int, stop: int) -> NDArray[Any]:
        """Bits of a run of rows of a plain weight."""
        assert self.whole is not None
        return self._taken(self.whole.bits_of(*self._run(start, stop)), start, stop)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """A run of rows."""
        assert self.whole is not None
        return self._taken(self.whole.values(*self._run(start, stop)), start, stop)

    def codes(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Codes less the zero point, and the scale of each, of a run of rows of a quantized weight."""
        assert self.whole is not None
        codes, scale = self.whole.codes(*self._run(start, stop))
        return self._taken(codes, start, stop), self._taken(scale, start, stop)

    def _run(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the whole that must be read."""
        rows = self.picked[start:stop]
        return (min(rows), max(rows) + 1) if self.axis == 0 else (start, stop)

    def _taken(self, found: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
        picked = np.array(self.picked if self.axis else self.picked[start:stop])
        return np.asarray(found[:, picked] if self.axis else found[picked - picked.min()])


def _renumbered_row(row: list[int], keep: tuple[int, ...]) -> list[int]:
    """New numbers of the experts of a row: of one that goes, that of the next that stays and is not there yet."""
    there = {number for number in row if number in keep}
    for slot, number in enumerate(row):
        if number not in keep:
            after = [each for each in keep if each > number] + [each for each in keep if each < number]
            row[slot] = next(each for each in after if each not in there)
            there.add(row[slot])
    return [keep.index(number) for number in row]


def small_floats(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """What codes [R, bytes of a row] stand for, before any scale.

    E4M3 and E5M2 have a sign, 4 or 5 bits of exponent with a bias of 7 or 15, and 3 or 2 of the fraction. All bits but
    the sign's set is NaN in the first; the largest exponent is no number in the second. E2M1 has a bias of 1 and is
    always a number; the lower half of a byte comes first.
    """
    codes = bits.view(np.uint8).astype(np.int64)
    if dtype in ("U8", "I8"):
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(len(codes), -1)
        return _float(codes, 1, 1, 3)
    if dtype == "F8_E5M2":
        return np.where(codes & 127 >= 124, np.float32(np.nan), _float(codes, 2, 15, 7))
    return np.where(codes & 127 == 127, np.float32(np.nan), _float(codes, 3, 7, 7))


def _float(codes: NDArray[np.int64], fraction: int, bias: int, sign: int) -> NDArray[np.float32]:
    exponent = (codes >> fraction) & (2 ** (sign - fraction) - 1)
    part = (codes & (2**fraction - 1)) / 2**fraction
    size = np.where(exponent > 0, (1 + part) * 2.0 ** (exponent - bias), part * 2.0 ** (1 - bias))
    return np.asarray(np.where(codes >> sign & 1, -size, size), np.float32)


def spread(
    scales: NDArray[np.float32], rows: NDArray[np.int64], columns: int, block: tuple[int, int] | None
) -> NDArray[np.float32]:
    """The scale of each weight [R, I]: of its block of rows and columns, or else of its row or its share of that."""
    if block is not None:
        return np.asarray(scales[rows[:, None] // block[0], np.arange(columns) // block[1]])
    if scales.size == 1:
        return np.asarray(scales.reshape(1, 1))
    share = columns // scales.shape[1]
    if share * scales.shape[1] != columns:
        raise ValueError(f"{columns} columns with {scales.shape[1]} scales")
    return np.repeat(scales[rows], share, axis=1)


def floats(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Values of bits of a dtype; those of bytes are scales.

    Raises:
        ValueError: another dtype.

    """
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("F16", "F32", "F64"):
        return bits.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float32)
    if dtype in ("U8", "F8_E8M0"):  # powers of two
        return np.where(bits == 255, np.nan, 2.0 ** (bits.astype(np.float64) - 127)).astype(np.float32)
    if dtype == "F8_E4M3":
        return small_floats(bits, dtype)
    raise ValueError(f"{dtype} holds no weights that are understood")


def nearest_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, by the definition: of the two neighbours the one that is nearer."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    below, rest = bits >> np.uint32(16), bits & np.uint32(0xFFFF)
    up = (rest > 0x8000) | ((rest == 0x8000) & (below & np.uint32(1) == 1))
    return np.asarray(below + up, np.uint16)


def nearest_half(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest float16, ties to even: to whole units of the last of 11 bits, 2^-24 at least, in float64."""
    size = np.abs(values.astype(np.float64))
    exponent = np.frexp(np.maximum(size, 2.0**-30))[1]  # of zero, as of all that is smaller than the last unit
    unit = np.ldexp(1.0, np.maximum(exponent - 11, -24))
    steps = np.rint(size / unit)  # to even, as numpy rounds
    normal = np.maximum(exponent + 13, 0) * 1024 + steps  # the leading bit of a normal number adds one to its exponent
    return np.asarray(normal.astype(np.uint16) | np.where(np.signbit(values), 0x8000, 0).astype(np.uint16))


def rounded_to_grid(
    values: NDArray[np.float32], grid: Mapping[str, Any]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Round to nearest: the largest weight of a group goes to the lower end of the range, by the sign of its scale."""
    end, columns = np.float32(2 ** (grid["bits"] - 1)), values.shape[1]
    span = columns if grid["group_size"] == -1 else grid["group_size"]
    groups = values.reshape(len(values), -1, span)
    high, low = np.maximum(groups.max(axis=2), 0), np.maximum(-groups.min(axis=2), 0)
    size = np.maximum(high, low) / end
    if grid["scale_grid"] == "bf16":
        size = floats(nearest_bf16(size), "BF16")
    size = size.astype(np.float16).astype(np.float32)
    scale = np.where((high >= low) & (size > 0), -1, 1).astype(np.float32) * np.maximum(size, _SMALLEST)
    spread = np.repeat(scale, span, axis=1)
    return np.clip(np.rint(values / spread), -end, end - 1).astype(np.int32), spread
