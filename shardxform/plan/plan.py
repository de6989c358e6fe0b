"""The plan: everything about an output that can be known without reading tensor data, as a pure value.

Shard names, final headers, the steps that fill them, the new config, the sidecars, and a fingerprint of it all. The
executor (`run`) needs nothing else. Speed settings are not part of a plan: they cannot change a byte.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from shardxform.base import tensors
from shardxform.base.digests import CHUNK_BYTES, Chunks, runs_of
from shardxform.base.strict_json import dumps, pretty, pretty_strings
from shardxform.base.tensors import ByteRange, TensorRef, TensorSpec, natural_key, shard_names, split
from shardxform.checkpoint.history import NO_PAST, Past
from shardxform.checkpoint.identity import Identity, identify
from shardxform.checkpoint.table import CONFIG, INDEX, Checkpoint, Shard
from shardxform.errors import PlanError

if TYPE_CHECKING:
    from shardxform.checkpoint.remote.repository import Remote

__all__ = [
    "STEP_BYTES",
    "Container",
    "Copy",
    "Extent",
    "Plan",
    "Remake",
    "Segment",
    "ShardPlan",
    "Step",
    "copy_steps",
    "extents_of",
    "lay_out",
    "refuse_same_names",
    "source_inputs",
]

Container = Literal["safetensors", "gguf"]
"""What the shards of an output are."""

STEP_BYTES: Final = 256 << 20
"""Most bytes one step writes: the unit of resume. Part of the plan, since the journal counts steps."""


REMADE_BYTES: Final = 4 << 20
"""Most bytes of rows that are worked out at a time, but for a single row."""

_BASE_MEMORY: Final = 48 << 20  # interpreter, modules, and the plan of a 72 GB checkpoint
_KERNEL_MEMORY: Final = 100_000_000  # numpy, numba and LLVM, where weights are rounded
_REMOTE_MEMORY: Final = 128 << 20  # the hub's client, and what was fetched and not yet written


class Extent(NamedTuple):
    """`length` bytes at `offset` of the output shard number `shard`."""

    shard: int
    offset: int
    length: int

    def __repr__(self) -> str:  # as tuples with names give it, in half the time: plans are fingerprinted by it
        return f"Extent(shard={self.shard}, offset={self.offset}, length={self.length})"


class Segment(NamedTuple):
    """A run of bytes to copy: from `source` to `offset` of the output shard number `shard`."""

    source: ByteRange
    shard: int
    offset: int

    def __repr__(self) -> str:
        return f"Segment(source={self.source!r}, shard={self.shard}, offset={self.offset})"


class Step(Protocol):
    """The unit of work, of memory and of resume. Steps are values: they hold no tensor and open no file."""

    @property
    def reads(self) -> Iterable[ByteRange]:
        """What the step reads from the source."""

    @property
    def writes(self) -> Iterable[Extent]:
        """What the step writes; extents of all steps tile the data of every shard exactly once."""

    @property
    def peak_bytes(self) -> int:
        """Memory one worker needs for it beyond the process's own."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy segments as they are."""

    segments: tuple[Segment, ...]

    @property
    def reads(self) -> Iterable[ByteRange]:
        """One range per segment."""
        return (segment.source for segment in self.segments)

    @property
    def writes(self) -> Iterable[Extent]:
        """One extent per segment."""
        return (Extent(s.shard, s.offset, s.source.length) for s in self.segments)

    @property
    def peak_bytes(self) -> int:
        """The copy buffer, used where the kernel cannot copy by itself."""
        return 4 << 20


@dataclass(frozen=True, slots=True)
class Remake:
    """Work out one tensor, rows at a time; see `formats.remaking`."""

    remade: tensors.Remade
    target: Extent

    @property
    def reads(self) -> Iterable[ByteRange]:
        """The whole source."""
        return self.remade.source.ranges

    @property
    def writes(self) -> Iterable[Extent]:
        """One extent."""
        return (self.target,)

    @property
    def peak_bytes(self) -> int:
        """Rows as they are, and as they become."""
        return _KERNEL_MEMORY + 4 * REMADE_BYTES


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output shard: its final name, its entries, its encoded header, and what every tensor is padded to."""

    name: str
    entries: tuple[tensors.Entry, ...]
    head: bytes
    alignment: int = 1

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.head) + (tensors.padded(self.entries[-1].end, self.alignment) if self.entries else 0)

    @property
    def runs(self) -> Iterator[tuple[int, int]]:
        """First byte, and byte after the last, of every run of tensors that nothing lies between; the rest is zeros."""
        start = begin = end = len(self.head)
        for spec, first, last in self.entries:
            if start + first > end:
                yield begin, end
                begin = start + first
            end = start + (last if self.alignment == 1 else first + spec.nbytes)
        yield begin, end


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be written, to the byte, less the numbers.

    Attributes:
        command: verb that made the plan.
        source: directory that the steps read, or that small files of `remote` are in.
        remote: the repository that shards are read from, if they are not in `source`.
        source_shards: shards of the source, as they were when planned.
        view: the source as the plan takes it, pruned and without what is dropped; what blocks are tuned and healed in.
        shards: output shards, in order of their names.
        steps: in the order in which they are best run; any order gives the same bytes.
        config: bytes of config.json; a GGUF file has none.
        sidecars: small files copied beside the shards, with their SHA-256.
        identity: gives what the source is, to the value; its marks are read when they are first asked for, and once.
        stated: what the bytes depend on, by name, but for the values of the source.
        summary: figures for people and for JSON.
        notes: what a person should know, one sentence each.
        unread: files of the source that are no part of the model, and not copied; no part of the plan's identity.
        container: what the shards are: those of safetensors have an index and config.json beside them, those of GGUF
            say all in their heads.
        past: how the source was made, where it is an output of ours.
        source_name: of the file in `source` that is the source, or begins it, where that is not the whole directory.

    """

    command: str
    source: Path
    source_shards: tuple[Shard, ...]
    view: Checkpoint = field(repr=False)
    shards: tuple[ShardPlan, ...]
    steps: tuple[Step, ...]
    config: bytes
    sidecars: Mapping[str, str]
    identity: Callable[[], Identity] = field(repr=False, compare=False)
    stated: Mapping[str, Any]
    summary: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    remote: Remote | None = None
    container: Container = "safetensors"
    past: Past = field(default=NO_PAST, repr=False)
    source_name: str = ""

    @property
    def origin(self) -> str:
        """What people call the source: its directory, its file in GGUF, or `hf://owner/name@commit`."""
        if self.remote:
            return self.remote.named(self.source_name) if self.source_name else str(self.remote)
        return str(self.source / self.source_name)

    @property
    def nbytes(self) -> int:
        """Bytes of all output shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def work_bytes(self) -> int:
        """Bytes of disk that a step needs beside the output while it is done; hidden states are for who tunes."""
        return max((int(getattr(step, "work_bytes", 0)) for step in self.steps), default=0)

    @property
    def data_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(shard.nbytes - len(shard.head) for shard in self.shards)

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        """What the bytes depend on, by name; compared to say why a resume is refused.

        Raises:
            CheckpointError: a shard of the source cannot be read, or is not what the source's own record says.

        """
        identity = self.identity()
        if not self.remote:
            self.past.refuse_other(self.source, self.source_shards, identity, self.origin)
        return {**self.stated, "source": {**identity.to_dict(), **self.stated["source"]}, **self.past.stated}

    def refuse_other_values(self) -> None:
        """Look at the source's values, before anything is written; raises like `inputs`."""
        assert self.inputs

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the output's bytes; raises like `inputs`."""
        digest = hashlib.sha256(dumps(self.inputs).encode())
        for shard in self.shards:
            digest.update(shard.name.encode() + b"\0")
            digest.update(shard.head)
        digest.update(self.config)
        for step in self.steps:
            digest.update(repr(step).encode())
        return digest.hexdigest()

    @cached_property
    def chunks(self) -> Chunks:
        """Finds what digests are taken of."""
        return Chunks(self.shards)

    @cached_property
    def index(self) -> bytes | None:
        """Bytes of the index, or None for a single shard, which needs none."""
        if len(self.shards) == 1 or self.container == "gguf":
            return None
        homes = {entry.spec.name: shard.name for shard in self.shards for entry in shard.entries}
        weight_map = {name: homes[name] for name in sorted(homes)}
        total = {"metadata": {"total_size": self.data_bytes}, "weight_map": {}}
        return pretty(total).replace("{}", pretty_strings(weight_map, 1)).encode()

    def files(self) -> list[str]:
        """Names of every file the finished output holds, provenance aside."""
        beside = () if self.container == "gguf" else (CONFIG,) if len(self.shards) == 1 else (INDEX, CONFIG)
        return [*(shard.name for shard in self.shards), *self.sidecars, *beside]

    @property
    def last(self) -> str:
        """Name of the file that is put in its place last: with it the output is complete."""
        return self.shards[-1].name if self.container == "gguf" else CONFIG

    def peak_bytes(self, jobs: int) -> int:
        """Estimate of the process's peak memory with `jobs` steps at a time."""
        headers = sum(len(shard.head) for shard in self.shards)
        beside = max((step.peak_bytes for step in self.steps if not step_tokens(step)), default=0)
        alone = max((step.peak_bytes for step in self.steps if step_tokens(step)), default=0)
        base = _BASE_MEMORY + (_REMOTE_MEMORY if self.remote else 0)
        kernels = _KERNEL_MEMORY if "scheme" in self.summary else 0
        return base + 12 * headers + max(kernels + jobs * beside, alone)

    def check(self) -> None:
        """Assert that the steps write every byte of every tensor exactly once, and every chunk in one step.

        What lies between tensors that are padded is in no step: a shard is made of zeros.

        Raises:
            PlanError: a hole, an overlap or a part of a chunk; a bug in the planner, caught before anything is written.

        """
        written = [run for step in self.steps for run in runs_of(step.writes)]
        per_shard: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(self.shards))}
        for number, begin, end in sorted(written):
            per_shard[number].append((begin, end))
        for number, shard in enumerate(self.shards):
            _refuse_untiled(shard, per_shard[number])
            self.chunks.refuse_parts(number, per_shard[number])


def _refuse_untiled(shard: ShardPlan, written: Sequence[tuple[int, int]]) -> None:
    """Refuse runs, in order, that are not the shard's own cut into pieces."""
    runs = shard.runs
    at, end = next(runs)
    for begin, stop in written:
        if at == end:
            at, end = next(runs, (end, end))
        if begin != at or stop > end:
            raise PlanError(f"internal: steps do not tile {shard.name} at byte {at}")
        at = stop
    if at != end or next(runs, None):
        raise PlanError(f"internal: steps leave {shard.name} unfilled from byte {at}")


def step_tokens(step: Step) -> int:
    """Tokens that go through a block for a step that tunes it, and is done alone; 0 for other steps."""
    return int(getattr(step, "block_tokens", 0))


def lay_out(specs: Iterable[TensorSpec], max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """Group tensors into shards in natural order of names, and lay each out as the reference writer does.

    Natural order (`layers.2` before `layers.10`) keeps a decoder block together, and makes the output independent of
    how the source was sharded: pruning and quantizing in one pass gives the shards of pruning, then quantizing.

    Raises:
        PlanError: no tensor at all, or a header beyond what readers accept.

    """
    specs = list(specs)
    refuse_same_names(specs)
    groups = split(sorted(specs, key=lambda spec: natural_key(spec.name)), max_shard_bytes)
    if not groups:
        raise PlanError("the output would hold no tensor")
    shards: list[ShardPlan] = []
    for name, group in zip(shard_names(len(groups)), groups, strict=True):
        entries = tensors.layout(group)
        head = tensors.encode(entries)
        if len(head) - tensors.LENGTH_BYTES > tensors.MAX_HEADER_BYTES:
            raise PlanError(f"{name}: a header of {len(head)} bytes, readers accept {tensors.MAX_HEADER_BYTES}")
        shards.append(ShardPlan(name, entries, head))
    return tuple(shards)


def refuse_same_names(specs: Sequence[TensorSpec]) -> None:
    """Refuse two tensors of one name.

    Raises:
        PlanError: says which.

    """
    if len({spec.name for spec in specs}) != len(specs):
        twice = next(name for name, count in Counter(spec.name for spec in specs).items() if count > 1)
        raise PlanError(f"two tensors of the output would both be called '{twice}'")


def copy_steps(shards: Sequence[ShardPlan], tensors: Mapping[str, TensorRef]) -> Iterator[Copy | Remake]:
    """Steps that fill `shards` with every tensor found in `tensors`, copied in file order, or else worked out.

    A step writes whole chunks, of which digests are taken, and as it copies at most `STEP_BYTES`.
    """
    yield from _copies(shards, tensors)
    remade = [ref for ref in tensors.values() if ref.remade and ref.nbytes]
    extents = extents_of(shards) if remade else {}
    for ref in remade:
        assert ref.remade
        yield Remake(ref.remade, extents[ref.name])


def _copies(shards: Sequence[ShardPlan], tensors: Mapping[str, TensorRef]) -> Iterator[Copy]:
    for number, shard in enumerate(shards):
        segments: list[Segment] = []
        room, goes_on = STEP_BYTES, ("", 0, 0)  # where a range and its place must begin to be joined to the last
        for places, offset, nbytes in _chunks(shard, tensors):
            if segments and nbytes > room:
                yield Copy(tuple(segments))
                segments, room, goes_on = [], STEP_BYTES, ("", 0, 0)
            room -= nbytes
            for place in places:
                file, begin, length = place
                if segments and begin == goes_on[1] and offset == goes_on[2] and file == goes_on[0]:
                    (_, first, before), _, at = segments[-1]
                    segments[-1] = Segment(ByteRange(file, first, before + length), number, at)
                else:
                    segments.append(tuple.__new__(Segment, (place, number, offset)))
                offset += length
                goes_on = file, begin + length, offset
        if segments:
            yield Copy(tuple(segments))


def extents_of(shards: Sequence[ShardPlan]) -> dict[str, Extent]:
    """Place of every tensor in the output, by name."""
    found: dict[str, Extent] = {}
    for number, shard in enumerate(shards):
        start = len(shard.head)
        extents = tensors.many(Extent, ((number, start + begin, end - begin) for _, begin, end in shard.entries))
        found.update(zip((spec.name for spec, _, _ in shard.entries), extents, strict=True))
    return found


def source_inputs(source: Checkpoint, sidecars: Mapping[str, str]) -> dict[str, Any]:
    """What a plan depends on in its source: its identity, and its sidecars by name.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    return {**identify(source).to_dict(), "sidecars": dict(sidecars)}


def _chunks(shard: ShardPlan, tensors: Mapping[str, TensorRef]) -> Iterator[tuple[Sequence[ByteRange], int, int]]:
    """Ranges of every chunk of a shard's tensors, where the chunk goes, and its bytes."""
    start = len(shard.head)
    for spec, begin, _ in shard.entries:
        ref = tensors.get(spec.name)
        if ref is None or not ref.ranges:
            continue
        places, offset = ref.ranges, start + begin
        if len(places) == 1 and places[0].length <= CHUNK_BYTES:  # as most are
            yield places, offset, places[0].length
            continue
        chunk, room = list[ByteRange](), CHUNK_BYTES
        for place in places:
            for piece in _pieces(place, room):
                chunk.append(piece)
                room -= piece.length
                if not room:
                    yield chunk, offset, CHUNK_BYTES
                    chunk, room, offset = [], CHUNK_BYTES, offset + CHUNK_BYTES
        if chunk:
            yield chunk, offset, CHUNK_BYTES - room


def _pieces(place: ByteRange, room: int) -> Iterator[ByteRange]:
    """Cut a range so that the first piece fits into `room` and each further one into a chunk."""
    done = 0
    while done < place.length:
        take = min(room, place.length - done)
        yield ByteRange(place.file, place.offset + done, take)
        done += take
        room = CHUNK_BYTES
