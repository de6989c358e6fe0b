"""What runs of a tensor's bytes show: non-finite values, zeros, differences, and parts of quantized weights gone wrong.

Pure functions over bytes as they were read; what they return counts elements from the tensor's start. Every piece of a
tensor can be looked at by itself, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.formats.encoding import Role
from shardxform.formats.grid import Grid
from shardxform.formats.packing import decode

__all__ = [
    "FLOATS",
    "Bytes",
    "Fault",
    "FloatBits",
    "PartRule",
    "code_sum",
    "difference",
    "merged",
    "part_faults",
    "scan",
]

Bytes = NDArray[np.uint8]

_SMALLEST_SCALE: Final = np.float32(1e-5)
"""Below it a scale is a denormal that no tool writes on purpose; auto-round and we clamp there."""


@dataclass(frozen=True, slots=True)
class FloatBits:
    """A floating-point dtype as integers: those whose magnitude reaches `limit` are NaN or infinite."""

    unsigned: str
    signed: str
    limit: int

    @property
    def nbytes(self) -> int:
        """Width of a value."""
        return int(self.unsigned[-1])

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (8 * self.nbytes - 1)


FLOATS: Final[Mapping[str, FloatBits]] = {
    "BF16": FloatBits("<u2", "<i2", 0x7F80),
    "F16": FloatBits("<u2", "<i2", 0x7C00),
    "F32": FloatBits("<u4", "<i4", 0x7F80_0000),
    "F64": FloatBits("<u8", "<i8", 0x7FF0_0000_0000_0000),
    "F8_E4M3": FloatBits("<u1", "<i1", 0x7F),  # has no infinities
    "F8_E5M2": FloatBits("<u1", "<i1", 0x7C),
}


def scan(data: Bytes, kind: FloatBits, slab: int) -> tuple[NDArray[np.bool_], int, int]:
    """Look for NaN, infinities and zeros.

    Two reductions without a copy: as unsigned integers the largest is the largest negative number in magnitude, as
    signed ones the largest positive.

    Returns:
        whether each slab of so many bytes has a value that is not zero; the number of non-finite values; the position
        of the first of them in `data`, or -1.

    """
    bits = data.view(kind.unsigned)
    slabs = bits.reshape(-1, slab // kind.nbytes)
    negative = slabs.max(axis=1)
    positive = slabs.view(kind.signed).max(axis=1)
    nonzero: NDArray[np.bool_] = (negative > kind.sign) | (positive > 0)
    if not ((negative >= kind.sign + kind.limit).any() or (positive >= kind.limit).any()):
        return nonzero, 0, -1
    bad = (bits & (kind.sign - 1)) >= kind.limit
    return nonzero, int(np.count_nonzero(bad)), int(bad.argmax())


def difference(data: Bytes, other: Bytes) -> tuple[int, int]:
    """Count differing bytes; also the position of the first, or -1."""
    wide = "<u8" if len(data) % 8 == 0 else "<u1"
    if np.array_equal(data.view(wide), other.view(wide)):
        return 0, -1
    differing = data != other
    return int(np.count_nonzero(differing)), int(differing.argmax())


# -- parts of quantized weights -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartRule:
    """What a stored part of a quantized weight [O, I] is held against; `bf16_exact` is about its scales."""

    role: Role
    dtype: str
    shape: tuple[int, int]
    grid: Grid
    bf16_exact: bool


@dataclass(frozen=True, slots=True)
class Fault:
    """Elements of one tensor that are wrong in one way; `found` and `wanted` are those of the first."""

    code: str
    what: str
    count: int
    first: int
    found: str
    wanted: str = ""


def merged(one: Fault | None, other: Fault) -> Fault:
    """What two runs of one tensor showed of one kind."""
    if one is None:
        return other
    first = one if one.first <= other.first else other
    return replace(first, count=one.count + other.count)


def part_faults(data: Bytes, rule: PartRule, start: int) -> Iterator[Fault]:
    """Faults in a run of a part's bytes that begins at byte `start`."""
    if rule.role == "zeros":
        words = data.view("<u4")
        zero = 0x77777777 if rule.grid.bits == 4 else 0x7F7F7F7F
        at = words != zero
        yield from _fault("qzeros", "zero points are not those of a symmetric weight", at, start // 4, words, zero)
    elif rule.role == "g_idx":
        groups, first = data.view("<i4"), start // 4
        wanted = np.arange(first, first + groups.size) // rule.grid.span(rule.shape[1])
        yield from _fault(
            "g-idx", "columns are not in the group of their place", groups != wanted, first, groups, wanted
        )
    elif rule.role == "shape":
        sizes, first = data.view("<i8"), start // 8
        wanted = np.array(rule.shape)[first : first + sizes.size]
        yield from _fault("weight-shape", "sizes are not the weight's", sizes != wanted, first, sizes, wanted)
    elif rule.role == "scales":
        yield from _scale_faults(data.view("<u2"), rule, start // 2)


_BYTES: Final = np.uint64(0x0F0F0F0F0F0F0F0F)
_PAIRS: Final = np.uint64(0x00FF00FF00FF00FF)
_ROW: Final = 128  # words of eight bytes, the pairs of which sum up to 128 * 2 * 255 < 2^16
_BLOCK: Final = 64 * _ROW  # words that stay in the cache


def code_sum(data: Bytes, bits: int) -> int:
    """Sum of the codes, of 4 or 8 bits, in a run of whole words; four lanes of 16 bits are summed at a time."""
    whole = len(data) // (8 * _ROW) * _ROW
    words = data[: 8 * whole].view("<u8")
    total = 0
    for start in range(0, whole, _BLOCK):
        x = words[start : start + _BLOCK]
        if bits == 4:
            x = (x & _BYTES) + ((x >> np.uint64(4)) & _BYTES)
        x = (x & _PAIRS) + ((x >> np.uint64(8)) & _PAIRS)
        total += int(x.reshape(-1, _ROW).sum(axis=1).view("<u2").sum(dtype=np.int64))
    rest = data[8 * whole :]
    return total + int((rest if bits == 8 else (rest & 15) + (rest >> 4)).sum(dtype=np.int64))


def _scale_faults(bits: NDArray[np.uint16], rule: PartRule, start: int) -> Iterator[Fault]:
    values = decode(bits, rule.dtype)
    finite = np.isfinite(values)  # the others are found as all non-finite floats are
    small = finite & (np.abs(values) < _SMALLEST_SCALE)
    yield from _fault("scale", "scales are zero, or below 1e-05 in magnitude", small, start, values)
    if rule.bf16_exact and rule.dtype == "F16":
        lost = finite & ((values.view(np.uint32) & 0xFFFF) != 0)
        yield from _fault("scale-grid", "scales are off the bf16 grid that the record promises", lost, start, values)


def _fault(
    code: str,
    what: str,
    at: NDArray[np.bool_],
    start: int,
    found: NDArray[Any],
    wanted: NDArray[Any] | int | None = None,
) -> Iterator[Fault]:
    if not at.any():
        return
    first = int(at.argmax())
    if isinstance(wanted, int):
        yield Fault(code, what, int(at.sum()), start + first, f"0x{int(found[first]):08X}", f"0x{wanted:08X}")
        return
    expected = "" if wanted is None else str(wanted[first])
    yield Fault(code, what, int(at.sum()), start + first, f"{found[first]:.6g}", expected)
