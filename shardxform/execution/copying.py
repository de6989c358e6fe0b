"""Executing a `Copy` step: byte ranges from the source to the output, asked of the disk before they are due."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from shardxform.base.file_system import FileSystem, SourceReader
from shardxform.base.tensors import ByteRange
from shardxform.plan.plan import Copy, Segment

__all__ = ["Files", "OpenTarget", "copy_step"]

_AHEAD: Final = 64 << 20  # bytes that a worker asks of the kernel before it copies them
_CHUNK: Final = 8 << 20  # most bytes between two looks at the stop flag, and two reports of progress

OpenTarget = Callable[[int], int]
Files = tuple[SourceReader, OpenTarget]
"""Where to read the source, and a function from an output shard's number to an open descriptor."""


def copy_step(
    step: Copy, files: Files, _fs: FileSystem, on_bytes: Callable[[int], None], stopped: Callable[[], None]
) -> dict[str, Any]:
    """Copy every segment of `step`.

    Args:
        step: what to do.
        files: where to read and write.
        _fs: effects; those of a copy are the source's.
        on_bytes: called with the bytes written after each piece.
        stopped: raises when the run is to stop.

    Returns:
        no facts: bytes are not looked at.

    """
    source, target = files
    for piece in _read_ahead(step, source):
        stopped()
        source.copy(piece.source, target(piece.shard), piece.offset)
        source.done_with(piece.source)
        on_bytes(piece.source.length)
    return {}


def _read_ahead(step: Copy, source: SourceReader) -> Iterator[Segment]:
    """Pieces of a step, each asked of the kernel before it is due.

    Left to itself, the kernel reads ahead by its own measure, into experts that are not kept: half as much again.
    """
    asked: deque[Segment] = deque()
    ahead = 0
    for piece in _pieces(step):
        source.will_need((piece.source,))
        asked.append(piece)
        ahead += piece.source.length
        while ahead > _AHEAD:
            ahead -= asked[0].source.length
            yield asked.popleft()
    yield from asked


def _pieces(step: Copy) -> Iterator[Segment]:
    """Segments of a step, cut where they are longer than `_CHUNK`."""
    for segment in step.segments:
        name, begin, length = segment.source.file, segment.source.offset, segment.source.length
        for start in range(0, length, _CHUNK):
            place = ByteRange(name, begin + start, min(_CHUNK, length - start))
            yield Segment(place, segment.shard, segment.offset + start)
