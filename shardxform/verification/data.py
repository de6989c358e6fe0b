"""Verification of numbers: scans, and equality with the source, in one pass over the data.

Reads with pread into buffers that are used again: neither a 16-bit tensor nor a shard is ever held, and of a quantized
weight its packed parts. Only here and in the modules below it is numpy imported.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from shardxform.base import digests as digesting
from shardxform.base import interrupts
from shardxform.base.file_system import FileSystem, SourceReader
from shardxform.base.interrupts import Completions
from shardxform.base.progress import Progress
from shardxform.base.tensors import ID_DTYPES, ByteRange, TensorRef, TensorSpec
from shardxform.checkpoint.remote.repository import open_source
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError
from shardxform.formats.encoding import Fault, Opener, Read
from shardxform.formats.integers import Ints
from shardxform.formats.packing import code_sum, float32_of
from shardxform.formats.remaking import strange_ids
from shardxform.formats.stored import Stored
from shardxform.model.families.base import Slicing
from shardxform.model.layout import Layout, Place
from shardxform.verification.findings import Findings
from shardxform.verification.healed import HealedTally, examine_healed, near_of, report_healed
from shardxform.verification.jobs import (
    FLOATS,
    POWERS,
    Bytes,
    Digest,
    EncodedWeight,
    PartOf,
    Result,
    Seen,
    Task,
    TensorJob,
    TensorPiece,
    WrittenChunk,
    derived_bytes,
    differing_bytes,
    merge,
    remade_bytes,
    report_digests,
    report_faults,
    report_tensor,
    scan_floats,
)
from shardxform.verification.judged import JudgedWeight, StoredWeight, judge_weight, report_judged
from shardxform.verification.parts import Pair, Rule
from shardxform.verification.rounding import Tally, examine
from shardxform.verification.wanted import Derived, HealedWeight

if TYPE_CHECKING:
    from shardxform.checkpoint.remote.repository import Remote

__all__ = ["CHUNK_BYTES", "Against", "Figures", "check_data", "in_parallel"]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

CHUNK_BYTES: Final = 2 << 20
"""Most bytes of one tensor in memory at a time, per thread and per side; a multiple of every element's width."""

_TASK_BYTES: Final = 32 << 20
_OF_ACTIVATIONS: Final = ("activation_scale", "input_scale", "input_global_scale", "qscale_act")


@dataclass(frozen=True, slots=True)
class Against:
    """What must be found: bytes of `tensors`, what is `derived`, of `shapes`, roundings, and what healing can make."""

    root: Path
    tensors: Mapping[str, TensorRef]
    derived: Mapping[str, Derived] = field(default_factory=dict)
    shapes: Mapping[str, TensorSpec] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    rule: Rule | None = None
    healed: tuple[HealedWeight, ...] = ()
    remote: Remote | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How much was looked at.

    Attributes:
        tallies: one for every weight that was held against the source's.
        tensors_digested: tensors whose digest is the record's.
        compared: tensors of the output whose values were held against the source, in whatever way.
        near: those that healing moved, and that it can have brought there.

    """

    bytes_scanned: int = 0
    bytes_compared: int = 0
    tensors_compared: int = 0
    tensors_differing: int = 0
    tensors_derived: int = 0
    tensors_digested: int = 0
    tallies: tuple[Tally, ...] = ()
    compared: frozenset[str] = frozenset()
    near: frozenset[str] = frozenset()


def check_data(
    out: Checkpoint,
    layout: Layout | None,
    comparison: Against | None,
    findings: Findings,
    *,
    stored: Stored | None = None,
    shards: Checkpoint | None = None,
    digests: Mapping[str, str] | None = None,
    weights: Iterable[StoredWeight] = (),
    only_written: bool = False,
    jobs: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
) -> Figures:
    """Scan every tensor of `out`, and compare with the source what `comparison` has in the same dtype and shape.

    Each of `weights` is read as it is stored.

    With `digests`, those of the record, every tensor that has one is held against it, as it lies in `shards` where that
    is another form of `out`; with `only_written` that is all.

    Raises:
        CheckpointError: the source cannot be read.

    """
    table = [] if only_written else list(_jobs(out, layout, comparison, stored))
    rounded = (
        [EncodedWeight(pair, comparison.rule) for pair in comparison.pairs] if comparison and comparison.rule else []
    )
    healed = comparison.healed if comparison and not only_written else ()
    items = [*_items(out, table, rounded, digests or {}), *healed, *([] if only_written else weights)]
    if shards and shards.tensors.keys() != out.tensors.keys():
        new = (ref for name, ref in shards.tensors.items() if name in (digests or {}) and name not in out.tensors)
        items += [chunk for ref in new for chunk in _chunks(ref)]
    total = sum(item.nbytes for item in items)
    reader = _Reader(out.root, comparison)
    tallies: list[Tally] = []
    moved: list[HealedTally] = []
    written: list[Digest] = []
    judged: list[JudgedWeight] = []
    errors: dict[str, None] = {}
    done = 0
    with interrupts.deferred(), reader:
        for result in in_parallel(reader.examine, _tasks(items), jobs, reader.give_up):
            for seen in result.seen:
                if isinstance(seen, Seen):
                    merge(seen)
                elif isinstance(seen, HealedTally):
                    moved.append(seen)
                elif isinstance(seen, JudgedWeight):
                    judged.append(seen)
                else:
                    tallies.append(seen) if isinstance(seen, Tally) else written.append(seen)
            if result.error:
                errors[result.error] = None
            done += result.nbytes
            if on_progress:
                on_progress(Progress(done, total, 0))
    for error in errors:
        where, _, message = error.partition(": ")
        findings.problem("unreadable", where, message)
    same = report_digests(digests or {}, written, findings)
    for job in table:
        report_tensor(job, findings)
    report_faults(table, layout, findings)
    report_judged(judged, layout, findings)
    report_healed(moved, findings)
    compared = [job for job in table if job.other or job.derived]
    order = {weight.pair.name: at for at, weight in enumerate(rounded)}
    return Figures(
        bytes_scanned=sum(job.ref.nbytes for job in table if job.scan or job.part),
        bytes_compared=sum(job.ref.nbytes for job in compared),
        tensors_compared=len(compared),
        tensors_differing=sum(job.differing > 0 for job in compared),
        tensors_derived=sum(job.derived is not None for job in compared),
        tensors_digested=len(same),
        tallies=tuple(sorted(tallies, key=lambda tally: order[tally.pair.name])),
        compared=frozenset(job.ref.name for job in compared)
        | {ref.name for tally in tallies for _, ref in tally.pair.stored.parts}
        | {ref.name for ref in out.tensors.values() if comparison and _is_empty(ref, comparison)},
        near=near_of(moved),
    )


# -- what to do ---------------------------------------------------------------------------------------------------


def _jobs(
    out: Checkpoint, layout: Layout | None, comparison: Against | None, stored: Stored | None
) -> Iterator[TensorJob]:
    """Tensors worth reading, in the order of their bytes."""
    rules = dict(_parts(stored)) if stored else {}
    examined = {pair.words for pair in comparison.pairs} if comparison else set()
    for name, ref in out.tensors.items():
        other = comparison.tensors.get(name) if comparison else None
        if other is not None and (other.spec.dtype, other.spec.shape) != (ref.spec.dtype, ref.spec.shape):
            other = None
        derived = comparison.derived.get(name) if comparison and _is_derivable(ref, comparison) else None
        kind = FLOATS.get(ref.spec.dtype)
        if ref.spec.dtype == "U8" and ref.name.endswith(("scale", "scales", "scale_inv")):
            kind = POWERS
        part = None if name in examined else rules.get(name)
        place = layout.places.get(name) if layout else None
        ids = place and place.template.ids and ref.spec.dtype in ID_DTYPES
        if not ref.nbytes or not (kind or other or derived or part or ids):
            continue
        experts = _experts_of(ref, place, layout.num_experts) if layout else 0
        fused = kind and place and place.template.variant == "fused" and len(ref.spec.shape) > 1
        slab = ref.nbytes // (experts or ref.spec.shape[0]) if fused else ref.nbytes
        nonzero = np.zeros(ref.nbytes // slab, np.bool_)
        yield TensorJob(ref, place, kind, other, slab, nonzero, part, derived, experts)


def _experts_of(ref: TensorRef, place: Place | None, experts: int) -> int:
    """How many experts the tensor counts or names; 0 where its shape does not say."""
    if place is None or place.template.ids:
        return experts if place and place.template.ids else 0
    slicing = place.template.slicing
    if slicing is None or len(ref.spec.shape) <= slicing.axis:
        return 0
    size = ref.spec.shape[slicing.axis]
    if slicing == Slicing(slicing.axis):
        return size
    fits = size >= experts and (slicing.others or not size % experts)
    return experts if fits else 0


def _is_derivable(ref: TensorRef, comparison: Against) -> bool:
    """Whether a tensor has the dtype and shape of the values that it must hold."""
    derived = comparison.derived.get(ref.name)
    if derived is not None and derived.moves:
        return ref.spec == comparison.shapes[ref.name]
    if derived is None or ref.spec.dtype != derived.dtype or not ref.spec.shape:
        return False
    rows, columns = derived.shape
    return ref.spec.shape[-1] == columns and math.prod(ref.spec.shape[:-1]) == rows


def _is_empty(ref: TensorRef, comparison: Against) -> bool:
    """Whether there is nothing to compare in a tensor that is as it must be."""
    wanted = comparison.tensors.get(ref.name)
    return not ref.nbytes and wanted is not None and wanted.spec == ref.spec


def _parts(stored: Stored) -> Iterator[tuple[str, PartOf]]:
    for module in stored.modules.values():
        assert isinstance(module.encoding, Ints)
        for role, ref in module.parts:
            scales = dict(module.parts)["scales"] if role == "biases" else None
            yield ref.name, PartOf(role, module.encoding, module.whole, scales)


def _items(
    out: Checkpoint, table: Iterable[TensorJob], weights: Iterable[EncodedWeight], digests: Mapping[str, str]
) -> Iterator[TensorPiece | EncodedWeight | WrittenChunk]:
    """Everything to look at; what is read of a tensor for two reasons stands together, so that the disk reads once."""
    jobs = {job.ref.name: job for job in table}
    apart = {ref.name for weight in weights for _, ref in weight.pair.stored.parts}
    for name, ref in out.tensors.items():
        if name in digests and name not in apart:
            yield from _chunks(ref)
        if name in jobs:
            yield from _pieces(jobs[name])
    for weight in weights:
        for _, ref in weight.pair.stored.parts:
            if ref.name in digests:
                yield from _chunks(ref)
        yield weight


def _chunks(ref: TensorRef) -> Iterator[WrittenChunk]:
    """Chunks of a tensor, as digests are taken of; one of an empty tensor, so that it counts."""
    for number, start in enumerate(range(0, max(ref.nbytes, 1), digesting.CHUNK_BYTES)):
        yield WrittenChunk(ref, number, start, min(start + digesting.CHUNK_BYTES, ref.nbytes))


def _tasks(items: Iterable[TensorPiece | EncodedWeight | WrittenChunk | HealedWeight | StoredWeight]) -> Iterator[Task]:
    """Items in runs of about `_TASK_BYTES`."""
    task: list[TensorPiece | EncodedWeight | WrittenChunk | HealedWeight | StoredWeight] = []
    room = _TASK_BYTES
    for item in items:
        task.append(item)
        room -= item.nbytes
        if room <= 0:
            yield task
            task, room = [], _TASK_BYTES
    if task:
        yield task


def _pieces(job: TensorJob) -> Iterator[TensorPiece]:
    """Cut a tensor so that no piece holds more than `CHUNK_BYTES`, and whole slabs or a part of one."""
    total, slab = job.ref.nbytes, job.slab
    if slab <= CHUNK_BYTES:
        step = CHUNK_BYTES // slab * slab
        yield from (TensorPiece(job, start, min(start + step, total)) for start in range(0, total, step))
        return
    for home in range(0, total, slab):
        for start in range(home, home + slab, CHUNK_BYTES):
            yield TensorPiece(job, start, min(start + CHUNK_BYTES, home + slab))


def in_parallel(
    work: Callable[[_Task], _Result], tasks: Iterator[_Task], jobs: int, give_up: Callable[[], None]
) -> Iterator[_Result]:
    """Results of `work`, as they come, at most two tasks per thread waiting."""
    under_way: Completions[_Result, None] = Completions()
    with ThreadPoolExecutor(jobs, thread_name_prefix="verify") as pool:
        try:
            while True:
                while len(under_way.pending) < 2 * jobs and (task := next(tasks, None)) is not None:
                    under_way.add(pool.submit(work, task), None)
                if not under_way.pending:
                    return
                finished = under_way.next()
                interrupts.check()
                for future in finished:
                    del under_way.pending[future]
                    yield future.result()
        except BaseException:
            give_up()
            raise


# -- doing it -----------------------------------------------------------------------------------------------------


class _Reader:
    """Reads and examines pieces and weights; one pair of buffers per thread."""

    def __init__(self, out: Path, comparison: Against | None) -> None:
        self._fs = FileSystem()
        self._out = out
        self._source = comparison.root if comparison else None
        self._remotes = {comparison.root: comparison.remote} if comparison and comparison.remote else {}
        self._kept = open_source(out, next(iter(self._remotes.values()), None), self._fs)
        self._local = threading.local()
        self._stop = threading.Event()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the hub, which is held as long as there are tasks."""
        self._kept.close()

    def give_up(self) -> None:
        """Examine nothing more, and wait for nothing any more."""
        self._stop.set()
        self._kept.stop()

    def examine(self, task: Task) -> Result:
        """Examine every item of a task; what cannot be read ends it."""
        result = Result(sum(item.nbytes for item in task))
        with _Shards(self._fs, self._remotes) as shards:
            try:
                self._ask_for(task, shards)
                for item in task:
                    if self._stop.is_set():
                        break
                    result.seen.append(self._item(item, shards))
            except _UnreadableError as e:
                if e.root != self._out:
                    raise CheckpointError(f"{e.root / e.file}: {e}") from e
                result.error = f"{e.file}: cannot be read: {e}"
        return result

    def _ask_for(self, task: Task, shards: _Shards) -> None:
        """Have what a task compares with be on its way, all of it at once."""
        for item in task:
            if isinstance(item, TensorPiece) and item.job.other and self._source:
                shards.will_need(self._source, _window(item.job.other.ranges, item.start, item.stop))

    def _item(
        self, item: TensorPiece | EncodedWeight | WrittenChunk | HealedWeight | StoredWeight, shards: _Shards
    ) -> Seen | Tally | Digest | HealedTally | JudgedWeight:
        if isinstance(item, TensorPiece):
            return self._piece(item, shards)
        if isinstance(item, StoredWeight):
            return judge_weight(item, _reader(shards, self._out))
        if isinstance(item, HealedWeight):
            assert self._source is not None
            return examine_healed(item, _reader(shards, self._out), _reader(shards, self._source))
        return self._weight(item, shards) if isinstance(item, EncodedWeight) else self._written(item, shards)

    def _written(self, chunk: WrittenChunk, shards: _Shards) -> Digest:
        """Digest a chunk, a buffer at a time."""

        def pieces() -> Iterator[memoryview]:
            buffer, _ = self._buffers()
            for start in range(chunk.start, chunk.stop, CHUNK_BYTES):
                data = buffer[: min(CHUNK_BYTES, chunk.stop - start)].data
                shards.read(self._out, _window(chunk.ref.ranges, start, start + len(data)), data)
                yield data

        return Digest(chunk.ref.name, chunk.number, digesting.chunk_digest(pieces()))

    def _piece(self, piece: TensorPiece, shards: _Shards) -> Seen:
        ours, theirs = self._buffers()
        job, count = piece.job, piece.nbytes
        seen, data = Seen(piece), ours[:count]
        shards.read(self._out, _window(job.ref.ranges, piece.start, piece.stop), data.data)
        if job.scan:
            seen.nonzero, seen.bad, first = scan_floats(data, job.scan, min(job.slab, count))
            seen.first_bad = piece.start // job.scan.nbytes + first if seen.bad else -1
        if job.scan and job.ref.name.endswith(_OF_ACTIVATIONS):
            seen.faults = tuple(_not_positive(data, job.ref.spec.dtype, piece.start))
        if job.part:
            encoding, dtype = job.part.encoding, job.ref.spec.dtype
            seen.faults = tuple(encoding.faults(job.part.role, dtype, job.part.shape, data, piece.start))
            if job.part.scales:
                scales = theirs[:count]
                shards.read(self._out, _window(job.part.scales.ranges, piece.start, piece.stop), scales.data)
                seen.faults = tuple(encoding.asymmetric(dtype, data, scales, piece.start))
            if job.part.role == "words":
                seen.nonzero, seen.codes = np.array([data.any()]), code_sum(data, encoding.grid.bits)
        if job.place and job.place.template.ids and job.ref.spec.dtype in ID_DTYPES:
            seen.faults = tuple(_strange_ids(data, job.ref.spec.dtype, job.experts, piece.start))
        wanted: Bytes | None = None
        if job.other and job.other.remade and self._source:
            wanted = remade_bytes(job.other.remade, piece.start, piece.stop, _reader(shards, self._source))
        elif job.other and self._source:
            wanted = theirs[:count]
            shards.read(self._source, _window(job.other.ranges, piece.start, piece.stop), wanted.data)
        elif job.derived and self._source:
            wanted = derived_bytes(job.derived, piece.start, piece.stop, self._opener(shards))
        if wanted is not None:
            seen.differing, first = differing_bytes(data, wanted)
            seen.first_differing = piece.start + first if seen.differing else -1
        return seen

    def _weight(self, item: EncodedWeight, shards: _Shards) -> Tally:
        assert self._source is not None
        return examine(item.pair, item.rule, _reader(shards, self._out), _reader(shards, self._source))

    def _opener(self, shards: _Shards) -> Opener:
        """What opens the source; it keeps the last matrix, of which the next piece often has more rows."""
        assert self._source is not None
        self._local.read = _reader(shards, self._source)
        if not hasattr(self._local, "opener"):
            local = self._local
            self._local.opener = Opener(lambda ref, into: local.read(ref, into), checked=False)
        opener: Opener = self._local.opener
        return opener

    def _buffers(self) -> tuple[Bytes, Bytes]:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = (np.empty(CHUNK_BYTES, np.uint8), np.empty(CHUNK_BYTES, np.uint8))
        buffers: tuple[Bytes, Bytes] = self._local.buffers
        return buffers


def _not_positive(data: Bytes, dtype: str, start: int) -> Iterator[Fault]:
    """Scales that activations are divided by; a NaN is told by itself."""
    if dtype not in ("BF16", "F16", "F32"):
        return
    bits = data.view("<f4" if dtype == "F32" else "<u2")
    values = float32_of(bits, dtype)
    if (odd := values <= 0).any():
        first = int(odd.argmax())
        what = "scales of activations are not above zero"
        yield Fault("activation-scale", what, int(odd.sum()), start // bits.itemsize + first, f"{values[first]:.6g}")


def _strange_ids(data: Bytes, dtype: str, experts: int, start: int) -> Iterator[Fault]:
    ids = data.view("<i8" if dtype == "I64" else "<i4")
    if (strange := strange_ids(ids, experts)).any():
        first = int(strange.argmax())
        what = "ids name no expert"
        count, at = int(strange.sum()), start // ids.itemsize + first
        yield Fault("expert-id", what, count, at, str(ids[first]), f"0 to {experts - 1}")


def _reader(shards: _Shards, root: Path) -> Read:
    return lambda ref, into: shards.read(root, ref.ranges, into.reshape(-1).view(np.uint8).data)


# -- reading ------------------------------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """A shard could not be read."""

    def __init__(self, root: Path, file: str, error: OSError | EOFError) -> None:
        super().__init__((error.strerror if isinstance(error, OSError) else "") or str(error))
        self.root = root
        self.file = file


class _Shards:
    """Open shards of any number of checkpoints, closed at the end of a `with` block; `remotes` of those on the hub."""

    def __init__(self, fs: FileSystem, remotes: Mapping[Path, Remote] | None = None) -> None:
        self._fs = fs
        self._remotes = remotes or {}
        self._sources: dict[Path, SourceReader] = {}

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for source in self._sources.values():
            source.close()

    def will_need(self, root: Path, ranges: Iterable[ByteRange]) -> None:
        """Begin to bring ranges of a checkpoint on the hub; what lies here is near enough."""
        if root in self._remotes:
            self._of(root).will_need(ranges)

    def read(self, root: Path, ranges: Iterable[ByteRange], into: memoryview) -> None:
        """Fill `into` with `ranges`, one after the other.

        Raises:
            _UnreadableError: a shard cannot be opened, or ends too early.
            RemoteError: the hub does not give it.

        """
        source = self._of(root)
        done = 0
        for part in ranges:
            try:
                source.read_into(part, into[done : done + part.length])
            except (OSError, EOFError) as e:
                raise _UnreadableError(root, part.file, e) from e
            done += part.length

    def _of(self, root: Path) -> SourceReader:
        if root not in self._sources:
            self._sources[root] = open_source(root, self._remotes.get(root), self._fs)
        return self._sources[root]


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
