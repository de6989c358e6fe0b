"""What a worker does: one step of a plan whose output lies on a file system that it shares with the driver.

The version is compared before anything of the driver's is unpickled, and the plan and the source are held against
OUT/.shardxform/plan.json, which also proves that the file system is shared. The same step done twice, even at the same
time, writes the same bytes to the same places.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from shardxform.base import computing
from shardxform.base.digests import FACT, Chunk, digest_chunks
from shardxform.base.file_system import FileSystem, FolderReader
from shardxform.checkpoint.record import Record, read_record
from shardxform.checkpoint.table import Folder
from shardxform.errors import CheckpointError, ExecutionError, FamilyError, ShardxformError
from shardxform.execution.output import PARTIAL, PLAN, WORK, states_of
from shardxform.execution.steps import Facts, OpenTargets, executor
from shardxform.model.family_files import Carried, restore
from shardxform.plan.plan import Plan, Step

__all__ = [
    "Outcome",
    "StepPlace",
    "do_step",
    "ignore",
    "opened_targets",
    "refuse_other_source",
    "refuse_other_version",
    "reporting",
    "with_digests",
    "with_families",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
Outcome = tuple[_R | None, Exception | None]
"""What came of a task, or the error that a person can do something about: as a value, so that Ray tries nothing again
but what its own failures cut short."""


def reporting(function: Callable[_P, _R]) -> Callable[_P, Outcome[_R]]:
    """Make a function of a worker whose errors are the world's into one that gives them back."""

    @functools.wraps(function)
    def task(*args: _P.args, **kwargs: _P.kwargs) -> Outcome[_R]:
        try:
            return function(*args, **kwargs), None
        except (ShardxformError, OSError, EOFError) as e:
            return None, e

    return task


def refuse_other_version(wanted: Mapping[str, str]) -> None:
    """Refuse to work for a driver that computes with something else; see `computing.shared`.

    Raises:
        ExecutionError: names the library or the instructions, both versions and this machine.

    """
    found = computing.here(wanted)
    for name, version in wanted.items():
        if found[name] != version:
            raise ExecutionError(
                f"worker on {socket.gethostname()}: {name} {found[name]}, but the driver has {version};"
                " install the same on machines of one kind"
            )


def with_families(
    families: Sequence[Carried], function: Callable[..., Outcome[_R]], wanted: Mapping[str, str], *args: object
) -> Outcome[_R]:
    """Do what `function` does where families from outside are known, as they are to the driver."""
    try:
        refuse_other_version(wanted)
        restore(families)
    except FamilyError as e:
        return None, ExecutionError(f"worker on {socket.gethostname()}: {e}")
    except ExecutionError as e:
        return None, e
    return function(wanted, *args)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlace:
    """Where a step reads and writes, and what plan it is of.

    Attributes:
        fingerprint: of the plan.
        source, out: directories, absolute.
        shards: names of the output's, by their numbers.
        device: where weights are rounded.

    """

    fingerprint: str
    source: Path
    out: Path
    shards: tuple[str, ...]
    device: str = "cpu"

    @classmethod
    def of(cls, plan: Plan, out: Path, device: str) -> StepPlace:
        """Where the steps of a plan are done."""
        source = Path(os.path.abspath(plan.source))
        shards = tuple(shard.name for shard in plan.shards)
        out = Path(os.path.abspath(out))
        return cls(fingerprint=plan.fingerprint, source=source, out=out, shards=shards, device=device)

    def partial(self, shard: int) -> Path:
        """Path of a shard of the output while it is being filled, by its number."""
        return self.out / (self.shards[shard] + PARTIAL)

    @property
    def work(self) -> Path:
        """The work directory of the output."""
        return self.out / WORK

    @property
    def states(self) -> Path:
        """The directory of the hidden states of this plan."""
        return states_of(self.work, self.fingerprint)

    def record(self) -> Record:
        """What OUT is bound to.

        Raises:
            ExecutionError: not to this plan, or not at all: the file system is not shared.

        """
        record = read_record(self.work / PLAN)
        if record is None or record.fingerprint != self.fingerprint:
            found = "no such plan" if record is None else "another plan"
            raise ExecutionError(
                f"{self.work / PLAN}: {found} on {socket.gethostname()}; source and output must lie on a file"
                " system that all machines share, under the same paths"
            )
        return record


@reporting
def do_step(wanted: Mapping[str, str], place: bytes, step: bytes) -> Facts:
    """Do one step and make its bytes durable.

    Args:
        wanted: see `refuse_other_version`.
        place: a pickled `StepPlace`.
        step: a pickled step, and the chunks that it writes.

    Raises:
        ExecutionError: another version, plan or source, or weights that cannot be rounded.
        OSError, EOFError: the disk failed, or the source is truncated.

    """
    refuse_other_version(wanted)
    return _do(pickle.loads(place), *pickle.loads(step))  # noqa: S301 - the driver's own


def _do(place: StepPlace, step: Step, chunks: Sequence[Chunk]) -> Facts:
    fs = FileSystem()
    with (
        opened_targets(place, step, fs) as targets,
        contextlib.closing(FolderReader(place.source, fs)) as source,
    ):
        facts: Facts = executor(step, place.device)((source, targets.target), fs, ignore, ignore)
    return with_digests(facts, place, chunks, fs)


def with_digests(facts: Facts, place: StepPlace, chunks: Sequence[Chunk], fs: FileSystem) -> Facts:
    """Facts of a step that is durable, and the digests of what it wrote, read past the page cache."""
    return {**facts, FACT: digest_chunks(chunks, place.partial, fs, direct=True)}


@contextlib.contextmanager
def opened_targets(place: StepPlace, step: Step, fs: FileSystem) -> Iterator[OpenTargets]:
    """Open what a step writes; durable when the block ends without an error.

    Raises:
        ExecutionError: see `StepPlace.record` and `refuse_other_source`.

    """
    place.record()
    with OpenTargets(place.partial, fs) as targets:
        for shard in sorted({extent.shard for extent in step.writes}):
            targets.target(shard)
        # Only now: shards of another plan are made after that plan is bound, so these are not of another.
        planned = place.record().inputs["source"]["shards"]
        refuse_other_source(place.source, planned, {piece.file for piece in step.reads})
        yield targets
        targets.sync(step.writes)


def refuse_other_source(root: Path, planned: Mapping[str, Sequence[object]], names: Iterable[str]) -> None:
    """Refuse shards that have not the size and the SHA-256 of the header in `planned`, by name.

    Raises:
        ExecutionError: names the shard and this machine.

    """
    folder = Folder(root)
    for name in sorted(names):
        try:
            head = folder.head(name)
            found = [head.nbytes, hashlib.sha256(head.data).hexdigest()]
        except (OSError, CheckpointError):
            found = []
        if found != planned[name]:
            raise ExecutionError(
                f"{root / name}: on {socket.gethostname()} missing, or not the shard that was planned with"
            )


def ignore(*_: object) -> None:
    """Progress is told by the driver, step by step, and it is Ray that stops a worker."""
