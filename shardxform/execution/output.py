"""Writing the output directory, in the order in which it becomes a checkpoint.

    OUT/.shardxform/plan.json   what this work is bound to          written first
    OUT/.shardxform/journal     steps durably done
    OUT/.shardxform/states-*/   hidden states of the plan with these digits: no other plan takes them for its own
    OUT/*.safetensors.partial   final header, preallocated          filled in any order
    OUT/*.safetensors           published: renamed when complete
    OUT/<sidecars>, index, shardxform.json
    OUT/config.json             the commit: before it, no loader takes OUT for a checkpoint
    OUT/.shardxform/            removed last

A crash between any two of these leaves what the next run of the same command goes on from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardxform.base.digests import tensor_digest
from shardxform.base.file_system import FileSystem
from shardxform.base.readers import SourceReader
from shardxform.base.sharding import show_size
from shardxform.checkpoint.record import PROVENANCE, Record, read_record
from shardxform.checkpoint.remote.repository import open_source
from shardxform.checkpoint.sidecars import refuse_faulty_file
from shardxform.checkpoint.table import CONFIG, INDEX
from shardxform.errors import ExecutionError, OutputError
from shardxform.execution.outdir import JOURNAL, LOCK, PARTIAL, PLAN, STATES, WORK, State, holds, record_of, states_of
from shardxform.plan.plan import Plan, ShardPlan

__all__ = ["Output"]


@dataclass(frozen=True, slots=True)
class Output:
    """The output directory of one plan. Methods are effects, in the order in which `run` calls them."""

    root: Path
    plan: Plan
    fs: FileSystem

    @property
    def work(self) -> Path:
        """The work directory."""
        return self.root / WORK

    @property
    def states(self) -> Path:
        """The directory of the hidden states that the plan's blocks are tuned by; no other plan has it."""
        return states_of(self.work, self.plan.fingerprint)

    @property
    def journal(self) -> Path:
        """Path of the journal."""
        return self.work / JOURNAL

    def partial(self, number: int) -> Path:
        """Path of a shard while it is being filled."""
        return self.root / (self.plan.shards[number].name + PARTIAL)

    def refuse_too_little_space(self, beside: int = 0) -> None:
        """Refuse when what is still to be written, and `beside` it what is kept meanwhile, does not fit.

        Raises:
            OutputError: says how much is needed and how much is free.

        """
        needed = self.plan.nbytes + beside - self._allocated()
        free = self.fs.free_bytes(self.root)
        if needed > free:
            raise OutputError(f"{self.root}: needs {show_size(needed)} more, but only {show_size(free)} are free")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the work directory and hold its lock.

        Raises:
            OutputError: another process works here.

        """
        self.fs.mkdir(self.work)
        self.fs.sync_dir(self.root.parent)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.fs.locked(self.work / LOCK))
            except BlockingIOError as e:
                raise OutputError(f"{self.root}: another shardxform process is working here") from e
            yield

    def bind(self) -> None:
        """Write plan.json, unless this plan is bound already, and remove the hidden states of any other."""
        bound = read_record(self.work / PLAN)
        if bound is None or bound.fingerprint != self.plan.fingerprint:
            self.fs.write_atomic(self.work / PLAN, record_of(self.plan).to_bytes(), self.work)
        self._remove_states(but=self.states)

    def bring_sidecars(self) -> None:
        """Fetch the sidecars of a repository now, rather than when hours of work are to be committed.

        Raises:
            RemoteError: the hub does not give them.
            CheckpointError: it gives one that no client can read.

        """
        if self.plan.remote:
            for name in self.plan.sidecars:
                refuse_faulty_file(self.plan.remote.fetch(name), name)

    @contextlib.contextmanager
    def open_source(self) -> Iterator[SourceReader]:
        """Open what the steps read."""
        with contextlib.closing(open_source(self.plan.source, self.plan.remote, self.fs)) as source:
            yield source

    def missing(self) -> set[int]:
        """Numbers of the shards that are neither complete nor begun: to be made, and their steps to be done again."""
        return {
            number
            for number, shard in enumerate(self.plan.shards)
            if not (holds(self.root / shard.name, shard) or holds(self.partial(number), shard))
        }

    def create(self, shards: set[int]) -> None:
        """Make shards with their final headers and their full sizes, under names that no loader opens."""
        for number in sorted(shards):
            self._create(self.partial(number), self.plan.shards[number])
        if shards:
            self.fs.sync_dir(self.root)

    def reopen(self, shards: set[int]) -> None:
        """Take back published shards that have steps to be done again."""
        taken = [n for n in sorted(shards) if not holds(self.partial(n), self.plan.shards[n])]
        for number in taken:
            self.fs.rename(self.root / self.plan.shards[number].name, self.partial(number))
        if taken:
            self.fs.sync_dir(self.root)

    def publish(self) -> None:
        """Rename every complete shard to its final name."""
        for number, shard in enumerate(self.plan.shards):
            if self.partial(number).exists():
                self.fs.rename(self.partial(number), self.root / shard.name)
        self.fs.sync_dir(self.root)

    def commit(self, facts: Mapping[str, Any], digests: Mapping[str, str]) -> None:
        """Write sidecars, index and provenance, and config.json last; then remove the work directory.

        Args:
            facts: what the steps found, for the record.
            digests: of every tensor, for the record.

        Raises:
            ExecutionError: a sidecar of the source changed since it was planned.
            OutputError: a file that is not ours stands in the way.

        """
        for name, digest in self.plan.sidecars.items():
            data = (self.plan.source / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ExecutionError(f"{self.plan.origin}/{name}: changed while shardxform was running")
            if "/" in name:
                self.fs.mkdir((self.root / name).parent)
            self._put(name, data)
        if self.plan.index:
            self._put(INDEX, self.plan.index)
        self._put(PROVENANCE, self._record(facts, digests).to_bytes())
        self._put(CONFIG, self.plan.config)
        self.clean()

    def clean(self) -> None:
        """Remove the work directory; the lock goes last."""
        self._remove_states()
        names = sorted((path.name for path in self.work.iterdir()), key=lambda name: name == LOCK)
        for name in names:
            self.fs.remove_if_there(self.work / name)
        self.fs.rmdir(self.work)
        self.fs.sync_dir(self.root)

    def discard(self, state: State, files: list[Path]) -> None:
        """Remove `files`, an earlier output of ours, so that the work can start over.

        Its record goes to plan.json, so that a crash leaves an unfinished output of ours rather than a foreign one, and
        config.json goes first, so that no moment shows a damaged checkpoint as a whole one.
        """
        assert state.record is not None
        begun = replace(state.record, digests=None, summary={}, notes=(), facts={})
        self.fs.write_atomic(self.work / PLAN, begun.to_bytes(), self.work)
        self.fs.remove_if_there(self.journal)
        self._remove_states()
        for path in files:
            self.fs.remove_if_there(path)
        self.fs.sync_dir(self.root)

    def _remove_states(self, but: Path | None = None) -> None:
        """Remove hidden states, but for those in `but`; some of earlier versions lie in the work directory itself."""
        for path in self.work.iterdir():
            if path.name.endswith(".hidden"):
                self.fs.remove_if_there(path)
            elif path.name.startswith(STATES) and path != but:
                for state in path.iterdir():
                    self.fs.remove_if_there(state)
                self.fs.rmdir(path)

    def _record(self, facts: Mapping[str, Any], digests: Mapping[str, str]) -> Record:
        """What shardxform.json says: how the output was made, and what it holds."""
        empty = {entry.spec.name: tensor_digest(()) for shard in self.plan.shards for entry in shard.entries}
        return replace(
            record_of(self.plan),
            digests={**empty, **digests},
            summary=self.plan.summary,
            notes=self.plan.notes,
            facts=facts,
        )

    def _allocated(self) -> int:
        total = 0
        for number, shard in enumerate(self.plan.shards):
            for path in (self.partial(number), self.root / shard.name):
                with contextlib.suppress(FileNotFoundError):
                    total += min(path.stat().st_blocks * 512, shard.nbytes)
        return total

    def _create(self, path: Path, shard: ShardPlan) -> None:
        self.fs.remove_if_there(path)  # a link that somebody put there would be followed
        fd = self.fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self.fs.preallocate(fd, shard.nbytes)
            self.fs.write_all(fd, memoryview(shard.head), 0)
            self.fs.sync(fd)
        finally:
            os.close(fd)

    def _put(self, name: str, data: bytes) -> None:
        """Write a small file, unless it is there already; what is there and not ours is left alone."""
        path = self.root / name
        if os.path.lexists(path):
            if not path.is_symlink() and path.read_bytes() == data:
                return
            record = read_record(path) if name == PROVENANCE else None
            if record is None or record.fingerprint != self.plan.fingerprint:
                raise OutputError(f"{path}: stands in the way and is not shardxform's; move it away and run again")
        self.fs.write_atomic(path, data, self.work)
