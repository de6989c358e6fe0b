"""What verification does with one tensor of the output, what pieces of it showed, and how that is told.

`data` reads; here is neither a file nor a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.base.digests import tensor_digest
from shardxform.base.tensors import BITS, Remade, TensorRef
from shardxform.formats import packing
from shardxform.formats.encoding import DECODE_TILE, Fault, Opener, Read, Role, Rows, row_tiles
from shardxform.formats.integers import Ints
from shardxform.formats.plain import Plain
from shardxform.formats.remaking import DTYPES, remade_rows, strange_ids
from shardxform.formats.rounding import quantize
from shardxform.formats.scheme import Grid
from shardxform.model.layout import Layout, Place
from shardxform.verification.findings import Findings, Item, spans
from shardxform.verification.healed import HealedTally
from shardxform.verification.judged import JudgedWeight, StoredWeight
from shardxform.verification.parts import Pair, Rule
from shardxform.verification.rounding import Tally
from shardxform.verification.wanted import Derived, HealedWeight

__all__ = [
    "FLOATS",
    "POWERS",
    "Bytes",
    "Digest",
    "EncodedWeight",
    "FloatBits",
    "PartOf",
    "Result",
    "Seen",
    "Task",
    "TensorJob",
    "TensorPiece",
    "WrittenChunk",
    "derived_bytes",
    "differing_bytes",
    "merge",
    "merged_faults",
    "remade_bytes",
    "report_digests",
    "report_faults",
    "report_tensor",
    "scan_floats",
]

# -- values ------------------------------------------------------------------------------------------------------------
# What runs of a tensor's bytes show: non-finite values, zeros, differences; and bytes that follow from the source.
#
# Functions over bytes as they were read; what they return counts elements from the tensor's start. Every piece of a
# tensor can be looked at by itself, in any order. Values that OUT holds, and that are no bytes of the source, are
# worked out again: those that its quantized weights stand for, or 16-bit weights rounded as the record says, or in
# another order.

Bytes = NDArray[np.uint8]

_NOTHING: Final = np.uint16(0xFFFF)  # a NaN, which no dequantized weight is


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

    @property
    def mask(self) -> int:
        """The bits of the magnitude."""
        return self.limit if self.signed == self.unsigned else self.sign - 1


POWERS: Final = FloatBits("<u1", "<u1", 0xFF)
"""Powers of two, which have no sign; the last code is NaN."""

FLOATS: Final[Mapping[str, FloatBits]] = {
    "BF16": FloatBits("<u2", "<i2", 0x7F80),
    "F16": FloatBits("<u2", "<i2", 0x7C00),
    "F32": FloatBits("<u4", "<i4", 0x7F80_0000),
    "F64": FloatBits("<u8", "<i8", 0x7FF0_0000_0000_0000),
    "F8_E4M3": FloatBits("<u1", "<i1", 0x7F),  # has no infinities
    "F8_E5M2": FloatBits("<u1", "<i1", 0x7C),
    "F8_E8M0": POWERS,
}


def scan_floats(data: Bytes, kind: FloatBits, slab: int) -> tuple[NDArray[np.bool_], int, int]:
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
    bad = (bits & kind.mask) >= kind.limit
    return nonzero, int(np.count_nonzero(bad)), int(bad.argmax())


def differing_bytes(data: Bytes, other: Bytes) -> tuple[int, int]:
    """Count differing bytes; also the position of the first, or -1."""
    wide = "<u8" if len(data) % 8 == 0 else "<u1"
    if np.array_equal(data.view(wide), other.view(wide)):
        return 0, -1
    differing = data != other
    return int(np.count_nonzero(differing)), int(differing.argmax())


def merged_faults(one: Fault | None, other: Fault) -> Fault:
    """What two runs of one tensor showed of one kind."""
    if one is None:
        return other
    first = one if one.first <= other.first else other
    return replace(first, count=one.count + other.count)


# -- values that follow from the source -----------------------------------------------------------------------------

# I: input channels, R: rows, over all experts where they are fused.


def derived_bytes(derived: Derived, start: int, stop: int, opener: Opener) -> Bytes:
    """Bytes `start`..`stop - 1` of the tensor, as they must be.

    Args:
        derived: where its values come from.
        start: first byte.
        stop: the byte after the last.
        opener: opens matrices of the source.

    """
    columns = derived.shape[1]
    row = columns * BITS[derived.dtype] // 8
    first, last = start // row, -(-stop // row)
    runs = [_bits(derived, rows, begin, end) for rows, begin, end in _rows(derived, first, last, opener)]
    data = np.concatenate(runs).reshape(-1).view(np.uint8)
    return data[start - first * row : stop - first * row]


def remade_bytes(remade: Remade, start: int, stop: int, read: Read) -> Bytes:
    """Bytes `start`..`stop - 1` of a tensor whose rows are worked out from the source's, as they must be.

    Args:
        remade: how they are.
        start: first byte.
        stop: the byte after the last.
        read: fills an array with the bytes of a tensor of the source.

    """
    source = remade.source
    width = BITS[source.spec.dtype] // 8
    row = width * (len(remade.keep) if remade.what == "columns" else source.spec.shape[1])
    first, last = start // row, -(-stop // row)
    part = source.rows(first, last)
    rows = np.empty(part.spec.shape, f"<i{width}" if remade.what == "ids" else DTYPES[width])
    read(part, rows)
    if remade.what == "ids" and strange_ids(rows, remade.experts).any():
        return np.zeros(stop - start, np.uint8)  # what no step can have written: it is said by the ids themselves
    data = remade_rows(remade, rows).reshape(-1).view(np.uint8)
    return data[start - first * row : stop - first * row]


def _rows(derived: Derived, first: int, last: int, opener: Opener) -> Iterator[tuple[Rows, int, int]]:
    """Tiles of rows `first`..`last - 1` of all sources."""
    home = 0
    for source in derived.sources:
        rows, columns = source.shape
        begin, end = max(first - home, 0), min(last - home, rows)
        if begin < end:
            opened = opener.open(source)
            for start, stop in row_tiles(end - begin, columns, DECODE_TILE):
                yield opened, begin + start, begin + stop
        home += rows


def _bits(derived: Derived, rows: Rows, start: int, stop: int) -> NDArray[Any]:
    """Bits of rows of one source in the tensor's dtype; a NaN where nothing can have been written."""
    if derived.grid is not None:
        values_RI = _rounded(rows, start, stop, derived.grid)
        if values_RI is None:
            return np.full((stop - start, derived.shape[1]), _NOTHING)
        return packing.half_bits_of(values_RI) if derived.dtype == "F16" else packing.bf16_bits_of(values_RI)
    if derived.dtype == "F16" and not derived.moves:
        return packing.half_bits_of(rows.values(start, stop))  # infinite where `convert` would have refused
    return Plain(derived.dtype).bits(rows, start, stop)


def _rounded(rows: Rows, start: int, stop: int, grid: Grid) -> NDArray[np.float32] | None:
    """What rounding makes of rows; None where it refuses."""
    bits_RI, dtype = rows.raw(start, stop)
    again, stats = quantize(bits_RI, dtype, grid, layout="row")
    if not stats.ok:
        return None
    codes_RI = packing.unpack(again.words, grid.bits, "row")
    return packing.dequantize(codes_RI, again.scales, grid.bits, grid.group_size)


# -- jobs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartOf:
    """Which part of a quantized weight [O, I] a tensor is; with the scales of the same, where they determine it."""

    role: Role
    encoding: Ints
    shape: tuple[int, int]
    scales: TensorRef | None = None


@dataclass(slots=True)
class TensorJob:
    """One tensor to read: how to scan it, what to hold it against, and what was found so far.

    `slab` is the size in bytes of what must not be all zero: an expert of a fused tensor, else the whole. `part` is
    for parts of quantized weights; `other` holds the very bytes, `derived` what they are worked out from. `experts` is
    how many there are, where config.json agrees with its shape. `codes` is their sum, in words of a quantized weight.
    """

    ref: TensorRef
    place: Place | None
    scan: FloatBits | None
    other: TensorRef | None
    slab: int
    nonzero: NDArray[np.bool_]
    part: PartOf | None = None
    derived: Derived | None = None
    experts: int = 0
    bad: int = 0
    first_bad: int = -1
    differing: int = 0
    first_differing: int = -1
    faults: dict[str, Fault] = field(default_factory=dict)
    codes: int = 0


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Bytes `start`..`stop` of a job's tensor."""

    job: TensorJob
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many they are."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class WrittenChunk:
    """Bytes `start`..`stop` of a tensor, a chunk of which the record has a digest; `number` counts the chunks."""

    ref: TensorRef
    number: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many they are."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """A quantized weight to hold against the source's."""

    pair: Pair
    rule: Rule

    @property
    def nbytes(self) -> int:
        """Of the weight in the source."""
        return self.pair.source.storage.nbytes


Task = Sequence[TensorPiece | EncodedWeight | WrittenChunk | HealedWeight | StoredWeight]


@dataclass(frozen=True, slots=True)
class Digest:
    """What a chunk's digest is now, 32 bytes."""

    tensor: str
    number: int
    digest: bytes


@dataclass(slots=True)
class Seen:
    """What one piece showed; positions are counted from the tensor's start, elements or bytes."""

    piece: TensorPiece
    nonzero: NDArray[np.bool_] | None = None
    bad: int = 0
    first_bad: int = -1
    differing: int = 0
    first_differing: int = -1
    faults: tuple[Fault, ...] = ()
    codes: int = 0


@dataclass(slots=True)
class Result:
    """What one task showed; `error` when the output could not be read on."""

    nbytes: int
    seen: list[Seen | Tally | Digest | HealedTally | JudgedWeight] = field(default_factory=list)
    error: str = ""


def merge(seen: Seen) -> None:
    """Add what a piece showed to its job; pieces come in any order."""
    job, start = seen.piece.job, seen.piece.start
    if seen.nonzero is not None:
        first = start // job.slab
        job.nonzero[first : first + len(seen.nonzero)] |= seen.nonzero
    job.bad += seen.bad
    job.codes += seen.codes
    job.first_bad = _earlier(job.first_bad, seen.first_bad)
    job.differing += seen.differing
    job.first_differing = _earlier(job.first_differing, seen.first_differing)
    for fault in seen.faults:
        job.faults[fault.code] = merged_faults(job.faults.get(fault.code), fault)


def _earlier(one: int, other: int) -> int:
    return max(one, other) if min(one, other) < 0 else min(one, other)


# -- saying it ----------------------------------------------------------------------------------------------------


def report_tensor(job: TensorJob, findings: Findings) -> None:
    """Say what a tensor showed; faults of parts of quantized weights apart."""
    ref, name = job.ref, job.ref.name
    if job.bad and job.scan:
        expert = _expert(job, job.first_bad * job.scan.nbytes)
        elements = ref.nbytes // job.scan.nbytes
        text = f"{job.bad} of {elements} values are NaN or infinite, the first at {job.first_bad}{expert}"
        findings.problem("not-finite", name, text)
    if job.differing:
        text = f"{job.differing} of {ref.nbytes} bytes differ from {_made(job)}, the first at {job.first_differing}"
        findings.problem("source-bytes", name, text + _expert(job, job.first_differing))
    words = job.part is not None and job.part.role == "words"
    if job.part and words and job.nonzero.any():
        encoding = job.part.encoding
        if text := encoding.off_centre(job.codes, ref.nbytes * 8 // encoding.grid.bits, job.part.shape[1]):
            findings.problem("off-centre", name, text)
    if not (job.scan or words) or len(ref.spec.shape) < 2 or job.nonzero.all() or job.faults:
        return
    zeros = [int(i) for i in np.flatnonzero(~job.nonzero)]
    some = len(job.nonzero) > 1 and len(zeros) < len(job.nonzero)
    what = f"expert{'s' * (len(zeros) > 1)} {spans(zeros)}: " if some else ""
    findings.warn("zero", name, f"{what}every value is zero, as in a hole that was never written")


def report_digests(recorded: Mapping[str, str], found: Iterable[Digest], findings: Findings) -> frozenset[str]:
    """Name tensors that are not, to the bit, what was written; the others were digested and are."""
    parts: dict[str, dict[int, bytes]] = {}
    for each in found:
        parts.setdefault(each.tensor, {})[each.number] = each.digest
    same: set[str] = set()
    for name, chunks in parts.items():
        if tensor_digest([chunks[number] for number in sorted(chunks)]) == recorded[name]:
            same.add(name)
        else:
            findings.problem("digest", name, "not the bytes that were written: its digest is not the record's")
    return frozenset(same)


def report_faults(table: Iterable[TensorJob], layout: Layout | None, findings: Findings) -> None:
    """Parts of quantized weights that are wrong; many in one way are told in one line."""
    items: list[Item] = []
    for job in table:
        for fault in job.faults.values():
            shape = job.ref.spec.shape
            at = [int(i) for i in np.unravel_index(fault.first, shape)]
            expected = f", expected {fault.wanted}" if fault.wanted else ""
            text = f"{fault.count} of {np.prod(shape)} {fault.what}, the first at {at}: {fault.found}{expected}"
            if job.place:
                items.append(Item(fault.code, job.ref.name, job.place, text))
            else:
                findings.problem(fault.code, job.ref.name, text)
    findings.items(items, layout.num_experts if layout else 0)


def _made(job: TensorJob) -> str:
    if job.derived is None:
        return "the source"
    return "the source rounded again and dequantized" if job.derived.grid else "the source dequantized"


def _expert(job: TensorJob, byte: int) -> str:
    """Name the expert that a byte of the tensor belongs to, where a dimension counts experts."""
    slicing = job.place.template.slicing if job.place else None
    if slicing is None or len(job.ref.spec.shape) <= slicing.axis or not job.experts:
        return ""
    element = byte * 8 // BITS[job.ref.spec.dtype]
    at = int(np.unravel_index(element, job.ref.spec.shape)[slicing.axis])
    try:
        expert = at // slicing.per_expert(job.ref.spec.shape[slicing.axis], job.experts)
    except (ValueError, ZeroDivisionError):  # of another count, which is told of its shape
        return ""
    return f" (expert {expert})" if expert < job.experts else ""
