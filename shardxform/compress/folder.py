"""The directory of results beside an output, and the record of what each was made from.

    OUT.compress/compress.json   for every stage: its inputs, what it found, the SHA-256 of its files
    OUT.compress/lock            held as long as a process works here
    OUT.compress/*.work          hidden states of a stage under way

A file is named in the record, durably, before it is written. So whatever is here and as recorded is ours, however often
a run was killed; anything else is never overwritten or removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from shardxform.base import computing
from shardxform.base.file_system import FileSystem
from shardxform.base.strict_json import JsonError, dumps, parse_object, pretty
from shardxform.compress.request import EVALUATE, SCORE, STAGES
from shardxform.errors import ExecutionError, OutputError, ResumeError
from shardxform.execution.output import difference

__all__ = [
    "EVALUATION",
    "KEEP",
    "RECORD",
    "SALIENCY",
    "Entry",
    "Folder",
    "changed",
    "file_sha256",
    "plain",
    "read_entries",
    "refuse_changed",
    "work_of",
]

RECORD: Final = "compress.json"
SALIENCY: Final = "saliency.safetensors"
KEEP: Final = "keep.json"
EVALUATION: Final = "evaluation.json"
_LOCK: Final = "lock"
_FILES: Final = (RECORD, SALIENCY, KEEP, EVALUATION, "saliency.png", "evaluation.png")
_OURS: Final = frozenset({_LOCK, *_FILES, *(f"{name}.tmp" for name in _FILES)})
_FORMAT: Final = "shardxform.compress"
_MAX_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the record says of one stage.

    Attributes:
        inputs: what its result depends on, by name.
        done: whether it is done, if its files are there.
        files: name -> SHA-256 of what it wrote here.
        facts: what it found.

    """

    inputs: Mapping[str, Any]
    done: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Folder:
    """Owns the directory; use as a context manager, which holds its lock."""

    def __init__(self, root: Path, fs: FileSystem | None = None) -> None:
        self.root = root
        self.entries: dict[str, Entry] = {}
        self._fs = fs or FileSystem()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Folder:
        """Make or enter the directory.

        Raises:
            OutputError: something stands there that is not ours, or another process works in it.

        """
        read_entries(self.root)  # refuses what is foreign before anything is written
        with contextlib.ExitStack() as stack:
            try:
                self._fs.mkdir(self.root)
                stack.enter_context(self._fs.locked(self.root / _LOCK))
            except BlockingIOError as e:
                raise OutputError(f"{self.root}: another process works here") from e
            except OSError as e:
                raise OutputError(f"{e.filename or self.root}: {e.strerror or e}") from e
            self.entries = read_entries(self.root)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Let go of the directory; what the disk refused meanwhile becomes an `ExecutionError`."""
        self._stack.close()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise ExecutionError(
                f"{error.filename or self.root}: {error.strerror or error}; run the same command again to go on"
            ) from error

    # -- stages -------------------------------------------------------------------------------------------------

    def is_done(self, stage: str) -> bool:
        """Whether a stage is done and all its results are as it wrote them.

        Raises:
            OutputError: one was changed since.

        """
        entry = self.entries.get(stage)
        return entry is not None and entry.done and all(self._holds(stage, n) for n in entry.files if _is_result(n))

    def is_as(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether a stage was begun with these inputs."""
        return stage in self.entries and self.entries[stage].inputs == plain(inputs)

    def begin(self, stage: str, inputs: Mapping[str, Any], following: Iterable[str]) -> None:
        """A stage is about to be carried out: what it gave before, and what was made from that, no longer counts."""
        self.forget([name for name in following if name in self.entries])
        self._remove_files(stage)
        self.entries[stage] = Entry(inputs=inputs)
        self._write()

    def put(self, stage: str, files: Mapping[str, bytes], facts: Mapping[str, Any] | None = None) -> None:
        """Write the results of a stage that has begun; when all are there it is done."""
        digests = {name: _sha256(data) for name, data in files.items()}
        entry = replace(self.entries[stage], done=True, files=digests, facts=facts or {})
        if entry != self.entries[stage] or not self.is_done(stage):
            self._name_and_write(stage, entry, files)

    def add(self, stage: str, name: str, data: bytes) -> None:
        """Write a further file of a stage that is done, such as a picture."""
        entry = self.entries[stage]
        self._name_and_write(stage, replace(entry, files={**entry.files, name: _sha256(data)}), {name: data})

    def read(self, stage: str, name: str) -> bytes:
        """A result, as the stage wrote it.

        Raises:
            OutputError: it was changed since, or is gone.

        """
        if not self._holds(stage, name):
            raise OutputError(f"{self.root / name}: missing; run the same command again")
        return (self.root / name).read_bytes()

    def forget(self, stages: Iterable[str]) -> None:
        """Remove what stages gave, and their place in the record."""
        for stage in stages:
            self._remove_files(stage)
            self.entries.pop(stage, None)
        self._write()

    # -- files --------------------------------------------------------------------------------------------------

    def _name_and_write(self, stage: str, entry: Entry, files: Mapping[str, bytes]) -> None:
        for name in files:
            self._holds(stage, name)  # refuses what is not ours
        self.entries[stage] = entry
        self._write()
        for name, data in files.items():
            self._fs.write_atomic(self.root / name, data, self.root)

    def _remove_files(self, stage: str) -> None:
        entry = self.entries.get(stage)
        for name in entry.files if entry else ():
            if self._holds(stage, name):
                self._fs.remove_if_there(self.root / name)

    def _holds(self, stage: str, name: str) -> bool:
        """Whether a file is there, as a stage wrote it.

        Raises:
            OutputError: it is there, and is another.

        """
        path = self.root / name
        if not os.path.lexists(path):
            return False
        entry = self.entries.get(stage)
        if entry and name in entry.files and entry.files[name] == file_sha256(path):
            return True
        raise OutputError(f"{path}: not as compress wrote it; move it away and run the same command again")

    def _write(self) -> None:
        stages = {stage: asdict(self.entries[stage]) for stage in STAGES if stage in self.entries}
        record = {"format": _FORMAT, "version": 1, "stages": stages}
        self._fs.write_atomic(self.root / RECORD, pretty(record).encode(), self.root)


def read_entries(root: Path) -> dict[str, Entry]:
    """What the record of a directory says, by stage; nothing where there is none yet. Changes nothing.

    Raises:
        OutputError: the directory holds what is not ours, or its record is damaged.

    """
    if not os.path.lexists(root):
        return {}
    if root.is_symlink() or not root.is_dir():
        raise OutputError(f"{root}: expected a directory of compress or nothing, found something else")
    for item in os.scandir(root):
        ours = item.is_file(follow_symlinks=False) if item.name in _OURS else _is_work(item)
        if not ours:
            raise OutputError(f"{item.path}: not shardxform's; move it away, or name another OUT")
    return _entries(root / RECORD)


def work_of(root: Path, stage: str) -> Path:
    """Where the hidden states of a stage lie while it runs."""
    return root / f"{stage}.work"


def changed(
    entries: Mapping[str, Entry],
    inputs: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, str]:
    """Stages that were made, or begun, with other inputs than these, and the first difference of each.

    What computed a stage counts as long as it is under way. `names` are the tensors of the source's shards.
    """
    found: dict[str, str] = {}
    for stage, new in inputs.items():
        if stage not in entries:
            continue
        pair = entries[stage].inputs, plain(new)
        old, now = map(computing.without, pair) if entries[stage].done else pair
        if where := difference(old, now, names, stage):
            found[stage] = where
    return found


def refuse_changed(root: Path, found: Mapping[str, str], kept: Iterable[str]) -> None:
    """Refuse to go on with the results of other inputs; `kept` are stages whose results remain if it is forced.

    Raises:
        ResumeError: names the first stage and the first difference.

    """
    listed = list(kept)
    spared = f"which keeps what {', '.join(listed)} gave" if listed else "which makes everything again"
    for stage, where in found.items():
        raise ResumeError(
            f"{root}: '{stage}' was made from other inputs: {where}; name another OUT, or start"
            f" over with `force`, {spared}"
        )


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON: tuples are lists, keys are text."""
    return parse_object(dumps(value).encode())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; empty for what is no plain file."""
    if not os.path.lexists(path) or not stat.S_ISREG(os.lstat(path).st_mode):
        return ""
    return _sha256(path.read_bytes())


def _entries(path: Path) -> dict[str, Entry]:
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise JsonError(f"larger than {_MAX_BYTES} bytes")
        record = parse_object(path.read_bytes())
    except (OSError, JsonError) as e:
        raise OutputError(f"{path}: damaged: {e}; remove {path.parent} and start over") from e
    stages = record.get("stages")
    if (record.get("format"), record.get("version")) != (_FORMAT, 1) or not isinstance(stages, dict):
        raise OutputError(f"{path}: not a record of this version; move {path.parent} away and start over")
    if odd := next((name for name in stages if name not in STAGES), None):
        raise OutputError(f"{path}: stages: {odd!r} is none of {', '.join(STAGES)}; remove {path.parent}")
    return {name: _entry(path, name, value) for name, value in stages.items()}


def _entry(path: Path, stage: str, value: object) -> Entry:
    shapes = {"inputs": dict, "done": bool, "files": dict, "facts": dict}
    if not isinstance(value, dict) or any(not isinstance(value.get(key), kind) for key, kind in shapes.items()):
        raise OutputError(f"{path}: stages.{stage}: expected inputs, done, files and facts; remove {path.parent}")
    for name in value["files"]:
        if name not in _FILES:
            raise OutputError(f"{path}: stages.{stage}: names {name!r}, which is no result; remove {path.parent}")
    return Entry(**{key: value[key] for key in shapes})


def _is_work(item: os.DirEntry[str]) -> bool:
    return item.name in (f"{SCORE}.work", f"{EVALUATE}.work") and item.is_dir(follow_symlinks=False)


def _is_result(name: str) -> bool:
    """Whether a stage is not done without the file; pictures are drawn when they are asked for."""
    return not name.endswith(".png")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
