"""Shards of a repository as a `SourceReader`: a read waits until its range is here, and takes it from where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from shardxform.base.file_system import FileSystem
from shardxform.base.readers import FolderReader, SourceReader
from shardxform.base.tensors import ByteRange
from shardxform.checkpoint.remote.downloads import Store
from shardxform.checkpoint.remote.repository import Remote

__all__ = ["RemoteReader", "open_source"]


def open_source(root: Path, remote: Remote | None, fs: FileSystem, *, ahead: bool = False) -> SourceReader:
    """Open the shards of a source; none is read yet.

    Args:
        root: folder of the whole files.
        remote: the repository that the others are in.
        fs: effects.
        ahead: much is going to be wanted long before it is read, and some be read more than once.

    """
    if remote is None or not remote.streamed:
        return FolderReader(root, fs)
    return RemoteReader(remote, FolderReader(root, fs), ahead=ahead)


class RemoteReader:
    """Reads what is streamed by ranges, and what lies whole in the client's cache from there."""

    def __init__(self, remote: Remote, whole: FolderReader, *, ahead: bool) -> None:
        self._remote = remote
        self._whole = whole
        self._ahead = ahead
        self._store: Store | None = remote.downloads.use(ahead=ahead)

    def read_into(self, place: ByteRange, buffer: memoryview) -> None:
        """Fill `buffer` with a range of its length."""
        if place.file not in self._remote.streamed:
            self._whole.read_into(place, buffer)
            return
        arena = self._open().arena
        self._each(place, lambda slot, at, count, done: arena.read_into(slot, at, buffer[done : done + count]))

    def copy(self, place: ByteRange, target: int, offset: int) -> None:
        """Write a range to the descriptor `target` at `offset`."""
        if place.file not in self._remote.streamed:
            self._whole.copy(place, target, offset)
            return
        arena = self._open().arena
        self._each(place, lambda slot, at, count, done: arena.copy(slot, at, count, target, offset + done))

    def will_need(self, places: Iterable[ByteRange]) -> None:
        """Have ranges fetched after all that is wanted already."""
        store = self._open()
        for place in places:
            if place.file in self._remote.streamed:
                store.pieces.want(store.file(self._remote, place.file), place.offset, place.end)
            else:
                self._whole.will_need((place,))

    def done_with(self, place: ByteRange) -> None:
        """Drop a range, read or not."""
        if place.file in self._remote.streamed:
            store = self._open()
            store.pieces.drop(store.file(self._remote, place.file), place.offset, place.end)
        else:
            self._whole.done_with(place)

    def stop(self) -> None:
        """End all waiting for the network."""
        self._remote.downloads.stop()

    def close(self) -> None:
        """Close what is open; the last reader of a command gives the disk back."""
        self._whole.close()
        if self._store is not None:
            self._store = None
            self._remote.downloads.leave(ahead=self._ahead)

    def _open(self) -> Store:
        if self._store is None:
            raise ValueError("read after it was closed")
        return self._store

    def _each(self, place: ByteRange, use: Callable[[int, int, int, int], None]) -> None:
        """Call `use` with slot, place in it, length and place in the range, for each piece, when it is here."""
        store = self._open()
        file, stop = store.file(self._remote, place.file), place.end
        store.pieces.want(file, place.offset, stop, now=True)
        at = place.offset
        while at < stop:
            with store.pieces.reading(file, at, stop) as piece:
                count = min(piece.stop, stop) - at
                use(piece.slot, at - piece.start, count, at - place.offset)
            at += count
