"""Executing a `Remake` step: read a run of rows, write it as it becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from shardxform.base.digests import Taken
from shardxform.base.file_system import FileSystem
from shardxform.errors import ExecutionError
from shardxform.execution.copying import Files
from shardxform.execution.transcoding import reading, write_part
from shardxform.formats.remaking import DTYPES, remade_rows, strange_ids
from shardxform.plan.plan import REMADE_BYTES, Remake

__all__ = ["remake_step"]


def remake_step(
    step: Remake,
    files: Files,
    fs: FileSystem,
    on_bytes: Callable[[int], None],
    stopped: Callable[[], None],
    taken: Taken | None = None,
) -> dict[str, Any]:
    """Write the tensor of `step`; arguments as those of `copying.copy_step` and `transcoding.transcode_step`.

    Raises:
        ExecutionError: an id that names no expert; says which.

    """
    source, what = step.remade.source, step.remade.what
    count, columns = source.spec.shape
    read, width = reading(files[0]), source.nbytes // (count * columns)
    code = f"<i{width}" if what == "ids" else DTYPES[width]
    run, done = max(1, REMADE_BYTES // max(columns * width, 1)), 0
    for start in range(0, count, run):
        stopped()
        part = source.rows(start, min(start + run, count))
        rows = np.empty(part.spec.shape, code)
        read(part, rows)
        if what == "ids" and (strange := strange_ids(rows, step.remade.experts)).any():
            row, column = np.argwhere(strange)[0]
            raise ExecutionError(
                f"tensor '{source.name}': row {start + row} names expert {rows[row, column]},"
                f" but there are {step.remade.experts}"
            )
        data = remade_rows(step.remade, rows)
        write_part(data, step.target, files[1], fs, taken, done)
        on_bytes(data.nbytes)
        done += data.nbytes
    return {}
