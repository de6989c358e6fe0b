"""A digest of every tensor that is written, taken of the bytes in the output while they are still in memory.

What is computed is digested before it is written, which spares a second look at it; what the kernel copies, after.

BLAKE3 of a tensor's bytes, its first 16 bytes: as `b3sum` prints them. A tensor of more than 16 MiB is
cut into chunks of that size, and its digest is that of the digests of its chunks (32 bytes each), one after the other:
so large tensors are written by several steps, in any order, and interrupted between any two of them.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from blake3 import blake3

from shardxform.base.file_system import FileSystem
from shardxform.base.tensors import Entry
from shardxform.errors import ExecutionError, PlanError

__all__ = [
    "ALGORITHM",
    "CHUNK_BYTES",
    "FACT",
    "Chunk",
    "Chunks",
    "Taken",
    "chunk_digest",
    "digest_chunks",
    "runs_of",
    "take",
    "tensor_digest",
]

ALGORITHM: Final = "blake3-128"
CHUNK_BYTES: Final = 16 << 20
FACT: Final = "digests"
"""What a step's digests are called among its facts: one for every chunk that it wrote, in the order of the shards."""

Taken = dict[tuple[int, int], str]
"""Digests of chunks, in hex, by shard and place in it."""

_DIGEST_BYTES: Final = 16
_BUFFER: Final = 1 << 20
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of bytes of one tensor: its number in the tensor, and where it lies in the output."""

    tensor: str
    number: int
    shard: int
    offset: int
    length: int


class _Shard(Protocol):
    @property
    def head(self) -> bytes: ...
    @property
    def entries(self) -> Sequence[Entry]: ...


Extent = tuple[int, int, int]
"""A run of bytes of the output: number of the shard, offset, length."""


class Chunks:
    """Finds the chunks that lie in what a step writes."""

    def __init__(self, shards: Sequence[_Shard]) -> None:
        self._starts = [len(shard.head) for shard in shards]
        self._entries = [[entry for entry in shard.entries if entry.begin < entry.end] for shard in shards]
        self._begins = [[entry.begin for entry in entries] for entries in self._entries]
        self._cuts = [
            {*begins, *(entry.end for entry in shard.entries)}
            for begins, shard in zip(self._begins, shards, strict=True)
        ]

    def of(self, writes: Iterable[Extent]) -> tuple[Chunk, ...]:
        """Chunks of all extents, in the order of the shards.

        Raises:
            PlanError: a chunk is not written whole; a bug in the planner.

        """
        return tuple(chunk for shard, begin, end in runs_of(writes) for chunk in self._in(shard, begin, end))

    def digests(self, facts: Mapping[int, Mapping[str, Any]], steps: Sequence[Any]) -> dict[str, str]:
        """Digest of every tensor, from the facts of all steps.

        Raises:
            ExecutionError: facts that are not those of the steps: a journal that somebody changed.

        """
        found: dict[str, dict[int, bytes]] = {}
        for number, step in enumerate(steps):
            chunks, listed = self.of(step.writes), facts[number].get(FACT, [])
            if len(listed) != len(chunks):
                raise ExecutionError(f"the journal has {len(listed)} digests of step {number}, expected {len(chunks)}")
            for chunk, text in zip(chunks, listed, strict=True):
                found.setdefault(chunk.tensor, {})[chunk.number] = bytes.fromhex(text)
        return {name: tensor_digest([parts[n] for n in sorted(parts)]) for name, parts in found.items()}

    def refuse_parts(self, shard: int, runs: Iterable[tuple[int, int]]) -> None:
        """Check that runs of bytes of a shard are whole chunks: that the ends of each are those of a chunk.

        Raises:
            PlanError: a chunk is not written whole; a bug in the planner.

        """
        start, cuts = self._starts[shard], self._cuts[shard]
        for begin, end in runs:
            if begin - start not in cuts or end - start not in cuts:  # as few are: most are whole tensors
                self._refuse_part(shard, begin, end)

    def _refuse_part(self, shard: int, begin: int, end: int) -> None:
        for at, last in ((begin, begin), (end, end - 1)):
            entry = self._entry(shard, last)
            inside = at - self._starts[shard] - entry.begin
            if inside % CHUNK_BYTES and inside != entry.spec.nbytes:
                raise PlanError(f"internal: a step writes a part of a chunk of tensor '{entry.spec.name}'")

    def _in(self, shard: int, begin: int, end: int) -> Iterator[Chunk]:
        """Chunks in the bytes `begin`..`end` of a shard."""
        self.refuse_parts(shard, [(begin, end)])
        at = begin
        while at < end:
            entry = self._entry(shard, at)
            inside = at - self._starts[shard] - entry.begin
            length = min(CHUNK_BYTES, entry.spec.nbytes - inside)
            yield Chunk(entry.spec.name, inside // CHUNK_BYTES, shard, at, length)
            at += length

    def _entry(self, shard: int, at: int) -> Entry:
        """The tensor that the byte `at` of a shard belongs to."""
        return self._entries[shard][bisect_right(self._begins[shard], at - self._starts[shard]) - 1]


def runs_of(writes: Iterable[Extent]) -> Iterator[tuple[int, int, int]]:
    """Extents in order, those that touch joined: shard, first byte, byte after the last."""
    shard, begin, end = -1, 0, 0
    for number, offset, length in sorted(writes):
        if number == shard and offset == end:
            end += length
        elif length:
            if shard >= 0:
                yield shard, begin, end
            shard, begin, end = number, offset, offset + length
    if shard >= 0:
        yield shard, begin, end


def take(data: memoryview, shard: int, offset: int, taken: Taken) -> None:
    """Digest the chunks of a whole tensor that is written at `offset` of a shard."""
    for at in range(0, len(data), CHUNK_BYTES):
        taken[shard, offset + at] = blake3(data[at : at + CHUNK_BYTES]).hexdigest()


def digest_chunks(
    chunks: Iterable[Chunk],
    path_of: Callable[[int], Path],
    fs: FileSystem,
    *,
    taken: Taken | None = None,
    direct: bool = False,
) -> list[str]:
    """Digest chunks of the output as they are now, in hex.

    Args:
        chunks: which.
        path_of: path of a shard, by its number.
        fs: effects.
        taken: digests that are known already.
        direct: read past the page cache where that can be done. A network file system that has read a page may write
            all of it back later, over what other machines put into it meanwhile.

    Raises:
        OSError, EOFError: a shard cannot be read.

    """
    found: list[str] = []
    opened: dict[int, int] = {}
    buffer = memoryview(mmap.mmap(-1, _BUFFER + _PAGE))  # at the beginning of a page, as direct reads want it
    try:
        for chunk in chunks:
            if taken and (known := taken.get((chunk.shard, chunk.offset))):
                found.append(known)
                continue
            if chunk.shard not in opened:
                opened[chunk.shard] = _open(path_of(chunk.shard), fs, direct=direct)
            found.append(_digest(opened[chunk.shard], chunk, buffer, fs))
    finally:
        for fd in opened.values():
            os.close(fd)
    return found


def chunk_digest(pieces: Iterable[memoryview]) -> bytes:
    """Digest of a chunk that comes in pieces, 32 bytes."""
    digest = blake3()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def tensor_digest(chunks: Sequence[bytes]) -> str:
    """Digest of a tensor, in hex, from those of its chunks in order."""
    if not chunks:
        return blake3().hexdigest(length=_DIGEST_BYTES)
    if len(chunks) == 1:
        return chunks[0][:_DIGEST_BYTES].hex()
    return blake3(b"".join(chunks)).hexdigest(length=_DIGEST_BYTES)


def _open(path: Path, fs: FileSystem, *, direct: bool) -> int:
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return fs.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system in memory has no such reads, and needs none
            return fs.open(path, os.O_RDONLY)
    return fs.open(path, os.O_RDONLY)


def _digest(fd: int, chunk: Chunk, buffer: memoryview, fs: FileSystem) -> str:
    """Digest one chunk, in reads that begin and end at pages, as direct ones must."""
    digest, at, end = blake3(), chunk.offset, chunk.offset + chunk.length
    while at < end:
        first = at // _PAGE * _PAGE
        stop = min(first + len(buffer), end)
        _fill(fd, buffer[: -(-(stop - first) // _PAGE) * _PAGE], first, stop - first, fs)
        digest.update(buffer[at - first : stop - first])
        at = stop
    return digest.hexdigest()


def _fill(fd: int, buffer: memoryview, offset: int, least: int, fs: FileSystem) -> None:
    """Read into `buffer`, `least` bytes or more: a read that begins and ends at pages may reach beyond the file."""
    done = 0
    while done < least:
        count = fs.pread_into(fd, buffer[done:], offset + done)
        if not count:
            raise EOFError(f"file ends at byte {offset + done}, expected {offset + least}")
        done += count
