"""Reading byte ranges of shards with pread, and saying which shard could not be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from shardxform.fsio import FileSystem
from shardxform.tensors import ByteRange

__all__ = ["Shards", "UnreadableError", "window"]


class UnreadableError(Exception):
    """A shard could not be read."""

    def __init__(self, root: Path, file: str, error: OSError | EOFError) -> None:
        super().__init__((error.strerror if isinstance(error, OSError) else "") or str(error))
        self.root = root
        self.file = file


class Shards:
    """Open shards of any number of checkpoints, closed at the end of a `with` block."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self._files: dict[tuple[Path, str], int] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for fd in self._files.values():
            os.close(fd)

    def read(self, root: Path, ranges: Iterable[ByteRange], into: memoryview) -> None:
        """Fill `into` with `ranges`, one after the other.

        Raises:
            UnreadableError: a shard cannot be opened, or ends too early.

        """
        done = 0
        for part in ranges:
            try:
                if (root, part.file) not in self._files:
                    self._files[root, part.file] = self._fs.open(root / part.file, os.O_RDONLY)
                self._fs.read_exact_into(self._files[root, part.file], into[done : done + part.length], part.offset)
            except (OSError, EOFError) as e:
                raise UnreadableError(root, part.file, e) from e
            done += part.length


def window(ranges: Sequence[ByteRange], start: int, stop: int) -> Iterator[ByteRange]:
    """Bytes `start`..`stop` of the concatenation of `ranges`."""
    home = 0
    for piece in ranges:
        begin, end = max(start, home), min(stop, home + piece.length)
        if begin < end:
            yield ByteRange(piece.file, piece.offset + begin - home, end - begin)
        home += piece.length
        if home >= stop:
            return
