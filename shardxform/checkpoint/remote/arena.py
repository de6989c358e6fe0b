"""Where fetched bytes lie until they are read: numbered slots of one size, in memory or in a file without a name.

The file is unlinked as soon as it is made, so that nothing is left behind however the process ends. A slot holds
whatever was last written to it: which bytes of it mean something is known to `pieces` alone.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol

from shardxform.base.file_system import FileSystem
from shardxform.errors import RemoteError

__all__ = ["Arena", "DiskArena", "MemoryArena"]


class Arena(Protocol):
    """`slots` of `slot_bytes` each; all methods may be called from any thread, for different slots at once."""

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
    """Slots in a nameless file in `folder`, which grows to `slots * slot_bytes` at most."""

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
