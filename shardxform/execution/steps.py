"""Doing one step, wherever that is: on a thread of this process, or in a worker on another machine.

Reads the source, writes into shards that are there already, and knows neither the plan nor the journal. What tunes
blocks is not done here: see `tuning.session`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from shardxform.base.digests import Taken, runs_of
from shardxform.base.file_system import FileSystem
from shardxform.execution.copying import copy_step
from shardxform.plan.plan import Copy, Extent, Remake, Step

__all__ = ["Facts", "OpenTargets", "executor", "written_by"]

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
        from shardxform.execution.remaking import remake_step

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
