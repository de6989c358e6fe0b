"""How fast this machine is at what `costs` counts, found out in seconds.

Reads a piece of the source and rounds random weights; `model_timing` runs pieces of the model, where it
is run at all. Nothing is written.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Final

import numpy as np

from shardxform.base.file_system import FileSystem
from shardxform.checkpoint.table import Checkpoint
from shardxform.compress.costs import Costs, shape_of, usual
from shardxform.compress.prepared import Prepared
from shardxform.compress.request import Settings
from shardxform.errors import CheckpointError
from shardxform.formats import rounding
from shardxform.formats.grid import Grid

__all__ = ["measure", "reading_seconds"]

_PIECE: Final = 8 << 20
_PIECES: Final = 16
_DISK_SECONDS: Final = 0.7
_ROWS: Final = 256
_COLUMNS: Final = 2048


def measure(prepared: Prepared, settings: Settings) -> Costs:
    """Find out what each kind of work costs here.

    Raises:
        FamilyError: transformers does not run the model.
        CheckpointError: the source cannot be read.

    """
    request = prepared.request
    costs = replace(
        usual(shape_of(request.source, prepared.kept)),
        moved=reading_seconds(request.source),
        rounded=_rounding_seconds(request.scheme.grid) / settings.jobs,
    )
    if request.precision is None or not request.runs_model:
        return costs
    from shardxform.compress.model_timing import measure_model

    return measure_model(request.source, request.precision, request.tuned_in, request.scheme.grid, costs)


def reading_seconds(source: Checkpoint) -> float:
    """Seconds to read a byte of the largest shard, from the hub, or the disk if the system forgets what it holds."""
    fs = FileSystem()
    shard = max(source.shards, key=lambda each: each.nbytes)
    if source.remote and shard.name in source.remote.streamed:
        return float(source.remote.downloads.seconds(source.remote, shard.name))
    path = source.root / shard.name
    start, buffer, count = max(0, (shard.nbytes - _PIECES * _PIECE) // 2), memoryview(bytearray(_PIECE)), 0
    try:
        fd = fs.open(path, os.O_RDONLY)
        try:
            fs.done_with(fd, start, _PIECES * _PIECE)
            began = time.perf_counter()
            while count < _PIECES * _PIECE and time.perf_counter() - began < _DISK_SECONDS:
                found = fs.pread_into(fd, buffer, start + count)
                count += found
                if not found:
                    break
            return (time.perf_counter() - began) / max(count, 1)
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror or e}") from e


def _rounding_seconds(grid: Grid) -> float:
    """Seconds of a weight that is rounded to nearest, on one thread."""
    plain = replace(grid, search=False)
    w_OI = np.random.default_rng(0).integers(0, 0x3F00, (_ROWS, _COLUMNS)).astype(np.uint16)
    for _ in range(2):  # the first may compile
        began = time.perf_counter()
        rounding.quantize(w_OI, "BF16", plain, layout="gptq")
    return (time.perf_counter() - began) / w_OI.size
