"""Verification of numbers: non-finite values, holes of zeros, and equality with the source, in one pass over the data.

Reads with pread into buffers that are used again: neither a tensor nor a shard is ever held. The only module of this
package that imports numpy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardxform.checkpoint import Checkpoint
from shardxform.errors import CheckpointError
from shardxform.fsio import FileSystem
from shardxform.layout import Layout, Place
from shardxform.run import Progress
from shardxform.tensors import ByteRange, TensorRef
from shardxform.verification.findings import Findings, spans

__all__ = ["CHUNK_BYTES", "Comparison", "Figures", "check_data"]

CHUNK_BYTES: Final = 2 << 20
"""Most bytes of one tensor in memory at a time, per thread and per side; a multiple of every element's width."""

_TASK_BYTES: Final = 32 << 20

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Float:
    """A floating-point dtype as integers: those whose magnitude reaches `limit` are NaN or infinite."""

    unsigned: str
    signed: str
    limit: int

    @property
    def nbytes(self) -> int:
        return int(self.unsigned[-1])

    @property
    def sign(self) -> int:
        return 1 << (8 * self.nbytes - 1)


_FLOATS: Final[Mapping[str, _Float]] = {
    "BF16": _Float("<u2", "<i2", 0x7F80),
    "F16": _Float("<u2", "<i2", 0x7C00),
    "F32": _Float("<u4", "<i4", 0x7F80_0000),
    "F64": _Float("<u8", "<i8", 0x7FF0_0000_0000_0000),
    "F8_E4M3": _Float("<u1", "<i1", 0x7F),  # has no infinities
    "F8_E5M2": _Float("<u1", "<i1", 0x7C),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The checkpoint whose bytes must be found: `tensors` lie in the shards of `root`."""

    root: Path
    tensors: Mapping[str, TensorRef]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How much was looked at."""

    bytes_scanned: int = 0
    bytes_compared: int = 0
    tensors_compared: int = 0
    tensors_differing: int = 0


@dataclass(slots=True)
class _Job:
    """One tensor to read: how to scan it, what to hold it against, and what was found so far.

    `slab` is the size in bytes of what must not be all zero: an expert of a fused tensor, else the whole.
    """

    ref: TensorRef
    place: Place | None
    scan: _Float | None
    other: TensorRef | None
    slab: int
    nonzero: NDArray[np.bool_]
    bad: int = 0
    first_bad: int = -1
    differing: int = 0
    first_differing: int = -1


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes `start`..`stop` of a job's tensor."""

    job: _Job
    start: int
    stop: int


@dataclass(slots=True)
class _Seen:
    """What one piece showed; positions are counted from the tensor's start, elements or bytes."""

    piece: _Piece
    nonzero: NDArray[np.bool_] | None = None
    bad: int = 0
    first_bad: int = -1
    differing: int = 0
    first_differing: int = -1


@dataclass(slots=True)
class _Result:
    """What one task showed; `error` when the output could not be read on."""

    nbytes: int
    seen: list[_Seen] = field(default_factory=list)
    error: str = ""


def check_data(
    out: Checkpoint,
    layout: Layout | None,
    comparison: Comparison | None,
    findings: Findings,
    *,
    jobs: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
) -> Figures:
    """Scan every float tensor of `out`, and compare every tensor that `comparison` has in the same dtype and shape.

    Raises:
        CheckpointError: the source cannot be read.

    """
    table = list(_jobs(out, layout, comparison))
    total = sum(job.ref.nbytes for job in table)
    reader = _Reader(out.root, comparison.root if comparison else None)
    done = 0
    errors: dict[str, None] = {}
    for result in _in_parallel(reader.examine, _tasks(table), jobs, reader.stop):
        for seen in result.seen:
            _merge(seen)
        if result.error:
            errors[result.error] = None
        done += result.nbytes
        if on_progress:
            on_progress(Progress(done, total, 0))
    for error in errors:
        where, _, message = error.partition(": ")
        findings.problem("unreadable", where, message)
    for job in table:
        _report(job, findings)
    compared = [job for job in table if job.other]
    return Figures(
        bytes_scanned=sum(job.ref.nbytes for job in table if job.scan),
        bytes_compared=sum(job.ref.nbytes for job in compared),
        tensors_compared=len(compared),
        tensors_differing=sum(job.differing > 0 for job in compared),
    )


# -- what to do ---------------------------------------------------------------------------------------------------


def _jobs(out: Checkpoint, layout: Layout | None, comparison: Comparison | None) -> Iterator[_Job]:
    """Tensors worth reading, in the order of their bytes."""
    for name, ref in out.tensors.items():
        other = comparison.tensors.get(name) if comparison else None
        if other is not None and (other.spec.dtype, other.spec.shape) != (ref.spec.dtype, ref.spec.shape):
            other = None
        scan = _FLOATS.get(ref.spec.dtype)
        if not ref.nbytes or not (scan or other):
            continue
        place = layout.places.get(name) if layout else None
        fused = scan and place and place.template.variant == "fused" and len(ref.spec.shape) > 1
        slab = ref.nbytes // ref.spec.shape[0] if fused else ref.nbytes
        yield _Job(ref, place, scan, other, slab, np.zeros(ref.nbytes // slab, np.bool_))


def _tasks(jobs: Iterable[_Job]) -> Iterator[list[_Piece]]:
    """Pieces in runs of about `_TASK_BYTES`."""
    task: list[_Piece] = []
    room = _TASK_BYTES
    for job in jobs:
        for piece in _pieces(job):
            task.append(piece)
            room -= piece.stop - piece.start
            if room <= 0:
                yield task
                task, room = [], _TASK_BYTES
    if task:
        yield task


def _pieces(job: _Job) -> Iterator[_Piece]:
    """Cut a tensor so that no piece holds more than `CHUNK_BYTES`, and whole slabs or a part of one."""
    total, slab = job.ref.nbytes, job.slab
    if slab <= CHUNK_BYTES:
        step = CHUNK_BYTES // slab * slab
        yield from (_Piece(job, start, min(start + step, total)) for start in range(0, total, step))
        return
    for home in range(0, total, slab):
        for start in range(home, home + slab, CHUNK_BYTES):
            yield _Piece(job, start, min(start + CHUNK_BYTES, home + slab))


def _in_parallel(
    work: Callable[[list[_Piece]], _Result], tasks: Iterator[list[_Piece]], jobs: int, stop: threading.Event
) -> Iterator[_Result]:
    """Results of `work`, as they come, at most two tasks per thread waiting."""
    pending: set[Future[_Result]] = set()
    with ThreadPoolExecutor(jobs, thread_name_prefix="verify") as pool:
        try:
            while True:
                while len(pending) < 2 * jobs and (task := next(tasks, None)) is not None:
                    pending.add(pool.submit(work, task))
                if not pending:
                    return
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        finally:
            stop.set()


# -- doing it -----------------------------------------------------------------------------------------------------


class _Reader:
    """Reads and examines pieces; one pair of buffers per thread."""

    def __init__(self, out: Path, source: Path | None) -> None:
        self._fs = FileSystem()
        self._out = out
        self._source = source
        self._local = threading.local()
        self.stop = threading.Event()

    def examine(self, task: list[_Piece]) -> _Result:
        """Examine every piece of a task; what cannot be read ends it."""
        result = _Result(sum(piece.stop - piece.start for piece in task))
        files: dict[tuple[Path, str], int] = {}
        try:
            for piece in task:
                if self.stop.is_set():
                    break
                result.seen.append(self._piece(piece, files))
        except _UnreadableError as e:
            if e.root != self._out:
                raise CheckpointError(f"{e.root / e.file}: {e}") from e
            result.error = f"{e.file}: cannot be read: {e}"
        finally:
            for fd in files.values():
                os.close(fd)
        return result

    def _piece(self, piece: _Piece, files: dict[tuple[Path, str], int]) -> _Seen:
        ours, theirs = self._buffers()
        job, count = piece.job, piece.stop - piece.start
        seen = _Seen(piece)
        data = self._read(self._out, job.ref, piece, ours[:count], files)
        if job.scan:
            _scan(data, job.scan, min(job.slab, count), seen)
        if job.other and self._source:
            _compare(data, self._read(self._source, job.other, piece, theirs[:count], files), seen)
        return seen

    def _buffers(self) -> tuple[Bytes, Bytes]:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = (np.empty(CHUNK_BYTES, np.uint8), np.empty(CHUNK_BYTES, np.uint8))
        buffers: tuple[Bytes, Bytes] = self._local.buffers
        return buffers

    def _read(
        self, root: Path, ref: TensorRef, piece: _Piece, into: Bytes, files: dict[tuple[Path, str], int]
    ) -> Bytes:
        done = 0
        for part in _window(ref.ranges, piece.start, piece.stop):
            try:
                if (root, part.file) not in files:
                    files[root, part.file] = self._fs.open(root / part.file, os.O_RDONLY)
                target = into.data[done : done + part.length]
                self._fs.read_exact_into(files[root, part.file], target, part.offset)
            except (OSError, EOFError) as e:
                raise _UnreadableError(root, part.file, e) from e
            done += part.length
        return into


class _UnreadableError(Exception):
    """A shard could not be read."""

    def __init__(self, root: Path, file: str, error: OSError | EOFError) -> None:
        super().__init__((error.strerror if isinstance(error, OSError) else "") or str(error))
        self.root = root
        self.file = file


def _window(ranges: Sequence[ByteRange], start: int, stop: int) -> Iterator[ByteRange]:
    """Bytes `start`..`stop` of the concatenation of `ranges`."""
    home = 0
    for piece in ranges:
        begin, end = max(start, home), min(stop, home + piece.length)
        if begin < end:
            yield ByteRange(piece.file, piece.offset + begin - home, end - begin)
        home += piece.length
        if home >= stop:
            return


def _scan(data: Bytes, kind: _Float, slab: int, seen: _Seen) -> None:
    """Look for NaN, infinities and zeros; rows of the reductions are slabs.

    Two reductions without a copy: as unsigned integers the largest is the largest negative number in magnitude, as
    signed ones the largest positive.
    """
    bits = data.view(kind.unsigned)
    slabs = bits.reshape(-1, slab // kind.nbytes)
    negative = slabs.max(axis=1)
    positive = slabs.view(kind.signed).max(axis=1)
    seen.nonzero = (negative > kind.sign) | (positive > 0)
    if (negative >= kind.sign + kind.limit).any() or (positive >= kind.limit).any():
        bad = (bits & (kind.sign - 1)) >= kind.limit
        seen.bad = int(np.count_nonzero(bad))
        seen.first_bad = seen.piece.start // kind.nbytes + int(bad.argmax())


def _compare(data: Bytes, other: Bytes, seen: _Seen) -> None:
    wide = "<u8" if len(data) % 8 == 0 else "<u1"
    if not np.array_equal(data.view(wide), other.view(wide)):
        differing = data != other
        seen.differing = int(np.count_nonzero(differing))
        seen.first_differing = seen.piece.start + int(differing.argmax())


def _merge(seen: _Seen) -> None:
    """Add what a piece showed to its job; pieces come in any order."""
    job, start = seen.piece.job, seen.piece.start
    if seen.nonzero is not None:
        first = start // job.slab
        job.nonzero[first : first + len(seen.nonzero)] |= seen.nonzero
    job.bad += seen.bad
    job.first_bad = _earlier(job.first_bad, seen.first_bad)
    job.differing += seen.differing
    job.first_differing = _earlier(job.first_differing, seen.first_differing)


def _earlier(one: int, other: int) -> int:
    return max(one, other) if min(one, other) < 0 else min(one, other)


# -- saying it ----------------------------------------------------------------------------------------------------


def _report(job: _Job, findings: Findings) -> None:
    ref, name = job.ref, job.ref.name
    if job.bad and job.scan:
        expert = _expert(job, job.first_bad * job.scan.nbytes)
        elements = ref.nbytes // job.scan.nbytes
        text = f"{job.bad} of {elements} values are NaN or infinite, the first at {job.first_bad}{expert}"
        findings.problem("not-finite", name, text)
    if job.differing:
        text = f"{job.differing} of {ref.nbytes} bytes differ from the source, the first at {job.first_differing}"
        findings.problem("source-bytes", name, text + _expert(job, job.first_differing))
    if not job.scan or len(ref.spec.shape) < 2 or job.nonzero.all():
        return
    zeros = [int(i) for i in np.flatnonzero(~job.nonzero)]
    some = len(job.nonzero) > 1 and len(zeros) < len(job.nonzero)
    what = f"expert{'s' * (len(zeros) > 1)} {spans(zeros)}: " if some else ""
    findings.warn("zero", name, f"{what}every value is zero, as in a hole that was never written")


def _expert(job: _Job, byte: int) -> str:
    """Name the expert that a byte of the tensor belongs to, where dim 0 counts experts."""
    if job.place is None or not job.place.template.sliced or not job.ref.spec.shape:
        return ""
    return f" (expert {byte // (job.ref.nbytes // job.ref.spec.shape[0])})"
