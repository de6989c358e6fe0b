"""Writing the output directory, in the order in which it becomes a checkpoint.

    OUT/.shardxform/plan.json   what this work is bound to          written first
    OUT/.shardxform/journal     steps durably done
    OUT/.shardxform/states-*/   hidden states of the plan with these digits: no other plan takes them for its own
    OUT/*.safetensors.partial   final header, preallocated          filled in any order
    OUT/*.safetensors           published: renamed when complete
    OUT/<sidecars>, index, shardxform.json
    OUT/config.json             the commit: before it, no loader takes OUT for a checkpoint
    OUT/*.gguf                  of an output in GGUF, which has no index and no config.json: the last one is the commit
    OUT/.shardxform/            removed last

A crash between any two of these leaves what the next run of the same command goes on from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Literal

from shardxform.base import computing
from shardxform.base.digests import tensor_digest
from shardxform.base.file_system import FileSystem, SourceReader, not_a_directory
from shardxform.base.tensors import show_size
from shardxform.checkpoint.identity import names_of, values_difference
from shardxform.checkpoint.record import PROVENANCE, Record, ShardRecord, read_record
from shardxform.checkpoint.remote.repository import open_source
from shardxform.checkpoint.sidecars import refuse_faulty_file
from shardxform.checkpoint.table import CONFIG, INDEX, WORK
from shardxform.errors import ExecutionError, OutputError, ResumeError
from shardxform.plan.plan import Plan, ShardPlan

__all__ = [
    "JOURNAL",
    "LOCK",
    "PARTIAL",
    "PLAN",
    "SCHEDULE",
    "STATES",
    "WORK",
    "Output",
    "State",
    "damage",
    "difference",
    "holds",
    "is_of",
    "is_ours",
    "last_of",
    "made_by_others",
    "record_of",
    "refuse_obstacles",
    "refuse_other_plan",
    "removable",
    "state_of",
    "states_of",
]


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
        """Rename every complete shard to its final name, but for one that is the commit."""
        for number, shard in enumerate(self.plan.shards):
            if shard.name != self.plan.last and self.partial(number).exists():
                self.fs.rename(self.partial(number), self.root / shard.name)
        self.fs.sync_dir(self.root)

    def commit(self, facts: Mapping[str, object], digests: Mapping[str, str]) -> None:
        """Write sidecars, index and provenance, and the file that is the commit last; then remove the work directory.

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
        if self.plan.last == CONFIG:
            self._put(CONFIG, self.plan.config)
        else:
            self._publish_last()
        self.clean()

    def _publish_last(self) -> None:
        """Rename the shard that is the commit."""
        last = len(self.plan.shards) - 1
        if self.partial(last).exists():
            self.fs.rename(self.partial(last), self.root / self.plan.last)
        self.fs.sync_dir(self.root)

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
        the file that was the commit goes first, so that no moment shows a damaged checkpoint as a whole one.
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

    def _record(self, facts: Mapping[str, object], digests: Mapping[str, str]) -> Record:
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


# -- looking at a directory ---------------------------------------------------------------------------------------


PLAN: Final = "plan.json"
LOCK: Final = "lock"
JOURNAL: Final = "journal"
PARTIAL: Final = ".partial"
STATES: Final = "states-"  # begins the name of a directory of hidden states, and a fingerprint's first digits end it
SCHEDULE: Final = "schedule.json"  # beside hidden states: steps that blocks are healed by within a time
_STATE_FILES: Final = (".hidden", ".tmp", SCHEDULE)
_PIECE: Final = 1 << 20  # of a header that is compared
_MOST_SHOWN: Final = 60  # characters of a value in a message
_DIGEST: Final = re.compile("[0-9a-f]{64}")
_STATES: Final = re.compile(STATES + "[0-9a-f]{16}")
_DIGESTS: Final = ("windows", "values")  # keys of digests, which say nothing of what they are of


@dataclass(frozen=True, slots=True)
class State:
    """What stands in the output directory, and the record it was made from."""

    name: Literal["new", "unfinished", "finished"]
    record: Record | None = None


def state_of(root: Path, plan: Plan) -> State:
    """Look at an output directory.

    Raises:
        OutputError: it is foreign, is no directory, or overlaps the source.

    """
    _refuse_file_above(root)
    _refuse_overlap(root, plan)
    if not os.path.lexists(root):
        return State("new")
    if not root.is_dir():
        raise OutputError(f"{root}: expected a directory or nothing, found something else")
    names = {entry.name for entry in os.scandir(root)}
    _refuse_foreign_work(root / WORK)
    committed = read_record(root / PROVENANCE)
    if committed is not None and (last := last_of(committed)) in names:
        left = WORK in names  # a crash may have left the work directory behind
        if not left or is_ours(root / last, committed.files.get(last), committed.shards.get(last)):
            return State("finished", committed)
    begun = read_record(root / WORK / PLAN)
    if begun is not None:
        return State("unfinished", begun)
    if names <= {WORK}:
        return State("new")
    raise OutputError(f"{root}: not empty, and not an output of shardxform; name a new directory")


def last_of(record: Record) -> str:
    """Name of the file that was the commit of an output: config.json, or of GGUF, which has none, the last shard."""
    return CONFIG if CONFIG in record.files else max(record.shards, default=CONFIG)


def refuse_other_plan(root: Path, plan: Plan, state: State) -> None:
    """Refuse to go on with, or to report as finished, what was made from other inputs.

    Raises:
        ResumeError: names the first difference.

    """
    if state.record is None or is_of(state, plan):
        return
    where = difference(state.record.inputs, plan.inputs, names_of(plan.source_shards))
    verb = "holds unfinished work" if state.name == "unfinished" else "holds an output"
    if where.startswith("`source.repository`: was 'hf://"):
        where = f"{where}; name that commit after @ to go on"
    raise ResumeError(
        f"{root}: {verb} made from other inputs: {where or 'the plan itself (another version?)'};"
        " name a new directory, or start over with `force`"
    )


def is_of(state: State, plan: Plan) -> bool:
    """Whether what stands there is of this plan; what computed it does not count once it is finished."""
    record, wanted = state.record, record_of(plan)
    if record is None or record.fingerprint == plan.fingerprint:
        return record is not None
    same = (record.files, record.shards) == (wanted.files, wanted.shards) and state.name == "finished"
    return same and not difference(computing.without(record.inputs), computing.without(plan.inputs))


def made_by_others(state: State, plan: Plan) -> str:
    """Say what else computed a finished output than would compute it now; empty where nothing did."""
    found = state.record.inputs.get(computing.KEY, {}) if state.record else {}
    return difference(found, plan.inputs.get(computing.KEY, {}))


def refuse_obstacles(root: Path, plan: Plan) -> None:
    """Refuse when a file that shardxform did not write stands under a name that it is going to write.

    Raises:
        OutputError: names the file.

    """
    for shard in plan.shards:
        path = root / shard.name
        if os.path.lexists(path) and not holds(path, shard):
            raise OutputError(f"{path}: stands in the way and is not shardxform's; move it away and run again")
    if not any(os.path.lexists(root / name) for name in plan.files()):  # as a rule; the index is not made for nothing
        return
    for name, digest in record_of(plan).files.items():
        path = root / name
        if digest and os.path.lexists(path) and _sha256(path) != digest:
            raise OutputError(f"{path}: stands in the way and is not shardxform's; move it away and run again")


def damage(root: Path, plan: Plan) -> str:
    """Name the first file of a finished output that is not as it was written; empty if none.

    Shards are judged by size and header. A README may be rewritten: it is the publisher's.
    """
    for shard in plan.shards:
        if not holds(root / shard.name, shard):
            return shard.name
    for name, digest in record_of(plan).files.items():
        if digest and _sha256(root / name) != digest and not name.lower().startswith("readme"):
            return name
    return ""


def removable(root: Path, state: State) -> list[Path]:
    """List the files of an earlier output of ours, the one that was the commit first.

    Raises:
        OutputError: a file was changed since shardxform wrote it, or the record is not to be believed.

    """
    assert state.record is not None
    files, shards = state.record.files, state.record.shards
    out: list[Path] = []
    last = last_of(state.record)
    for name, digest in sorted({**files, PROVENANCE: None}.items(), key=lambda item: item[0] != last):
        path = root / name
        if not _is_inside(root, name):
            raise OutputError(f"{root}: its record names {name!r}; remove the directory yourself")
        if os.path.lexists(path) and name != PROVENANCE and not is_ours(path, digest, shards.get(name)):
            raise OutputError(f"{path}: changed since shardxform wrote it; move it away, then use `force` again")
        out.append(path)
        if name in shards:
            out.append(path.with_name(path.name + PARTIAL))
    return out


def is_ours(path: Path, digest: str | None, shard: ShardRecord | None) -> bool:
    """Whether a file is as a record has it: a small one by SHA-256, a shard by its size and its header's SHA-256."""
    if digest is not None:
        return _sha256(path) == digest
    if shard is None:
        return False
    with _opened(path) as file:
        if file is None or os.fstat(file.fileno()).st_size != shard.nbytes:
            return False
        return hashlib.sha256(file.read(shard.head_bytes)).hexdigest() == shard.head_sha256


def holds(path: Path, shard: ShardPlan) -> bool:
    """Whether `path` is this shard, by its size and its header."""
    with _opened(path) as file:
        if file is None or os.fstat(file.fileno()).st_size != shard.nbytes:
            return False
        pieces = (shard.head[at : at + _PIECE] for at in range(0, len(shard.head), _PIECE))
        return all(file.read(len(piece)) == piece for piece in pieces)


def record_of(plan: Plan) -> Record:
    """What binds a directory to a plan; no facts and no digests yet."""
    small = dict(plan.sidecars)
    if plan.last == CONFIG:
        small[CONFIG] = hashlib.sha256(plan.config).hexdigest()
    if plan.index:
        small[INDEX] = hashlib.sha256(plan.index).hexdigest()
    return Record(
        fingerprint=plan.fingerprint,
        inputs=plan.inputs,
        files={name: small.get(name) for name in plan.files()},
        shards={s.name: ShardRecord(s.nbytes, len(s.head), hashlib.sha256(s.head).hexdigest()) for s in plan.shards},
    )


def difference(old: object, new: object, names: Mapping[str, Sequence[str]] | None = None, path: str = "") -> str:
    """Describe the first field in which two records differ, or return an empty string.

    Args:
        old: what was recorded.
        new: what is asked for now.
        names: shard of the source -> its tensors, by which other values are named.
        path: where both stand, for the description.

    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if path and _is_other_text(old, new):
            return f"`{path}`: the text of {_brief(new['data'])} has changed since"
        keys = [*new, *(key for key in old if key not in new)]
        for key in sorted(keys, key=_DIGESTS.__contains__):  # what they were made from comes first
            inner = f"{path}.{key}" if path else str(key)
            if inner.endswith("source.values") and old.get(key) != new.get(key):
                return f"`{inner}`: {values_difference(old.get(key), new.get(key), names or {})}"
            if found := difference(old.get(key), new.get(key), names, inner):
                return found
        return ""
    plain_old, plain_new = (list(v) if isinstance(v, tuple) else v for v in (old, new))
    return "" if plain_old == plain_new else f"`{path}`: was {_brief(old)}, now {_brief(new)}"


def _is_other_text(old: Mapping[object, object], new: Mapping[object, object]) -> bool:
    """Whether two records of calibration data name the same files, and they held something else."""
    names = all(isinstance(each.get(key), str) for each in (old, new) for key in ("data", "sha256"))
    same = all(old.get(key) == new.get(key) for key in ("data", "files"))
    return names and same and old["sha256"] != new["sha256"]


def _refuse_file_above(root: Path) -> None:
    """Refuse an output that would lie below a file."""
    for folder in reversed(root.absolute().parents):
        if os.path.lexists(folder) and not folder.is_dir():
            raise OutputError(f"{root}: cannot be made: {not_a_directory(folder)}: {folder}")


def _refuse_overlap(root: Path, plan: Plan) -> None:
    """Refuse an output in, around or behind the source: by its path, and by where its files really lie."""
    out, source = Path(os.path.realpath(root)), Path(os.path.realpath(plan.source))
    same = root.is_dir() and plan.source.is_dir() and os.path.samefile(root, plan.source)
    names = [*(shard.name for shard in plan.source_shards), *plan.sidecars, CONFIG]
    inside = (Path(os.path.realpath(plan.source / name)) for name in names)
    below = source in out.parents and not plan.source_name  # one file of a folder is not the folder
    if same or below or out == source or out in source.parents or any(out in p.parents for p in inside):
        raise OutputError(f"{root}: overlaps the source {plan.origin}; name a directory outside it")


def _refuse_foreign_work(work: Path) -> None:
    """Refuse a work directory that shardxform did not make: it is going to be removed."""
    if not os.path.lexists(work):
        return
    if not stat.S_ISDIR(os.lstat(work).st_mode):
        raise OutputError(f"{work}: expected shardxform's own directory, found something else; move it away")
    for entry in os.scandir(work):
        if _STATES.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            foreign = [each for each in os.scandir(entry.path) if not _is_plain(each, _STATE_FILES)]
        else:
            foreign = [entry] if not _is_plain(entry, (LOCK, JOURNAL, PLAN, ".hidden", ".tmp")) else []
        if foreign:
            raise OutputError(f"{foreign[0].path}: not shardxform's; move it away")


def _is_plain(entry: os.DirEntry[str], endings: tuple[str, ...]) -> bool:
    """Whether an entry is a file of its own whose name ends like one of ours."""
    return entry.name.endswith(endings) and entry.is_file(follow_symlinks=False)


def states_of(work: Path, fingerprint: str) -> Path:
    """Where the hidden states of a plan lie, in the work directory of its output."""
    return work / f"{STATES}{fingerprint[:16]}"


def _is_inside(root: Path, name: object) -> bool:
    """Whether a recorded name is a plain file of the directory, or one level below, with no link on the way."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or len(pure.parts) > 2 or WORK in pure.parts:
        return False
    return not (root / pure.parts[0]).is_symlink() and not (root / name).is_symlink()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | None]:
    """Open a regular file for reading; None for anything else: a link, a folder, a pipe, nothing."""
    with contextlib.ExitStack() as stack:
        file: BinaryIO | None = None
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                file = stack.enter_context(path.open("rb"))
        yield file


def _sha256(path: Path) -> str:
    with _opened(path) as file:
        return hashlib.sha256(file.read()).hexdigest() if file is not None else ""


def _brief(value: object) -> str:
    """A value as it is written, cut where that is long: a digest after a few digits, all else so that quotes close."""
    if isinstance(value, str):
        if _DIGEST.fullmatch(value):
            return repr(f"{value[:12]}...")
        return repr(value if len(value) <= _MOST_SHOWN or value.startswith("hf://") else f"{value[:_MOST_SHOWN]}...")
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else _CUT.repr(value)


def _cut() -> reprlib.Repr:
    cut = reprlib.Repr()
    cut.maxlist = cut.maxtuple = 6
    cut.maxdict = 2
    cut.maxlevel = 2
    return cut


_CUT: Final = _cut()
