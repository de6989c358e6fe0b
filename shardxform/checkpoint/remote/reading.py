"""Shards of a repository as a `SourceReader`, and the threads that fetch what is wanted of them.

A read waits until its range is here, and takes it from where it lies. One `Downloads` belongs to one command. What is
copied or rounded is read once and in order, and passes through a little memory; what runs a model is wanted a decoder
block ahead and read more than once, and lies on disk meanwhile, at most `cache_bytes` of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardxform.base.file_system import FileSystem, FolderReader
from shardxform.base.tensors import ByteRange
from shardxform.checkpoint.remote.client import Client, download
from shardxform.checkpoint.remote.pieces import Arena, DiskArena, File, MemoryArena, Pieces, RemotePiece
from shardxform.checkpoint.remote.repository import Remote

__all__ = ["LEAST_CACHE_BYTES", "Downloads", "RemoteReader", "Store", "Transfer"]

_MEMORY_SLOT: Final = 2 << 20
_DISK_SLOT: Final = 4 << 20
_SAMPLE: Final = 4 << 20
_RUN_BYTES: Final = 16 << 20  # asked for at once, where adjacent: each request costs a round trip

LEAST_CACHE_BYTES: Final = 64 * _DISK_SLOT
"""Less disk than this would have readers wait for each other."""


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


# -- fetching ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How to fetch; changes no byte of any result.

    Attributes:
        connections: requests at a time.
        cache_bytes: most disk that the source takes while a model is run.
        folder: where that lies, in a file without a name; a directory that is there.

    """

    connections: int = 4
    cache_bytes: int = 10 * 10**9
    folder: Path = Path()


class Downloads:
    """Owns the connections of one command, and what was fetched and not yet read."""

    def __init__(self, transfer: Transfer, fs: FileSystem | None = None) -> None:
        self.transfer = transfer
        self.client = Client()
        self._fs = fs or FileSystem()
        self._lock = threading.Lock()
        self._stores: dict[bool, Store] = {}
        self._users: dict[bool, int] = {True: 0, False: 0}

    def use(self, *, ahead: bool) -> Store:
        """Begin to read; `ahead` keeps what is wanted on disk. To be ended with `leave`."""
        with self._lock:
            if not self._stores and self.client.stopped:  # by a run that was interrupted; this is another
                self.client = Client()
            if ahead not in self._stores:
                self._stores[ahead] = Store(self._arena(ahead), self.transfer.connections, self.client)
            self._users[ahead] += 1
            return self._stores[ahead]

    def leave(self, *, ahead: bool) -> None:
        """End reading; the last one gives memory, disk and threads back."""
        with self._lock:
            self._users[ahead] -= 1
            if not self._users[ahead]:
                self._stores.pop(ahead).close()

    def reader(self, remote: Remote, whole: FolderReader, *, ahead: bool) -> RemoteReader:
        """Read shards of a repository; `whole` reads those that lie in the client's cache."""
        return RemoteReader(remote, whole, ahead=ahead)

    def download(self, remote: Remote, name: str) -> None:
        """Bring a whole small file to the hub client's cache."""
        download(remote, name)

    def seconds(self, remote: Remote, name: str) -> float:
        """Seconds to fetch a byte of a large file, found out on a few MB of it."""
        count = min(_SAMPLE, remote.files[name].nbytes)
        began = time.perf_counter()
        self.client.fetch(remote, name, 0, count, lambda _data: None)
        return (time.perf_counter() - began) / max(count, 1) / self.transfer.connections

    def stop(self) -> None:
        """Wake all that wait, with an error."""
        self.client.stop()
        with self._lock:
            for store in self._stores.values():
                store.pieces.close()

    def _arena(self, ahead: bool) -> Arena:
        connections = self.transfer.connections
        if ahead:
            slots = max(self.transfer.cache_bytes, LEAST_CACHE_BYTES) // _DISK_SLOT
            return DiskArena(slots, _DISK_SLOT, self._fs, self.transfer.folder)
        return MemoryArena(max(32, 6 * connections), _MEMORY_SLOT, self._fs)


class Store:
    """Pieces, and the threads that fetch them."""

    def __init__(self, arena: Arena, connections: int, client: Client) -> None:
        self.arena = arena
        run = (arena.slots - connections) // (connections + 1) * arena.slot_bytes  # all at work, and one run to read
        self.pieces = Pieces(arena, run_bytes=min(_RUN_BYTES, run), reserve=connections)
        self._client = client
        self._connections = connections
        self._remotes: dict[File, tuple[Remote, str]] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def file(self, remote: Remote, name: str) -> File:
        """Name a file for `pieces`; whoever names one will want something of it."""
        file = (str(remote), name)
        with self._lock:
            self._remotes.setdefault(file, (remote, name))
            while len(self._threads) < self._connections:
                thread = threading.Thread(target=self._fetch_all, name=f"fetch-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return file

    def close(self) -> None:
        """Fetch no more, and give memory and disk back."""
        self.pieces.close()
        self.arena.close()

    def _fetch_all(self) -> None:
        while run := self.pieces.take():
            try:
                self._fetch(run)
            except BaseException as e:  # told to whoever reads these pieces, and to nobody if none does
                self.pieces.failed(run, e)

    def _fetch(self, run: list[RemotePiece]) -> None:
        """Fetch adjacent pieces with one request, each to be read as soon as it is whole."""
        remote, name = self._remotes[run[0].file]
        number, at = 0, run[0].start

        def put(data: memoryview) -> None:
            nonlocal number, at
            while data:
                piece = run[number]
                part = data[: piece.stop - at]
                self.arena.write(piece.slot, at - piece.start, part)
                data = data[len(part) :]
                at += len(part)
                if at == piece.stop:
                    self.pieces.arrived(piece)
                    number += 1

        self._client.fetch(remote, name, run[0].start, run[-1].stop, put)
