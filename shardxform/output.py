"""The output directory: whose it is, what state it is in, and the order in which it becomes a checkpoint.

    OUT/.shardxform/plan.json   what this work is bound to          written first
    OUT/.shardxform/journal     steps durably done
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardxform.checkpoint import CONFIG, INDEX, is_plain_name
from shardxform.errors import ExecutionError, OutputError, ResumeError
from shardxform.fsio import FileSystem
from shardxform.plan import Plan, ShardPlan
from shardxform.strictjson import JsonError, parse_object, pretty

__all__ = ["PROVENANCE", "WORK", "Output", "State", "difference"]

WORK: Final = ".shardxform"
PROVENANCE: Final = "shardxform.json"
_PLAN: Final = "plan.json"
_LOCK: Final = "lock"
_PARTIAL: Final = ".partial"


@dataclass(frozen=True, slots=True)
class State:
    """What stands in the output directory: `new`, `unfinished` or `finished`, and the record it was made from."""

    name: str
    record: Mapping[str, Any]


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
    def journal(self) -> Path:
        """Path of the journal."""
        return self.work / "journal"

    # -- before anything is written -----------------------------------------------------------------------------

    def state(self) -> State:
        """Look at the directory, changing nothing.

        Raises:
            OutputError: it is foreign, is no directory, or overlaps the source.
            ResumeError: it holds work bound to other inputs; the message names the first difference.

        """
        self._refuse_overlap()
        if not self.root.exists():
            return State("new", {})
        if not self.root.is_dir():
            raise OutputError(f"{self.root}: expected a directory or nothing, found a file")
        names = {entry.name for entry in os.scandir(self.root)}
        if PROVENANCE in names and CONFIG in names:  # committed, though a crash may have left the work directory
            record = _read_record(self.root / PROVENANCE)
            if record is not None:
                return State("finished", record)
        elif WORK in names:
            record = _read_record(self.work / _PLAN)
            if record is None and names == {WORK}:
                return State("new", {})
            if record is not None:
                return State("unfinished", record)
        elif not names:
            return State("new", {})
        raise OutputError(f"{self.root}: not empty, and not an output of shardxform; name a new directory")

    def refuse_other_plan(self, state: State) -> None:
        """Refuse to go on with, or to report as finished, what was made from other inputs.

        Raises:
            ResumeError: names the first difference.

        """
        if state.name == "new" or state.record.get("fingerprint") == self.plan.fingerprint:
            return
        inputs = state.record.get("inputs")
        where = difference(inputs, self.plan.inputs) if isinstance(inputs, dict) else "unknown inputs"
        verb = "holds unfinished work" if state.name == "unfinished" else "holds an output"
        raise ResumeError(
            f"{self.root}: {verb} made from other inputs: {where or 'the plan itself (another version?)'};"
            " name a new directory, or start over with --force"
        )

    def refuse_too_little_space(self) -> None:
        """Refuse when what is still to be written does not fit.

        Raises:
            OutputError: says how much is needed and how much is free.

        """
        needed = sum(shard.nbytes for shard in self.plan.shards) - self._allocated()
        free = self.fs.free_bytes(self.root)
        if needed > free:
            raise OutputError(f"{self.root}: needs {needed / 1e9:.2f} GB more, but only {free / 1e9:.2f} GB are free")

    def damage(self) -> str:
        """Name the first file of a finished output that is missing or has another header or size; empty if none."""
        for shard in self.plan.shards:
            if self._holds(self.root / shard.name, shard) is not True:
                return shard.name
        return next((name for name in self.plan.files() if not (self.root / name).is_file()), "")

    # -- writing ------------------------------------------------------------------------------------------------

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
                stack.enter_context(self.fs.locked(self.work / _LOCK))
            except BlockingIOError as e:
                raise OutputError(f"{self.root}: another shardxform process is working here") from e
            yield

    def bind(self) -> None:
        """Write plan.json, unless this plan is bound already."""
        path = self.work / _PLAN
        if (_read_record(path) or {}).get("fingerprint") != self.plan.fingerprint:
            self.fs.write_atomic(path, pretty(self._record()).encode(), self.work)

    def refuse_changed_source(self) -> None:
        """Compare the source with what plan.json recorded when the work began.

        Raises:
            ResumeError: a shard was modified since.

        """
        record = _read_record(self.work / _PLAN) or {}
        stamps = record.get("source_mtime_ns", {})
        for shard in self.plan.source_shards:
            if stamps.get(shard.name) != shard.mtime_ns:
                raise ResumeError(
                    f"{self.plan.source / shard.name}: modified since the work in {self.root} began;"
                    " start over with --force"
                )

    def missing(self) -> set[int]:
        """Numbers of the shards that are neither complete nor begun: to be made, and their steps to be done again."""
        return {
            number
            for number, shard in enumerate(self.plan.shards)
            if not (self._holds(self.root / shard.name, shard) or self._holds(self.partial(number), shard))
        }

    def create(self, shards: set[int]) -> None:
        """Make shards with their final headers and their full sizes, under names that no loader opens."""
        for number in sorted(shards):
            self._create(self.partial(number), self.plan.shards[number])
        if shards:
            self.fs.sync_dir(self.root)

    def partial(self, number: int) -> Path:
        """Path of a shard while it is being filled."""
        return self.root / (self.plan.shards[number].name + _PARTIAL)

    def publish(self) -> None:
        """Rename every complete shard to its final name."""
        for number, shard in enumerate(self.plan.shards):
            if self.partial(number).exists():
                self.fs.rename(self.partial(number), self.root / shard.name)
        self.fs.sync_dir(self.root)

    def commit(self, facts: Mapping[str, Any]) -> None:
        """Write sidecars, index and provenance, and config.json last; then remove the work directory.

        Args:
            facts: what the steps found, for the provenance.

        Raises:
            ExecutionError: a sidecar of the source changed since it was planned.
            OutputError: a file that is not ours stands in the way.

        """
        for name, digest in self.plan.sidecars.items():
            data = (self.plan.source / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ExecutionError(f"{self.plan.source / name}: changed while shardxform was running")
            if "/" in name:
                self.fs.mkdir((self.root / name).parent)
            self._put(name, data)
        if self.plan.index:
            self._put(INDEX, self.plan.index)
        self._put(PROVENANCE, self.provenance(facts))
        self._put(CONFIG, self.plan.config)
        self.clean()

    def clean(self) -> None:
        """Remove the work directory."""
        for path in sorted(self.work.iterdir(), key=lambda path: path.name == _LOCK):
            self.fs.remove_if_there(path)
        self.fs.rmdir(self.work)
        self.fs.sync_dir(self.root)

    def removable(self, state: State) -> list[Path]:
        """List the files of an earlier output of ours, config.json first; changes nothing.

        Raises:
            OutputError: a file was changed since shardxform wrote it, or the record is not to be believed.

        """
        files = state.record.get("files")
        if not isinstance(files, dict) or not all(is_plain_name(name.replace("/", "-")) for name in files):
            raise OutputError(f"{self.root}: its record names no files; remove the directory yourself")
        out: list[Path] = []
        for name, digest in sorted({**files, PROVENANCE: None}.items(), key=lambda item: item[0] != CONFIG):
            path = self.root / name
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise OutputError(f"{self.root}: its record names {name!r}; remove the directory yourself")
            if path.is_file() and digest and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise OutputError(f"{path}: changed since shardxform wrote it; move it away, then use --force again")
            out += [path, path.with_name(path.name + _PARTIAL)]
        return out

    def discard(self, state: State, files: list[Path]) -> None:
        """Remove `files`, an earlier output of ours, so that the work can start over.

        Its record goes to plan.json, so that a crash leaves an unfinished output of ours rather than a foreign one, and
        config.json goes first, so that no moment shows a damaged checkpoint as a whole one.
        """
        self.fs.write_atomic(self.work / _PLAN, pretty(dict(state.record)).encode(), self.work)
        self.fs.remove_if_there(self.journal)
        for path in files:
            self.fs.remove_if_there(path)
        self.fs.sync_dir(self.root)

    # -- records ------------------------------------------------------------------------------------------------

    def provenance(self, facts: Mapping[str, Any]) -> bytes:
        """Bytes of shardxform.json: what the output was made from. No clock, no host: same inputs, same bytes."""
        record = self._record()
        del record["source_mtime_ns"]
        told = {"summary": dict(self.plan.summary), "notes": list(self.plan.notes), "facts": dict(facts)}
        return pretty({**record, **told}).encode()

    def _record(self) -> dict[str, Any]:
        """What binds this directory to the plan. Small files carry their SHA-256, shards (None) their header's."""
        small = dict(self.plan.sidecars)
        small[CONFIG] = hashlib.sha256(self.plan.config).hexdigest()
        if self.plan.index:
            small[INDEX] = hashlib.sha256(self.plan.index).hexdigest()
        return {
            "format": "shardxform.provenance",
            "version": 1,
            "fingerprint": self.plan.fingerprint,
            "inputs": self.plan.inputs,
            "files": {name: small.get(name) for name in self.plan.files()},
            "source_mtime_ns": {shard.name: shard.mtime_ns for shard in self.plan.source_shards},
        }

    # -- helpers ------------------------------------------------------------------------------------------------

    def _refuse_overlap(self) -> None:
        out, source = self.root.resolve(), self.plan.source.resolve()
        if out == source or out in source.parents or source in out.parents:
            raise OutputError(f"{self.root}: overlaps the source {self.plan.source}; name a directory outside it")

    def _allocated(self) -> int:
        total = 0
        for number, shard in enumerate(self.plan.shards):
            for path in (self.partial(number), self.root / shard.name):
                with contextlib.suppress(FileNotFoundError):
                    total += min(path.stat().st_blocks * 512, shard.nbytes)
        return total

    def _holds(self, path: Path, shard: ShardPlan) -> bool:
        """Whether `path` is this shard: its size and its header."""
        try:
            with path.open("rb") as file:
                return os.fstat(file.fileno()).st_size == shard.nbytes and file.read(len(shard.head)) == shard.head
        except FileNotFoundError:
            return False

    def _create(self, path: Path, shard: ShardPlan) -> None:
        fd = self.fs.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            self.fs.preallocate(fd, shard.nbytes)
            self.fs.write_all(fd, memoryview(shard.head), 0)
            self.fs.sync(fd)
        finally:
            os.close(fd)

    def _put(self, name: str, data: bytes) -> None:
        path = self.root / name
        if path.exists():
            if path.read_bytes() != data:
                raise OutputError(f"{path}: stands in the way and is not shardxform's; move it away and run again")
            return
        self.fs.write_atomic(path, data, self.work)


def difference(old: object, new: object, path: str = "") -> str:
    """Describe the first place where two records differ, or return an empty string."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(key for key in old if key not in new)]:
            if found := difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key)):
                return found
        return ""
    plain_old, plain_new = (list(v) if isinstance(v, tuple) else v for v in (old, new))
    return "" if plain_old == plain_new else f"{path}: was {_brief(old)}, now {_brief(new)}"


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = parse_object(path.read_bytes())
    except (OSError, JsonError):
        return None
    return record if record.get("format") == "shardxform.provenance" else None


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
