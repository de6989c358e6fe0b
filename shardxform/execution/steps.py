"""Doing one step, wherever that is: on a thread of this process, or in a worker on another machine.

Reads the source, writes into shards that are there already, and knows neither the plan nor the journal. What tunes
blocks is not done here: see `tuning.session`.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from shardxform.base.digests import Taken, runs_of
from shardxform.base.file_system import Files, FileSystem, SourceReader
from shardxform.base.tensors import ByteRange
from shardxform.plan.plan import Copy, Extent, Remake, Segment, Step

__all__ = ["Facts", "OpenTargets", "copy_step", "executor", "written_by"]

_AHEAD: Final = 64 << 20  # bytes that a worker asks of the kernel before it copies them
_CHUNK: Final = 8 << 20  # most bytes between two looks at the stop flag, and two reports of progress

Facts = Mapping[str, Any]
"""What a step found: counts and lists of names, kept in the journal and in the provenance. Deterministic, but for what
is under `measured.MEASURED`, which the journal alone keeps."""


def executor(step: Step, device: str, taken: Taken | None = None) -> Callable[..., Facts]:
    """What carries out a step. Imported here: all but copying bring numpy and the compiled kernels.

    Args:
        step: to carry out.
        device: where weights are rounded.
        taken: digests of what is computed are put here.

    """
    if isinstance(step, Copy):
        return functools.partial(copy_step, step)
    if isinstance(step, Remake):
        from shardxform.execution.transcoding import remake_step

        return functools.partial(remake_step, step, taken=taken)
    from shardxform.plan.steps import Transcode

    if isinstance(step, Transcode):
        from shardxform.execution.transcoding import rounder_on, transcode_step

        return functools.partial(transcode_step, step, rounder_on(device, step.items), taken=taken)
    raise TypeError(f"no executor for {type(step).__name__}")


def written_by(step: Step) -> int:
    """Bytes that a step writes."""
    return sum(extent.length for extent in step.writes)


class OpenTargets:
    """The shards one step writes to, opened on first use and closed with the step.

    For writing only: a network file system that has read a page may write all of it back, over what others put there.
    """

    def __init__(self, path_of: Callable[[int], Path], fs: FileSystem) -> None:
        self._path_of = path_of
        self._fs = fs
        self._targets: dict[int, int] = {}

    def target(self, shard: int) -> int:
        """Descriptor of an output shard, by its number."""
        if shard not in self._targets:
            self._targets[shard] = self._fs.open(self._path_of(shard), os.O_WRONLY)
        return self._targets[shard]

    def sync(self, written: Iterable[Extent]) -> None:
        """Return when all that was written is on stable storage, and let the kernel forget `written`, and nothing else.

        Other steps write to the same shards meanwhile, and are still to take digests of what they wrote.
        """
        for fd in self._targets.values():
            self._fs.sync(fd)
        for shard, begin, end in runs_of(written):
            self._fs.done_with(self.target(shard), begin, end - begin)

    def __enter__(self) -> OpenTargets:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._targets.values():
            os.close(fd)


# -- copying -------------------------------------------------------------------------------------------------------
# Byte ranges from the source to the output, asked of the disk before they are due.


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
