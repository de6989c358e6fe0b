"""Verification of a GGUF output against the checkpoint of safetensors that it was made of.

The file is drafted once more from the source and from what shardxform.json says of its making: names, types, shapes and
keys must be those. Bytes of the source are compared as they are; integers are packed anew, and what was rounded without
text is rounded anew, and both must be equal to the bit; what was tuned must be within what tuning can do of the source,
as in other formats; of what was healed only the record tells. Beside that, blocks are looked through for scales that
are no numbers, and for holes. One tensor's tile is in memory at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardxform.ask.manifest import Manifest
from shardxform.ask.recipe import Reach
from shardxform.base import gguf
from shardxform.base.file_system import FileSystem
from shardxform.base.gguf import KeyValue
from shardxform.base.interrupts import deferred
from shardxform.base.progress import Progress
from shardxform.base.tensors import BLOCKS, ByteRange, TensorRef
from shardxform.checkpoint.gguf import GgufModel
from shardxform.checkpoint.record import PROVENANCE
from shardxform.checkpoint.remote.repository import open_source
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError, ExecutionError, ManifestError, SchemeError
from shardxform.formats import ggml_blocks
from shardxform.formats.encoding import Opener, Storage, Writing
from shardxform.formats.ggml import Ggml
from shardxform.formats.rounding import quantize_into
from shardxform.formats.scheme import GGUF, Grid, Scheme
from shardxform.formats.stored import Stored
from shardxform.model.layout import layout_of
from shardxform.plan.gguf import GgufContents, WrittenTensor, as_weights, gguf_contents
from shardxform.plan.gguf_origin import inputs_for, redraft
from shardxform.plan.steps import HEALED_FILE
from shardxform.plan.view import View
from shardxform.runtimes.gguf.architecture import Named, Piece
from shardxform.runtimes.gguf.undoing import Undone, storage_in
from shardxform.verification.data import CHUNK_BYTES, in_parallel
from shardxform.verification.findings import Findings, Rounding
from shardxform.verification.parts import Pair, Rule, freedom_of
from shardxform.verification.rounding import Tally, examine, report_tallies
from shardxform.verification.source import Options as Given
from shardxform.verification.source import check_origin, given_manifest, recorded_manifest
from shardxform.verification.wanted import Reason, healed_by

__all__ = ["Examined", "Made", "check_blocks", "made_of"]


# -- what it must hold ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Made:
    """What an output must hold of its source.

    Attributes:
        source: the checkpoint.
        view: of it.
        contents: every tensor, and what it is made of.
        metadata: keys of every file.
        grid: of integers, where weights were rounded.
        reach: how far tuning a block could go; None where nothing was tuned.
        left: tensors whose values follow from nothing here, and why.

    """

    source: Checkpoint
    view: View
    contents: GgufContents
    metadata: tuple[tuple[KeyValue, ...], ...]
    grid: Grid | None = None
    reach: Reach | None = None
    left: Mapping[str, Reason] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorRef]:
        """What must be there; with bytes of the source only where a tensor is made of these."""
        return {each.named.name: each.copied or TensorRef(each.spec, ()) for each in self.contents.written}

    @property
    def same_bytes(self) -> dict[str, TensorRef]:
        """Tensors that are bytes of the source."""
        copied = ((each.named.name, each.copied) for each in self.contents.written)
        return {name: ref for name, ref in copied if ref is not None and name not in self.left}


def made_of(source: Checkpoint, record: Mapping[str, object], given: Given, findings: Findings) -> Made | None:
    """Find what an output must hold; None when what its record says does not lead to one.

    Args:
        source: what it was made of, or what that was made of.
        record: shardxform.json, or empty.
        given: what the caller says of its making, which goes before the record.
        findings: added to.

    Raises:
        ManifestError: the manifest given is malformed, or does not fit the source.
        FamilyError, PlanError, SchemeError: the source cannot be written as GGUF.

    """
    inputs = record.get("inputs")
    inputs = inputs if isinstance(inputs, Mapping) else {}
    asked = inputs_for(source, inputs, facts=record.get("facts"))
    check_origin(source, asked, findings)
    manifest = _manifest(source, asked, given, findings)
    if isinstance(manifest, str):
        return None
    found = redraft(source, inputs, manifest, text_only=given.text_only, mtp=given.mtp)
    draft, scheme, recipe = found.draft, found.scheme, found.recipe
    changed = healed_by(draft.view, {"recipe": asked.get("recipe"), "facts": asked.get("facts", record.get("facts"))})
    kept = [name for name in draft.contents.healed if name in changed]
    contents = draft.contents
    if recipe and len(kept) < len(contents.healed):  # some blocks stayed as they were pruned
        contents = gguf_contents(draft.view, contents.types, kept)
    heads = (gguf.decode_head(shard.head, shard.nbytes, shard.name) for shard in draft.shards)
    return Made(
        source=source,
        view=draft.view,
        contents=contents,
        metadata=tuple(head.metadata for head in heads),
        grid=scheme.grid if scheme else None,
        reach=recipe.reach if recipe and recipe.iters else None,
        left=dict(_left(contents, changed, found.crossing if scheme and scheme.format != GGUF else frozenset())),
    )


def _left(contents: GgufContents, healed: Iterable[str], crossing: frozenset[str]) -> Iterator[tuple[str, Reason]]:
    """Tensors that are made of healed values, or of integers of another file whose columns left their blocks."""
    changed = frozenset(healed)
    for each in contents.written:
        if any(_of(piece) in changed or _is_healed(piece) for piece in each.named.pieces):
            yield each.named.name, "healed"
        elif any(piece.matrix in crossing for piece in each.named.pieces):
            yield each.named.name, "unknown"


def _of(piece: Piece) -> str:
    return piece.storage.parts[0][1].name


def _is_healed(piece: Piece) -> bool:
    return any(place.file.startswith(HEALED_FILE) for place in piece.storage.reads)


def _manifest(
    source: Checkpoint, asked: Mapping[str, object], given: Given, findings: Findings
) -> Manifest | str | None:
    """The manifest given or recorded; a text where what is recorded is none."""
    weights = as_weights(source)
    layout = layout_of(weights.config, weights.tensors)
    if (manifest := given_manifest(given, layout)) is not None:
        return manifest
    if not asked.get("manifest"):
        return None
    try:
        return recorded_manifest(asked["manifest"], layout, findings) or "no manifest"
    except ManifestError as e:
        findings.problem("source-manifest", PROVENANCE, str(e))
        return "no manifest"


# -- what it holds ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Examined:
    """How much was looked at.

    Attributes:
        bytes_scanned: of blocks that were looked through.
        bytes_compared, tensors_compared, tensors_differing: with what follows from the source.
        tallies: of tuned weights, one each.
        compared: tensors whose values were held against the source.

    """

    bytes_scanned: int = 0
    bytes_compared: int = 0
    tensors_compared: int = 0
    tensors_differing: int = 0
    tallies: list[Tally] = field(default_factory=list)
    compared: set[str] = field(default_factory=set)
    rounding: Rounding | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """A tensor to look at, and what it is made of, if that is known."""

    ref: TensorRef
    written: WrittenTensor | None
    pairs: tuple[Pair, ...]


@dataclass(slots=True)
class _Seen:
    """What a tensor showed."""

    job: _Job
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    differing: bool = False


def check_blocks(
    model: GgufModel,
    made: Made | None,
    findings: Findings,
    *,
    jobs: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
) -> Examined:
    """Look through all blocks of a file, and hold what is no copy of the source's bytes against the source.

    Raises:
        CheckpointError, RemoteError: the source cannot be read.

    """
    rule = _rule(made) if made else None
    todo = list(_jobs(model, made))
    out, done, total = Examined(), 0, sum(job.ref.nbytes for job in todo)
    stop = threading.Event()
    reader = _Reader(model, made, rule, stop)
    with deferred(), reader:
        for seen in in_parallel(reader.examine, iter(todo), jobs, stop.set):
            _report(seen, out, findings)
            done += seen.job.ref.nbytes
            if on_progress:
                on_progress(Progress(done, total, 0))
    if out.tallies and rule:
        order = {pair.name: at for at, pair in enumerate(pair for job in todo for pair in job.pairs)}
        out.tallies.sort(key=lambda tally: order[tally.pair.name])
        out.rounding = report_tallies(out.tallies, rule, findings)
    return out


def _jobs(model: GgufModel, made: Made | None) -> Iterator[_Job]:
    """Tensors of blocks, and those that are worked out; bytes of the source are compared elsewhere."""
    written = {each.named.name: each for each in made.contents.written} if made else {}
    same = made.same_bytes if made else {}
    for name, ref in model.table.tensors.items():
        each = written.get(name)
        if each and (each.spec != ref.spec or name in same or (made and name in made.left)):
            each = None
        pairs = tuple(_pairs(each.named, ref, made)) if each and made and _is_tuned(each, made) else ()
        if each or ref.spec.dtype in BLOCKS:
            yield _Job(ref, each, pairs)


def _is_tuned(each: WrittenTensor, made: Made) -> bool:
    """Whether a tensor holds weights of a block that was tuned."""
    layer = made.contents.types.modules.get(each.named.pieces[0].matrix) if each.named.pieces else None
    return made.reach is not None and layer is not None and isinstance(each.target, Ggml)


def _pairs(named: Named, ref: TensorRef, made: Made) -> Iterator[Pair]:
    first = 0
    for piece in named.pieces:
        if piece.is_part:  # held in the file's order: of the checkpoint's it has some rows only
            part = Undone(ref.spec.dtype, first, piece.shape[0], grid=made.grid)
            yield Pair(f"{piece.matrix}.weight", piece, Storage(part, (("values", ref),), piece.shape))
        else:
            yield Pair(f"{piece.matrix}.weight", piece.storage, storage_in(piece, first, ref, made.grid))
        first += piece.shape[0]


def _rule(made: Made) -> Rule | None:
    """What tuning can do, as in other formats."""
    if made.grid is None or made.reach is None:
        return None
    freedom = freedom_of(made.grid, made.reach)
    scheme = Scheme(grid=made.grid, format=GGUF)
    stored = Stored(scheme, frozenset(), {}, {}, {}, made.view.layout, ())
    return Rule(stored, None, freedom.offset, plain=False, freedom=freedom)


class _Reader:
    """Reads tensors of the file and what they are made of; what opens the source is each thread's own."""

    def __init__(self, model: GgufModel, made: Made | None, rule: Rule | None, stop: threading.Event) -> None:
        fs = FileSystem()
        self._model, self._made, self._rule, self._stop = model, made, rule, stop
        self._ours = open_source(model.table.root, None, fs)
        self._theirs = open_source(made.source.root, made.source.remote, fs) if made else None
        self._local = threading.local()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        if self._theirs:
            self._theirs.close()

    def examine(self, job: _Job) -> _Seen:
        """Look at one tensor; what cannot be read is one of its problems, unless it is the source's."""
        seen = _Seen(job)
        try:
            for pair in job.pairs:
                self._stopped()
                self._pair(pair, seen)
            if job.written and not job.pairs:
                self._compare(job, job.written, seen)
            if job.ref.spec.dtype in BLOCKS:
                self._scan(job.ref, seen)
        except (OSError, EOFError) as e:
            seen.problems.append(("unreadable", f"cannot be read: {getattr(e, 'strerror', '') or e}"))
        except _StoppedError:
            pass
        return seen

    def _stopped(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _read(self, ref: TensorRef, into: NDArray[np.generic]) -> None:
        """Fill an array with bytes of the file."""
        _fill(self._ours.read_into, ref, into)

    def _source(self, ref: TensorRef, into: NDArray[np.generic]) -> None:
        """Fill an array with bytes of the source."""
        assert self._theirs is not None
        assert self._made is not None
        try:
            _fill(self._theirs.read_into, ref, into)
        except (OSError, EOFError) as e:
            raise CheckpointError(f"{self._made.source.where}: cannot be read: {e}") from e

    def _pair(self, pair: Pair, seen: _Seen) -> None:
        assert self._rule is not None
        try:
            seen.tallies.append(examine(pair, self._rule, self._read, self._source))
        except ExecutionError as e:
            seen.problems.append(("source-scale", str(e).partition(": ")[2]))

    def _compare(self, job: _Job, written: WrittenTensor, seen: _Seen) -> None:
        """Write the tensor once more, and compare."""
        opener = Opener(self._source)
        writing = Writing(f"tensor '{job.ref.name}'", written.shape, quantize_into, self._stopped)
        rows = (source.open(opener) for source in written.sources())
        differing, first = 0, -1
        try:
            for _, offset, wanted in written.target.written(rows, writing):
                self._stopped()
                theirs = np.ascontiguousarray(wanted).reshape(-1).view(np.uint8)
                ours = np.empty(theirs.size, np.uint8)
                self._read(_window(job.ref, offset, theirs.size), ours)
                if (odd := np.flatnonzero(ours != theirs)).size:
                    first = offset + int(odd[0]) if first < 0 else first
                    differing += odd.size
        except ExecutionError as e:
            raise CheckpointError(f"{self._made.source.where if self._made else ''}: {e}") from e
        if differing:
            seen.differing = True
            text = f"{differing} of {job.ref.nbytes} bytes differ from {_what(written)}, the first at {first}"
            seen.problems.append(("source-bytes", text + _expert(job.ref, first)))

    def _scan(self, ref: TensorRef, seen: _Seen) -> None:
        """Look for scales that are no numbers, and for experts of nothing but zeros."""
        rows = ref.reshaped((_rows(ref), ref.spec.shape[-1]))
        each = ref.nbytes // _rows(ref)
        slabs = ref.spec.shape[0] if len(ref.spec.shape) > 2 else 1
        nonzero, step = np.zeros(slabs, np.bool_), max(1, CHUNK_BYTES // each)
        per_slab, known = _rows(ref) // slabs, _is_known(ref.spec.dtype)
        for slab in range(slabs):
            for start in range(slab * per_slab, (slab + 1) * per_slab, step):
                self._stopped()
                stop = min(start + step, (slab + 1) * per_slab)
                blocks_RB = np.empty((stop - start, each), np.uint8)
                self._read(rows.rows(start, stop), blocks_RB)
                nonzero[slab] |= bool(blocks_RB.any())
                if known and (bad := ggml_blocks.overflowing(blocks_RB, ref.spec.dtype)):
                    text = f"a scale of row {start + bad[0]}, block {bad[1]}, is NaN or infinite"
                    seen.problems.append(("not-finite", text + _expert(ref, (start + bad[0]) * each)))
                    return
        if not nonzero.all():
            zeros = [str(at) for at in np.flatnonzero(~nonzero)]
            some = slabs > 1 and len(zeros) < slabs
            what = f"expert{'s' * (len(zeros) > 1)} {', '.join(zeros[:8])}: " if some else ""
            seen.warnings.append(("zero", f"{what}every value is zero, as in a hole that was never written"))


class _StoppedError(Exception):
    """Nothing more is to be looked at."""


def _fill(read_into: Callable[[ByteRange, memoryview], object], ref: TensorRef, into: NDArray[Any]) -> None:
    view, done = into.reshape(-1).view(np.uint8).data, 0
    for piece in ref.ranges:
        read_into(piece, view[done : done + piece.length])
        done += piece.length


def _window(ref: TensorRef, offset: int, length: int) -> TensorRef:
    """Some bytes of a tensor that lies in one run."""
    (whole,) = ref.ranges
    return replace(ref, ranges=(ByteRange(whole.file, whole.offset + offset, length),))


def _rows(ref: TensorRef) -> int:
    count = 1
    for size in ref.spec.shape[:-1]:
        count *= size
    return count


def _is_known(dtype: str) -> bool:
    """Whether it is known where the scales of a type's blocks lie."""
    try:
        Ggml(dtype)
    except SchemeError:
        return False
    return True


def _expert(ref: TensorRef, byte: int) -> str:
    """Name the expert that a byte belongs to."""
    if "_exps." not in ref.name or len(ref.spec.shape) < 3:
        return ""
    return f" (expert {byte // (ref.nbytes // ref.spec.shape[0])})"


def _what(written: WrittenTensor) -> str:
    if isinstance(written.target, Ggml) and written.target.grid:
        return "the source rounded again"
    return "the source's integers" if isinstance(written.target, Ggml) else "what the source's values give"


def _report(seen: _Seen, out: Examined, findings: Findings) -> None:
    name, nbytes = seen.job.ref.name, seen.job.ref.nbytes
    for code, text in seen.problems:
        findings.problem(code, name, text)
    for code, text in seen.warnings:
        findings.warn(code, name, text)
    out.tallies += seen.tallies
    out.bytes_scanned += nbytes if seen.job.ref.spec.dtype in BLOCKS else 0
    if seen.job.written:
        out.compared.add(name)
    if seen.job.written and not seen.job.pairs:
        out.bytes_compared += nbytes
        out.tensors_compared += 1
        out.tensors_differing += seen.differing
