"""Reading byte ranges of shards, and saying which shard could not be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from shardxform.base.file_system import FileSystem
from shardxform.base.readers import SourceReader
from shardxform.base.tensors import ByteRange
from shardxform.checkpoint.remote.repository import open_source

if TYPE_CHECKING:
    from shardxform.checkpoint.remote.repository import Remote

__all__ = ["Shards", "UnreadableError", "window"]


class UnreadableError(Exception):
    """A shard could not be read."""

    def __init__(self, root: Path, file: str, error: OSError | EOFError) -> None:
        super().__init__((error.strerror if isinstance(error, OSError) else "") or str(error))
        self.root = root
        self.file = file


class Shards:
    """Open shards of any number of checkpoints, closed at the end of a `with` block; `remotes` of those on the hub."""

    def __init__(self, fs: FileSystem, remotes: Mapping[Path, Remote] | None = None) -> None:
        self._fs = fs
        self._remotes = remotes or {}
        self._sources: dict[Path, SourceReader] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for source in self._sources.values():
            source.close()

    def will_need(self, root: Path, ranges: Iterable[ByteRange]) -> None:
        """Begin to bring ranges of a checkpoint on the hub; what lies here is near enough."""
        if root in self._remotes:
            self._of(root).will_need(ranges)

    def read(self, root: Path, ranges: Iterable[ByteRange], into: memoryview) -> None:
        """Fill `into` with `ranges`, one after the other.

        Raises:
            UnreadableError: a shard cannot be opened, or ends too early.
            RemoteError: the hub does not give it.

        """
        source = self._of(root)
        done = 0
        for part in ranges:
            try:
                source.read_into(part, into[done : done + part.length])
            except (OSError, EOFError) as e:
                raise UnreadableError(root, part.file, e) from e
            done += part.length

    def _of(self, root: Path) -> SourceReader:
        if root not in self._sources:
            self._sources[root] = open_source(root, self._remotes.get(root), self._fs)
        return self._sources[root]


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
