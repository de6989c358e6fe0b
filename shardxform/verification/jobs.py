"""What verification does with one tensor of the output, what pieces of it showed, and how that is told.

`data` reads; here is neither a file nor a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardxform.base.digests import tensor_digest
from shardxform.base.tensors import TensorRef
from shardxform.formats.encoding import Fault, Role
from shardxform.formats.integers import Ints
from shardxform.model.layout import Layout, Place
from shardxform.verification.findings import Findings, Item, spans
from shardxform.verification.parts import Pair, Rule
from shardxform.verification.rounding import Tally
from shardxform.verification.values import FloatBits, merged
from shardxform.verification.wanted import Derived

__all__ = [
    "Digest",
    "PartOf",
    "Result",
    "Seen",
    "Task",
    "TensorJob",
    "TensorPiece",
    "Weight",
    "Written",
    "merge",
    "report_digests",
    "report_faults",
    "report_tensor",
]


@dataclass(frozen=True, slots=True)
class PartOf:
    """Which part of a quantized weight [O, I] a tensor is."""

    role: Role
    encoding: Ints
    shape: tuple[int, int]


@dataclass(slots=True)
class TensorJob:
    """One tensor to read: how to scan it, what to hold it against, and what was found so far.

    `slab` is the size in bytes of what must not be all zero: an expert of a fused tensor, else the whole. `part` is
    for parts of quantized weights; `other` holds the very bytes, `derived` what they are worked out from. `codes` is
    their sum, in words of a quantized weight.
    """

    ref: TensorRef
    place: Place | None
    scan: FloatBits | None
    other: TensorRef | None
    slab: int
    nonzero: NDArray[np.bool_]
    part: PartOf | None = None
    derived: Derived | None = None
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
class Written:
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
class Weight:
    """A quantized weight to hold against the source's."""

    pair: Pair
    rule: Rule

    @property
    def nbytes(self) -> int:
        """Of the weight in the source."""
        return self.pair.source.nbytes


Task = Sequence[TensorPiece | Weight | Written]


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
    seen: list[Seen | Tally | Digest] = field(default_factory=list)
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
        job.faults[fault.code] = merged(job.faults.get(fault.code), fault)


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
    """Name the expert that a byte of the tensor belongs to, where dim 0 counts experts."""
    if job.place is None or not job.place.template.sliced or not job.ref.spec.shape:
        return ""
    return f" (expert {byte // (job.ref.nbytes // job.ref.spec.shape[0])})"
