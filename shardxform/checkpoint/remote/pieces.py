"""Which byte ranges of remote files are here, on their way, or wanted, in which order, and where they lie.

A piece is a range that fits into one slot of an arena. Readers wait for pieces, fetchers take runs of adjacent ones;
what readers wait for goes first, then what was wanted first. Pieces that were read make room for others; one that
nobody has read yet does so only if a reader could not go on otherwise, so that next to nothing is fetched twice. Knows
no network, and no file but the arena.
"""

from __future__ import annotations

import contextlib
import os
import threading
from bisect import bisect_right, insort
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from shardxform.base import interrupts
from shardxform.base.file_system import FileSystem
from shardxform.errors import RemoteError

__all__ = ["Arena", "DiskArena", "File", "MemoryArena", "Pieces", "RemotePiece"]

File = tuple[str, str]
"""A repository at a commit, and a file of it."""

_QUEUED: Final = "queued"
_FETCHING: Final = "fetching"
_HERE: Final = "here"
_LOST: Final = "lost"
_LOOK: Final = 1.0  # seconds between two looks of a waiting thread: Ctrl-C must get through


# -- the table ---------------------------------------------------------------------------------------------------------


class RemotePiece:
    """Bytes `start`..`stop` of a file, in a slot or going to be."""

    __slots__ = ("awaited", "error", "file", "readers", "slot", "start", "state", "stop", "unread")

    def __init__(self, file: File, start: int, stop: int) -> None:
        self.file, self.start, self.stop = file, start, stop
        self.state = _QUEUED
        self.slot = -1
        self.readers = 0
        self.unread = stop - start
        self.awaited = False
        self.error: BaseException | None = None


class Pieces:
    """The table of pieces, the queue, and the slots; thread-safe."""

    def __init__(self, arena: Arena, *, run_bytes: int, reserve: int) -> None:
        """Make an empty table.

        Args:
            arena: where pieces lie.
            run_bytes: most bytes of adjacent pieces that are fetched at once.
            reserve: slots that only awaited pieces may take: with one at least, readers never wait for each other.

        """
        self._arena = arena
        self._run_bytes = run_bytes
        self._reserve = reserve
        self._free = list(range(arena.slots - 1, -1, -1))
        self._starts: defaultdict[File, list[int]] = defaultdict(list)
        self._table: dict[tuple[File, int], RemotePiece] = {}
        self._placed: dict[int, RemotePiece] = {}
        self._read: OrderedDict[tuple[File, int], RemotePiece] = OrderedDict()  # the longest unused one first
        self._awaited: deque[RemotePiece] = deque()
        self._queue: deque[RemotePiece] = deque()
        self._changed = threading.Condition()
        self._closed = False

    # -- readers ------------------------------------------------------------------------------------------------

    def want(self, file: File, start: int, stop: int, *, now: bool = False) -> None:
        """Have a range fetched that will be read: after all that is wanted already, or, if it is read `now`, before."""
        with self._changed:
            fresh = list(self._fill(file, start, stop))
            if now:
                self._queue.extendleft(reversed(fresh))
            else:
                self._queue.extend(fresh)
            self._changed.notify_all()

    @contextlib.contextmanager
    def reading(self, file: File, at: int, stop: int) -> Iterator[RemotePiece]:
        """Wait for the piece that holds byte `at`; it stays where it is inside the `with` block.

        Raises:
            RemoteError: it could not be fetched, or the work was stopped.

        """
        piece = self._await(file, at, stop)
        try:
            yield piece
        finally:
            with self._changed:
                piece.readers -= 1
                piece.unread -= min(piece.stop, stop) - at
                self._settle(piece)
                self._changed.notify_all()

    def drop(self, file: File, start: int, stop: int) -> None:
        """Forget the pieces that lie in a range: nobody will read them any more."""
        with self._changed:
            for piece in list(self._overlapping(file, start, stop)):
                if start <= piece.start and piece.stop <= stop and not piece.readers:
                    piece.unread = 0  # one that is on its way makes room when it is here
                    if piece.state != _FETCHING:
                        self._forget(piece)
            self._changed.notify_all()

    def close(self) -> None:
        """End all waiting: readers get an error, fetchers nothing more to do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -- fetchers -----------------------------------------------------------------------------------------------

    def take(self) -> list[RemotePiece]:
        """Wait for adjacent pieces to fetch, each with a slot; none when all is over."""
        with self._changed:
            while not self._closed:
                if run := self._next_run():
                    return run
                self._changed.wait(_LOOK)
        return []

    def arrived(self, piece: RemotePiece) -> None:
        """Have a piece be read, whose bytes are all in its slot."""
        with self._changed:
            piece.state = _HERE
            self._settle(piece)
            self._changed.notify_all()

    def failed(self, run: list[RemotePiece], error: BaseException) -> None:
        """Tell those who wait for pieces that have not arrived why they will not; they are fetched when read again."""
        with self._changed:
            for piece in run:
                if piece.state == _FETCHING:
                    piece.error = error
                    self._forget(piece)
            self._changed.notify_all()

    # -- with the lock held -------------------------------------------------------------------------------------

    def _await(self, file: File, at: int, stop: int) -> RemotePiece:
        with self._changed:
            piece = next(self._overlapping(file, at, at + 1), None)
            if piece is None:
                self._queue.extendleft(reversed(list(self._fill(file, at, stop))))
                piece = next(self._overlapping(file, at, at + 1))
            if piece.state == _QUEUED and not piece.awaited:
                self._awaited.append(piece)
            piece.awaited = True
            piece.readers += 1
            self._read.pop((file, piece.start), None)
            self._changed.notify_all()
            try:
                while piece.state in (_QUEUED, _FETCHING) and not self._closed:
                    self._changed.wait(_LOOK)
                    interrupts.check()
                if piece.state != _HERE:
                    raise RemoteError(str(piece.error or "stopped")) from piece.error
            except BaseException:
                piece.readers -= 1
                self._settle(piece)
                raise
        return piece

    def _fill(self, file: File, start: int, stop: int) -> Iterator[RemotePiece]:
        """Make pieces of what of a range has none, in order."""
        at = start
        for piece in list(self._overlapping(file, start, stop)):
            yield from self._cut(file, at, piece.start)
            at = piece.stop
        yield from self._cut(file, at, stop)

    def _cut(self, file: File, start: int, stop: int) -> Iterator[RemotePiece]:
        for at in range(start, stop, self._arena.slot_bytes):
            piece = RemotePiece(file, at, min(at + self._arena.slot_bytes, stop))
            insort(self._starts[file], at)
            self._table[file, at] = piece
            yield piece

    def _overlapping(self, file: File, start: int, stop: int) -> Iterator[RemotePiece]:
        starts = self._starts[file]
        number = max(bisect_right(starts, start) - 1, 0)
        while number < len(starts) and starts[number] < stop:
            piece = self._table[file, starts[number]]
            if piece.stop > start:
                yield piece
            number += 1

    def _next_run(self) -> list[RemotePiece]:
        """Take the first piece that is due and can have a slot, and those that follow it in its file."""
        for queue, reserve in ((self._awaited, 0), (self._queue, self._reserve)):
            while queue and queue[0].state != _QUEUED:
                queue.popleft()
            if queue and (self._has_room(reserve) or (queue is self._awaited and self._make_room())):
                return self._run_from(queue.popleft())
        return []

    def _run_from(self, piece: RemotePiece) -> list[RemotePiece]:
        run = [self._place(piece)]
        nbytes = piece.stop - piece.start
        while self._has_room(self._reserve):
            following = self._table.get((piece.file, run[-1].stop))
            if following is None or following.state != _QUEUED:
                break
            nbytes += following.stop - following.start
            if nbytes > self._run_bytes:
                break
            run.append(self._place(following))
        return run

    def _has_room(self, reserve: int) -> bool:
        return len(self._free) + len(self._read) > reserve

    def _make_room(self) -> bool:
        """Give up a piece that may have to be fetched again, if no reader can go on otherwise."""
        if any(piece.readers for piece in self._placed.values()):  # one of them will, and leave room
            return False
        idle = [piece for piece in self._placed.values() if piece.state == _HERE]
        parted = [piece for piece in idle if piece.unread < piece.stop - piece.start]
        if idle:
            self._forget(parted[0] if parted else idle[-1])  # the last: what was fetched last is read last
        return bool(idle)

    def _place(self, piece: RemotePiece) -> RemotePiece:
        if not self._free:
            self._forget(next(iter(self._read.values())))
        piece.slot = self._free.pop()
        piece.state = _FETCHING
        self._placed[piece.slot] = piece
        return piece

    def _settle(self, piece: RemotePiece) -> None:
        """Count a piece as one that may make room, if it was read and nobody reads it."""
        if piece.state == _HERE and not piece.readers and piece.unread <= 0:
            self._read[piece.file, piece.start] = piece

    def _forget(self, piece: RemotePiece) -> None:
        if piece.slot >= 0:
            self._free.append(piece.slot)
            del self._placed[piece.slot]
        piece.state, piece.slot = _LOST, -1
        self._read.pop((piece.file, piece.start), None)
        del self._table[piece.file, piece.start]
        starts = self._starts[piece.file]
        del starts[bisect_right(starts, piece.start) - 1]


# -- the slots ---------------------------------------------------------------------------------------------------------


class Arena(Protocol):
    """Where fetched bytes lie until they are read: `slots` of `slot_bytes` each.

    All methods may be called from any thread, for different slots at once.
    """

    slots: int
    slot_bytes: int

    def write(self, slot: int, at: int, data: memoryview) -> None:
        """Put bytes at `at` of a slot."""
        ...

    def read_into(self, slot: int, at: int, buffer: memoryview) -> None:
        """Fill `buffer` from `at` of a slot."""
        ...

    def copy(self, slot: int, at: int, count: int, target: int, offset: int) -> None:
        """Write `count` bytes from `at` of a slot to a file."""
        ...

    def close(self) -> None:
        """Give memory or disk back."""
        ...


class MemoryArena:
    """Slots in memory, allocated when first used."""

    def __init__(self, slots: int, slot_bytes: int, fs: FileSystem) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._fs = fs
        self._buffers: dict[int, memoryview] = {}

    def write(self, slot: int, at: int, data: memoryview) -> None:
        """Put bytes at `at` of a slot."""
        if slot not in self._buffers:
            self._buffers[slot] = memoryview(bytearray(self.slot_bytes))
        self._buffers[slot][at : at + len(data)] = data

    def read_into(self, slot: int, at: int, buffer: memoryview) -> None:
        """Fill `buffer` from `at` of a slot."""
        buffer[:] = self._buffers[slot][at : at + len(buffer)]

    def copy(self, slot: int, at: int, count: int, target: int, offset: int) -> None:
        """Write `count` bytes from `at` of a slot to a file."""
        self._fs.write_all(target, self._buffers[slot][at : at + count], offset)

    def close(self) -> None:
        """Give the memory back."""
        self._buffers.clear()


class _Descriptor:
    """A descriptor that is closed when nobody refers to it: a thread amid a write keeps its number in use."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class DiskArena:
    """Slots in a nameless file in `folder`, which grows to `slots * slot_bytes` at most.

    Nothing of it is left behind however the process ends.
    """

    def __init__(self, slots: int, slot_bytes: int, fs: FileSystem, folder: Path) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._fs = fs
        self._folder = folder
        self._lock = threading.Lock()
        self._file: _Descriptor | None = None

    def write(self, slot: int, at: int, data: memoryview) -> None:
        """Put bytes at `at` of a slot.

        Raises:
            RemoteError: the disk is full, or cannot be written to.

        """
        try:
            file = self._opened()
            self._fs.write_all(file.fd, data, slot * self.slot_bytes + at)
        except OSError as e:
            raise RemoteError(
                f"{self._folder}: no room for what was fetched: {e.strerror or e}; free some, or lower `cache_bytes`"
            ) from e

    def read_into(self, slot: int, at: int, buffer: memoryview) -> None:
        """Fill `buffer` from `at` of a slot."""
        file = self._opened()
        self._fs.read_exact_into(file.fd, buffer, slot * self.slot_bytes + at)

    def copy(self, slot: int, at: int, count: int, target: int, offset: int) -> None:
        """Write `count` bytes from `at` of a slot to a file."""
        file = self._opened()
        self._fs.copy(file.fd, slot * self.slot_bytes + at, target, offset, count)

    def close(self) -> None:
        """Give the disk back."""
        with self._lock:
            self._file = None

    def _opened(self) -> _Descriptor:
        with self._lock:
            if self._file is None:
                self._file = _Descriptor(self._fs.nameless(self._folder))
            return self._file
