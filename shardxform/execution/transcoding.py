"""Executing steps that compute what they write: read a bounded run of rows, write it as the target encoding has it.

One matrix's parts and one tile of its values are in memory at a time. What the target cannot say is refused, naming the
tensor: weights that are not finite, a scale that would be rounded, a value beyond float16; others write garbage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardxform.base.digests import Taken, take
from shardxform.base.file_system import Files, FileSystem, OpenTarget, SourceReader
from shardxform.base.tensors import TensorRef
from shardxform.errors import ExecutionError, SchemeError
from shardxform.formats.encoding import Opener, Read, Role, Rows, SourceDtype, Writing
from shardxform.formats.integers import Ints
from shardxform.formats.remaking import DTYPES, remade_rows, strange_ids
from shardxform.formats.rounding import QuantizedWeight, RtnStats, quantize_into
from shardxform.formats.scheme import Grid
from shardxform.plan.plan import REMADE_BYTES, Extent, Remake
from shardxform.plan.steps import Transcode, TranscodeItem

__all__ = ["Rounder", "Zeros", "reading", "remake_step", "rounder_on", "transcode_step", "write_item", "write_part"]

Rounder = Callable[[NDArray[np.generic], SourceDtype, Grid, QuantizedWeight], RtnStats]
"""Rounds a run of rows into an output; `rounding.quantize_into` and its like."""


def rounder_on(device: str, items: Iterable[TranscodeItem]) -> Rounder:
    """Find the function that rounds a run of rows on `device`: `cpu`, or what torch calls a device.

    Raises:
        SchemeError: no such device here, or an item asks for what it cannot do.

    """
    if device == "cpu":
        return quantize_into
    if any(isinstance(item.target, Ints) and item.target.grid.search for item in items):
        raise SchemeError("`search` runs on the CPU only: leave out `device`")
    try:
        from shardxform.formats import rounding_torch  # torch takes seconds to import, and only this needs it
    except ImportError as e:
        raise SchemeError(f"`device` {device} needs torch: pip install torch") from e
    return functools.partial(rounding_torch.quantize_on, device=rounding_torch.open_device(device))


@dataclass(slots=True)
class Zeros:
    """What of the weights of a step is zero, for the record: a source that was cut short reads as zeros."""

    groups: int = 0
    modules: list[str] = field(default_factory=list)

    def add(self, module: str, groups: int, zero_groups: int) -> None:
        """Count the groups of a module that hold nothing but zeros, of all that it has."""
        self.groups += zero_groups
        if groups and zero_groups == groups:
            self.modules.append(module)

    def facts(self) -> dict[str, Any]:
        """What the record holds of it: nothing where nothing is zero."""
        found = {"zero_groups": self.groups, "zero_modules": self.modules}
        return {name: value for name, value in found.items() if value}


def transcode_step(
    step: Transcode,
    rounder: Rounder,
    files: Files,
    fs: FileSystem,
    on_bytes: Callable[[int], None],
    stopped: Callable[[], None],
    taken: Taken | None = None,
) -> dict[str, Any]:
    """Write every matrix of `step` as its target has it.

    Args:
        step: what to do.
        rounder: rounds a run of rows; see `rounder_on`.
        files: where to read and write.
        fs: effects.
        on_bytes: called with the bytes written after each part, or run of it.
        stopped: raises when the run is to stop.
        taken: digests of parts that are written whole are put here.

    Returns:
        facts for the record: modules whose weights are all zero, and the number of all-zero groups.

    Raises:
        ExecutionError: values that the target cannot hold; names tensor and row.

    """
    zeros = Zeros()
    opener = Opener(reading(files[0]))
    for item in step.items:
        stopped()
        writing = Writing(_where(item), item.shape, rounder, stopped)
        rows = (source.open(opener) for source in item.sources)
        write_item(item, rows, writing, files[1], fs, on_bytes, taken)
        zeros.add(item.module, writing.groups, writing.zero_groups)
    return zeros.facts()


def write_item(
    item: TranscodeItem,
    rows: Iterable[Rows],
    writing: Writing,
    target: OpenTarget,
    fs: FileSystem,
    on_bytes: Callable[[int], None] | None = None,
    taken: Taken | None = None,
) -> None:
    """Write all parts of an item, given its rows; other arguments as those of `transcode_step`.

    Raises:
        ExecutionError: values that the target cannot hold; or it gave fewer bytes than there are places for, which
            would leave a hole that reads as zeros.

    """
    extents, done = _extents(item), 0
    for role, offset, data in item.target.written(rows, writing):
        extent, within = _place(extents[role], offset)
        write_part(data, extent, target, fs, taken, within)
        done += data.nbytes
        if on_bytes:
            on_bytes(data.nbytes)
    if done != item.out_bytes:
        raise ExecutionError(f"internal: {item.module}: {done} bytes written of {item.out_bytes}")


def _extents(item: TranscodeItem) -> dict[Role, list[Extent]]:
    """Where each part goes; to several places of one size, one after the other, where it is that of several tensors."""
    found: dict[Role, list[Extent]] = {}
    for role, extent in item.parts:
        found.setdefault(role, []).append(extent)
    return found


def _place(extents: Sequence[Extent], offset: int) -> tuple[Extent, int]:
    """Which of the places a byte of a part is in, and where there."""
    if len(extents) == 1 or not extents[0].length:
        return extents[0], offset
    number, within = divmod(offset, extents[0].length)
    return extents[number], within


def reading(source: SourceReader) -> Read:
    """Make a function that fills an array with the bytes of a tensor, which are not read again as a rule."""

    def read(ref: TensorRef, into: NDArray[np.generic]) -> None:
        view = into.reshape(-1).view(np.uint8).data
        done = 0
        for piece in ref.ranges:
            source.read_into(piece, view[done : done + piece.length])
            source.done_with(piece)
            done += piece.length

    return read


def _where(item: TranscodeItem) -> str:
    tensor = item.sources[0].storage.parts[0][1].name
    return f"tensor '{tensor}'" if tensor == f"{item.module}.weight" else f"tensor '{tensor}' (module {item.module})"


def write_part(
    part: NDArray[np.generic],
    extent: Extent,
    target: OpenTarget,
    fs: FileSystem,
    taken: Taken | None = None,
    offset: int = 0,
) -> None:
    """Write a stored tensor, or a run of it that begins at `offset`, to its place; of a whole one digests are taken."""
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
    if offset + len(data) > extent.length:
        raise ExecutionError(f"internal: {len(data)} bytes at {offset} for an extent of {extent.length}")
    if taken is not None and len(data) == extent.length:
        take(data, extent.shard, extent.offset, taken)
    fs.write_all(target(extent.shard), data, extent.offset + offset)


def remake_step(
    step: Remake,
    files: Files,
    fs: FileSystem,
    on_bytes: Callable[[int], None],
    stopped: Callable[[], None],
    taken: Taken | None = None,
) -> dict[str, Any]:
    """Write the tensor of `step`; arguments as those of `steps.copy_step` and `transcode_step`.

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
