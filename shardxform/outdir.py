"""Looking at an output directory: whose it is, what state it is in, and what stands in the way. Changes nothing.

Only what shardxform recorded, and finds as it recorded it, counts as its own. Links are never its own: it writes files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, Literal

from shardxform.checkpoint import CONFIG, INDEX, WORK
from shardxform.errors import OutputError, ResumeError
from shardxform.fsio import not_a_directory
from shardxform.manifest_import import RECORD_FORMAT
from shardxform.option_names import with_option
from shardxform.plan import Plan, ShardPlan
from shardxform.strictjson import JsonError, parse_object

__all__ = [
    "JOURNAL",
    "LOCK",
    "PARTIAL",
    "PLAN",
    "PROVENANCE",
    "WORK",
    "State",
    "damage",
    "difference",
    "holds",
    "is_ours",
    "read_record",
    "record_of",
    "refuse_obstacles",
    "refuse_other_plan",
    "removable",
    "state_of",
]

PROVENANCE: Final = "shardxform.json"
PLAN: Final = "plan.json"
LOCK: Final = "lock"
JOURNAL: Final = "journal"
PARTIAL: Final = ".partial"
_MAX_RECORD_BYTES: Final = 64 << 20
_MOST_SHOWN: Final = 60  # characters of a value in a message
_DIGEST: Final = re.compile("[0-9a-f]{64}")
_DIGESTS: Final = ("windows", "values")  # keys of digests, which say nothing of what they are of


@dataclass(frozen=True, slots=True)
class State:
    """What stands in the output directory, and the record it was made from."""

    name: Literal["new", "unfinished", "finished"]
    record: Mapping[str, Any]


def state_of(root: Path, plan: Plan) -> State:
    """Look at an output directory.

    Raises:
        OutputError: it is foreign, is no directory, or overlaps the source.

    """
    _refuse_file_above(root)
    _refuse_overlap(root, plan)
    if not os.path.lexists(root):
        return State("new", {})
    if not root.is_dir():
        raise OutputError(f"{root}: expected a directory or nothing, found something else")
    names = {entry.name for entry in os.scandir(root)}
    _refuse_foreign_work(root / WORK)
    committed = read_record(root / PROVENANCE) if CONFIG in names else None
    if committed is not None and (WORK not in names or _sha256(root / CONFIG) == _digest(committed, CONFIG)):
        return State("finished", committed)  # a crash may have left the work directory behind
    begun = read_record(root / WORK / PLAN)
    if begun is not None:
        return State("unfinished", begun)
    if names <= {WORK}:
        return State("new", {})
    raise OutputError(f"{root}: not empty, and not an output of shardxform; name a new directory")


def refuse_other_plan(root: Path, plan: Plan, state: State) -> None:
    """Refuse to go on with, or to report as finished, what was made from other inputs.

    Raises:
        ResumeError: names the first difference.

    """
    if state.name == "new" or state.record.get("fingerprint") == plan.fingerprint:
        return
    inputs = state.record.get("inputs")
    where = difference(inputs, plan.inputs) if isinstance(inputs, dict) else "unknown inputs"
    verb = "holds unfinished work" if state.name == "unfinished" else "holds an output"
    if where.startswith("source.repository: was 'hf://"):
        where = f"{where}; name that commit after @ to go on"
    raise ResumeError(
        f"{root}: {verb} made from other inputs: {with_option(where) or 'the plan itself (another version?)'};"
        " name a new directory, or start over with --force"
    )


def refuse_obstacles(root: Path, plan: Plan) -> None:
    """Refuse when a file that shardxform did not write stands under a name that it is going to write.

    Raises:
        OutputError: names the file.

    """
    small = record_of(plan)["files"]
    for shard in plan.shards:
        path = root / shard.name
        if os.path.lexists(path) and not holds(path, shard):
            raise OutputError(f"{path}: stands in the way and is not shardxform's; move it away and run again")
    for name, digest in small.items():
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
    for name, digest in record_of(plan)["files"].items():
        if digest and _sha256(root / name) != digest and not name.lower().startswith("readme"):
            return str(name)
    return ""


def removable(root: Path, state: State) -> list[Path]:
    """List the files of an earlier output of ours, config.json first.

    Raises:
        OutputError: a file was changed since shardxform wrote it, or the record is not to be believed.

    """
    files, shards = state.record.get("files"), state.record.get("shards")
    if not isinstance(files, dict) or not isinstance(shards, dict):
        raise OutputError(f"{root}: its record names no files; remove the directory yourself")
    out: list[Path] = []
    for name, digest in sorted({**files, PROVENANCE: None}.items(), key=lambda item: item[0] != CONFIG):
        path = root / name
        if not _is_inside(root, name):
            raise OutputError(f"{root}: its record names {name!r}; remove the directory yourself")
        if os.path.lexists(path) and name != PROVENANCE and not is_ours(path, digest, shards.get(name)):
            raise OutputError(f"{path}: changed since shardxform wrote it; move it away, then use --force again")
        out.append(path)
        if name in shards:
            out.append(path.with_name(path.name + PARTIAL))
    return out


def is_ours(path: Path, digest: object, shard: object) -> bool:
    """Whether a file is as a record has it: a small one by SHA-256, a shard by its size and its header's SHA-256."""
    if isinstance(digest, str):
        return _sha256(path) == digest
    if not isinstance(shard, list) or len(shard) != 3 or not all(type(n) is int and n >= 0 for n in shard[:2]):
        return False
    nbytes, head_bytes, head_sha256 = shard
    with _opened(path) as file:
        if file is None or os.fstat(file.fileno()).st_size != nbytes or head_bytes > nbytes:
            return False
        return bool(hashlib.sha256(file.read(head_bytes)).hexdigest() == head_sha256)


def holds(path: Path, shard: ShardPlan) -> bool:
    """Whether `path` is this shard, by its size and its header."""
    with _opened(path) as file:
        return (
            file is not None
            and os.fstat(file.fileno()).st_size == shard.nbytes
            and file.read(len(shard.head)) == shard.head
        )


def record_of(plan: Plan) -> dict[str, Any]:
    """What binds a directory to a plan.

    `files` gives small files their SHA-256 and shards none; `shards` gives those size, header size, header SHA-256.
    """
    small = dict(plan.sidecars)
    small[CONFIG] = hashlib.sha256(plan.config).hexdigest()
    if plan.index:
        small[INDEX] = hashlib.sha256(plan.index).hexdigest()
    return {
        "format": RECORD_FORMAT,
        "version": 1,
        "fingerprint": plan.fingerprint,
        "inputs": plan.inputs,
        "files": {name: small.get(name) for name in plan.files()},
        "shards": {s.name: [s.nbytes, len(s.head), hashlib.sha256(s.head).hexdigest()] for s in plan.shards},
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a record of ours; None when it is none."""
    with _opened(path) as file:
        if file is None or os.fstat(file.fileno()).st_size > _MAX_RECORD_BYTES:
            return None
        try:
            record = parse_object(file.read())
        except (OSError, JsonError):
            return None
    return record if record.get("format") == RECORD_FORMAT else None


def difference(old: object, new: object, path: str = "") -> str:
    """Describe the first place where two records differ, or return an empty string."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if path and _is_other_text(old, new):
            return f"{path}: the text of {_brief(new['data'])} has changed since"
        keys = [*new, *(key for key in old if key not in new)]
        for key in sorted(keys, key=_DIGESTS.__contains__):  # what they were made from comes first
            if found := difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key)):
                return found
        return ""
    if path.endswith("source.values") and old != new:
        return f"{path}: other weights of the same names and shapes"
    plain_old, plain_new = (list(v) if isinstance(v, tuple) else v for v in (old, new))
    return "" if plain_old == plain_new else f"{path}: was {_brief(old)}, now {_brief(new)}"


def _is_other_text(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> bool:
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
    same = root.is_dir() and os.path.samefile(root, plan.source)
    names = [*(shard.name for shard in plan.source_shards), *plan.sidecars, CONFIG]
    inside = (Path(os.path.realpath(plan.source / name)) for name in names)
    if same or out == source or out in source.parents or source in out.parents or any(out in p.parents for p in inside):
        raise OutputError(f"{root}: overlaps the source {plan.origin}; name a directory outside it")


def _refuse_foreign_work(work: Path) -> None:
    """Refuse a work directory that shardxform did not make: it is going to be removed."""
    if not os.path.lexists(work):
        return
    if not stat.S_ISDIR(os.lstat(work).st_mode):
        raise OutputError(f"{work}: expected shardxform's own directory, found something else; move it away")
    for entry in os.scandir(work):
        ours = entry.name in (LOCK, JOURNAL, PLAN) or entry.name.endswith((".hidden", ".tmp"))
        if not ours or not entry.is_file(follow_symlinks=False):
            raise OutputError(f"{entry.path}: not shardxform's; move it away")


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


def _digest(record: Mapping[str, Any], name: str) -> object:
    files = record.get("files")
    return files.get(name) if isinstance(files, dict) else None


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
