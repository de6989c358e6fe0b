"""The work directory of a forward pass: hidden states between blocks, and what every step gave.

    WORK/progress.json          what it is bound to, and the facts of every step that is durably done
    WORK/<chain>-0003.hidden    hidden states [N, T, H] that enter block 3
    WORK/lock                   held as long as a process works here

A step's hidden states are made durable, then the step is recorded, then the states it read are removed: killed at any
instant, the next run goes on after the last recorded step. Reads and writes go through small buffers, not a mapping,
whose pages would count as memory of the process.
"""

# N: sequences, T: positions, H: hidden size.

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from shardxform.base.file_system import LOCK, FileSystem, OwnedDir, items_of
from shardxform.base.strict_json import JsonError, dumps, parse_object
from shardxform.base.tensors import show_size
from shardxform.errors import ExecutionError, OutputError, ResumeError
from shardxform.execution.output import difference

__all__ = ["HiddenFile", "WorkDir", "refuse_inside", "refuse_other_work"]

_FORMAT: Final = "shardxform.work"
_PROGRESS: Final = "progress.json"
_SPLIT: Final = "split.json"  # of `cluster.scoring`
_OURS: Final = re.compile(r"progress\.json(\.tmp)?|lock|[a-z]+-\d{4,}\.hidden(\.tmp)?")


class WorkDir(OwnedDir):
    """Owns a work directory; use as a context manager, which holds its lock."""

    def __init__(self, root: Path, inputs: Mapping[str, object], fs: FileSystem | None = None) -> None:
        """Name it; `inputs` is plain JSON that says what decides its content, all of which must be equal to go on."""
        super().__init__(root, fs or FileSystem())
        self._inputs = inputs
        self._done: dict[str, Mapping[str, Any]] = {}

    def refuse_foreign(self) -> None:
        """Refuse what shardxform did not make, and work that only goes on on a cluster."""
        for entry in items_of(self.root, "a work directory"):
            if entry.name == _SPLIT:
                raise ResumeError(
                    f"{self.root}: holds unfinished work of a run with `ray`; go on with it, or remove it"
                )
            if not _OURS.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                raise OutputError(f"{entry.path}: not shardxform's; move it away, or name another work directory")

    def load(self) -> None:
        """Read the steps that are done, or begin the record."""
        path = self.root / _PROGRESS
        if path.exists():
            self._done = self._read(path)
        else:
            self._write()

    # -- steps --------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> Mapping[str, Mapping[str, Any]]:
        """Facts of the steps that are done, by name, in order."""
        return self._done

    def record(self, step: str, facts: Mapping[str, object]) -> None:
        """Have a step durably done; its hidden states must be durable already.

        Raises:
            ExecutionError: one of the facts is NaN or infinite.

        """
        try:
            dumps(facts)
        except ValueError as e:
            raise ExecutionError(f"{self.root}: {step}: what it gave is not finite") from e
        self._done[step] = facts
        self._write()

    # -- hidden states ------------------------------------------------------------------------------------------

    def hidden(self, chain: str, number: int, shape: tuple[int, int, int], dtype: torch.dtype) -> HiddenFile:
        """Name the hidden states of a chain that enter block `number`; nothing is opened yet."""
        return HiddenFile(self.root / f"{chain}-{number:04d}.hidden", shape, dtype, self.fs)

    def refuse_too_little_space(self, nbytes: int) -> None:
        """Refuse when `nbytes` more do not fit on the disk.

        Raises:
            OutputError: says how much is needed and how much is free.

        """
        there = sum(entry.stat().st_size for entry in os.scandir(self.root))
        free = self.fs.free_bytes(self.root)
        if nbytes - there > free:
            raise OutputError(
                f"{self.root}: hidden states need {show_size(nbytes - there)} more, but only {show_size(free)} are free"
            )

    def remove(self) -> None:
        """Remove the directory and what is ours in it; what is not ours stays."""
        for entry in sorted(os.scandir(self.root), key=lambda entry: entry.name == LOCK):
            if _OURS.fullmatch(entry.name):
                self.fs.remove_if_there(Path(entry.path))
        with contextlib.suppress(OSError):
            self.fs.rmdir(self.root)

    # -- the record ---------------------------------------------------------------------------------------------

    def _read(self, path: Path) -> dict[str, Mapping[str, Any]]:
        try:
            record = parse_object(path.read_bytes())
        except (OSError, JsonError) as e:
            raise ResumeError(f"{path}: damaged: {e}; remove {self.root} and start over") from e
        steps = record.get("steps")
        whole = isinstance(steps, dict) and all(isinstance(facts, dict) for facts in steps.values())
        if record.get("format") != _FORMAT or not isinstance(steps, dict) or not whole:
            raise ResumeError(f"{path}: not a record of shardxform's; name another work directory")
        refuse_other_work(self.root, record.get("inputs"), self._inputs)
        return steps

    def _write(self) -> None:
        record = {"format": _FORMAT, "inputs": self._inputs, "steps": self._done}
        self.fs.write_atomic(self.root / _PROGRESS, dumps(record).encode(), self.root)


def refuse_other_work(root: Path, bound: object, inputs: Mapping[str, object]) -> None:
    """Refuse to go on with unfinished work of other inputs.

    Raises:
        ResumeError: names the first difference.

    """
    if bound == inputs:
        return
    where = difference(bound, inputs) if isinstance(bound, dict) else "of another version"
    raise ResumeError(f"{root}: holds unfinished work of other inputs: {where}; remove it, or name another with `work`")


def refuse_inside(path: Path, roots: Iterable[Path]) -> None:
    """Refuse to write to a path that is or lies in one of the checkpoints `roots`, which are never written to.

    Raises:
        OutputError: names the checkpoint.

    """
    real = Path(os.path.realpath(path))
    for root in roots:
        if Path(os.path.realpath(root)) in (real, *real.parents):
            raise OutputError(f"{path}: lies in the checkpoint {root}, which is only read; name a place outside it")


class HiddenFile:
    """Hidden states [N, T, H] of one chain between two blocks, on disk."""

    def __init__(
        self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, fs: FileSystem, mark: str = ""
    ) -> None:
        """Name it; `mark` sets apart what several processes may be writing at once."""
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._fs = fs
        self._mark = mark

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @contextlib.contextmanager
    def writing(self) -> Iterator[HiddenWriter]:
        """Make the file anew; durable when the block ends without an error."""
        temporary = self.path.with_name(f"{self.path.name}{self._mark}.tmp")
        fd = self._fs.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            self._fs.truncate(fd, self.nbytes)
            yield HiddenWriter(self, fd, self._fs)
            self._fs.sync(fd)
        finally:
            os.close(fd)
        self._fs.rename(temporary, self.path)  # a file of that name is whole
        self._fs.sync_dir(self.path.parent)

    @contextlib.contextmanager
    def reading(self) -> Iterator[HiddenReader]:
        """Open the file.

        Raises:
            ExecutionError: it is missing or has another size than its shape says.

        """
        try:
            fd = self._fs.open(self.path, os.O_RDONLY)
        except FileNotFoundError as e:
            raise ExecutionError(f"{self.path}: missing; remove {self.path.parent} and start over") from e
        try:
            if os.fstat(fd).st_size != self.nbytes:
                raise ExecutionError(f"{self.path}: damaged; remove {self.path.parent} and start over")
            yield HiddenReader(self, fd, self._fs)
        finally:
            os.close(fd)

    def is_whole(self) -> bool:
        """Whether the file is there, with the size that its shape says."""
        return self.path.is_file() and not self.path.is_symlink() and self.path.stat().st_size == self.nbytes

    def remove(self) -> None:
        """Remove the file; fine when it is gone."""
        self._fs.remove_if_there(self.path)


class _Open:
    def __init__(self, file: HiddenFile, fd: int, fs: FileSystem) -> None:
        self._file = file
        self._fd = fd
        self._fs = fs
        self._row = file.nbytes // file.shape[0]


class HiddenReader(_Open):
    """Hidden states open for reading."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[N, T, H]."""
        return self._file.shape

    def rows(self, start: int, stop: int, length: int | None = None) -> torch.Tensor:
        """Hidden states of sequences `start`..`stop - 1`, [stop - start, T, H], in memory of their own.

        With a `length`, only the first so many positions are read.
        """
        _, longest, width = self._file.shape
        row = self._row // longest * (length or longest)
        buffer = np.empty((stop - start) * row, np.uint8)
        for at, piece in _rows(start, stop, self._row, row):
            self._fs.read_exact_into(self._fd, buffer.data[piece], at)
        return torch.from_numpy(buffer).view(self._file.dtype).view(stop - start, length or longest, width)


class HiddenWriter(_Open):
    """Hidden states open for writing."""

    def put(self, start: int, hidden_BTH: torch.Tensor) -> None:
        """Write the hidden states of sequences `start`.. ."""
        data = hidden_BTH.to("cpu", self._file.dtype).contiguous().view(torch.uint8).numpy().reshape(-1).data
        count = len(hidden_BTH)
        for at, piece in _rows(start, start + count, self._row, len(data) // count):
            self._fs.write_all(self._fd, data[piece], at)


def _rows(start: int, stop: int, stored: int, held: int) -> Iterator[tuple[int, slice]]:
    """Places, in a file of rows of `stored` bytes and in memory, of the first `held` of each; whole rows at once."""
    if stored == held:
        yield start * stored, slice(0, (stop - start) * held)
        return
    for number, row in enumerate(range(start, stop)):
        yield row * stored, slice(number * held, (number + 1) * held)
