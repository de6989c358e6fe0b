"""Where the shards of a source are read from: files of a folder, or ranges of a repository that pass by.

The one way in which tensor data of a source is read while there is work to do. What is not here yet is fetched before a
read returns: no reader ever sees a byte that did not come from the source.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from shardxform.base.file_system import FileSystem
from shardxform.base.tensors import ByteRange

__all__ = ["FolderReader", "SourceReader"]


class SourceReader(Protocol):
    """Reads byte ranges of shards by name; safe to use from several threads."""

    def read_into(self, place: ByteRange, buffer: memoryview) -> None:
        """Fill `buffer` with a range of its length.

        Raises:
            EOFError: the shard ends too early.
            OSError, RemoteError: it cannot be read.

        """
        ...

    def copy(self, place: ByteRange, target: int, offset: int) -> None:
        """Write a range to the descriptor `target` at `offset`; raises like `read_into`."""
        ...

    def will_need(self, places: Iterable[ByteRange]) -> None:
        """Begin to bring ranges that will be read, in this order. A hint."""
        ...

    def done_with(self, place: ByteRange) -> None:
        """Let go of a range that is not read again. A hint."""
        ...

    def stop(self) -> None:
        """End the waiting of other threads, with an error; nothing is read any more."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class FolderReader:
    """Shards of a folder, opened when first read."""

    def __init__(self, root: Path, fs: FileSystem) -> None:
        self._root = root
        self._fs = fs
        self._fds: dict[str, int] = {}
        self._opening = threading.Lock()

    def read_into(self, place: ByteRange, buffer: memoryview) -> None:
        """Fill `buffer` with a range of its length."""
        self._fs.read_exact_into(self._fd(place.file), buffer, place.offset)

    def copy(self, place: ByteRange, target: int, offset: int) -> None:
        """Write a range to the descriptor `target` at `offset`."""
        self._fs.copy(self._fd(place.file), place.offset, target, offset, place.length)

    def will_need(self, places: Iterable[ByteRange]) -> None:
        """Ask the kernel to read ranges."""
        for place in places:
            self._fs.will_need(self._fd(place.file), place.offset, place.length)

    def done_with(self, place: ByteRange) -> None:
        """Let the kernel forget a range."""
        self._fs.done_with(self._fd(place.file), place.offset, place.length)

    def stop(self) -> None:
        """Nothing waits long here."""

    def close(self) -> None:
        """Close the shards."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, name: str) -> int:
        with self._opening:
            if name not in self._fds:
                self._fds[name] = self._fs.open(self._root / name, os.O_RDONLY)
            return self._fds[name]
