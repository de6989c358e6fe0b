"""Executing a `Round` step: read a bounded run of rows, round and pack it, write the parts.

One weight's packed parts and one tile of its rows are in memory at a time. Weights that cannot be represented are
refused, naming tensor and row; upstream packs them as garbage without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from shardxform.base.digests import Taken, take
from shardxform.base.file_system import FileSystem
from shardxform.base.readers import SourceReader
from shardxform.base.tensors import TensorRef
from shardxform.errors import ExecutionError, SchemeError
from shardxform.execution.copying import Files, OpenTarget
from shardxform.execution.gathering import SlabReader
from shardxform.formats import packing
from shardxform.formats.grid import Grid
from shardxform.formats.rounding import QuantizedWeight, RtnStats, SourceDtype, quantize_into
from shardxform.formats.scheme import Role, Scheme
from shardxform.plan.plan import Extent
from shardxform.plan.steps import TILE_BYTES, Round, RoundItem

__all__ = ["Rounder", "part_of", "round_step", "rounder_on", "write_part"]

_NUMPY: Final[dict[str, Any]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}

Rounder = Callable[[NDArray[Any], SourceDtype, Grid, QuantizedWeight], RtnStats]
"""Rounds a run of rows into an output; `rtn.quantize_into` and its like."""


def rounder_on(device: str, scheme: Scheme) -> Rounder:
    """Find the function that rounds a run of rows on `device`: `cpu`, or what torch calls a device.

    Raises:
        SchemeError: no such device here, or the scheme asks for what it cannot do.

    """
    if device == "cpu":
        return quantize_into
    if scheme.grid.search:
        raise SchemeError("`search` runs on the CPU only: leave out `device`")
    try:
        from shardxform.formats import rounding_torch  # torch takes seconds to import, and only this needs it
    except ImportError as e:
        raise SchemeError(f"`device` {device} needs torch: pip install torch") from e
    return functools.partial(rounding_torch.quantize_on_device, device=rounding_torch.open_device(device))


def round_step(
    step: Round,
    rounder: Rounder,
    files: Files,
    fs: FileSystem,
    on_bytes: Callable[[int], None],
    stopped: Callable[[], None],
    taken: Taken | None = None,
) -> dict[str, Any]:
    """Round every weight of `step` and write its parts.

    Args:
        step: what to do.
        rounder: rounds a run of rows; see `rounder_on`.
        files: where to read and write.
        fs: effects.
        on_bytes: called with the bytes written after each weight.
        stopped: raises when the run is to stop.
        taken: digests of what is written are put here.

    Returns:
        facts for the record: modules whose weights are all zero, and the number of all-zero groups.

    Raises:
        ExecutionError: NaN, infinity, or a scale beyond float16; names tensor and row.

    """
    zero_modules: list[str] = []
    zero_groups = 0
    slabs = SlabReader(files[0])
    for item in step.items:
        stopped()
        out, groups, zeros = _rounded(item, step.scheme, rounder, files[0], slabs)
        zero_groups += zeros
        if zeros == groups:
            zero_modules.append(item.module)
        for role, extent in item.parts:
            write_part(part_of(role, item, step.scheme, out), extent, files[1], fs, taken)
            on_bytes(extent.length)
    facts: dict[str, Any] = {}
    if zero_groups:
        facts["zero_groups"] = zero_groups
    if zero_modules:
        facts["zero_modules"] = zero_modules
    return facts


def _rounded(
    item: RoundItem, scheme: Scheme, rounder: Rounder, source: SourceReader, slabs: SlabReader
) -> tuple[QuantizedWeight, int, int]:
    """Round one weight tile by tile; also its number of groups, and of all-zero groups."""
    rows, columns = item.shape
    dtype = cast(SourceDtype, item.weight.spec.dtype)  # the selection takes no other
    out = QuantizedWeight.empty(scheme.layout, scheme.grid, (rows, columns))
    tile_rows = max(1, TILE_BYTES * rows // max(item.weight.nbytes, 1))
    groups = zeros = 0
    for start in range(0, rows, tile_rows):
        stop = min(start + tile_rows, rows)
        if item.cut:
            bits_OI = np.ascontiguousarray(item.cut.of(slabs.read(item.weight))[start:stop])
            w_oi = bits_OI.view(_NUMPY[item.weight.spec.dtype])
        else:
            w_oi = _read(item.weight.rows(start, stop), source)
        stats = rounder(w_oi, dtype, scheme.grid, _rows_of(out, start, stop))
        _refuse_bad(stats, item, start)
        groups += stats.groups
        zeros += stats.zero_groups
    return out, groups, zeros


def _read(ref: TensorRef, source: SourceReader) -> NDArray[Any]:
    """Read a 2-D run of rows as raw bits."""
    array = np.empty(ref.spec.shape, _NUMPY[ref.spec.dtype])
    view = array.data.cast("B")
    done = 0
    for piece in ref.ranges:
        source.read_into(piece, view[done : done + piece.length])
        source.done_with(piece)
        done += piece.length
    return array


def _rows_of(out: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """View of the output that holds rows `start`..`stop - 1` of the weight."""
    if out.layout == "row":
        return QuantizedWeight(layout="row", words=out.words[start:stop], scales=out.scales[start:stop])
    return QuantizedWeight(layout="gptq", words=out.words[:, start:stop], scales=out.scales[:, start:stop])


def _refuse_bad(stats: RtnStats, item: RoundItem, first_row: int) -> None:
    if stats.nonfinite is not None:
        row, column = stats.nonfinite
        raise ExecutionError(
            f"{_where(item)}: NaN or infinity at row {first_row + row}, column {column}; expected finite weights"
        )
    if stats.overflow_row is not None:
        raise ExecutionError(
            f"{_where(item)}: row {first_row + stats.overflow_row} needs a scale beyond float16; expected weights"
            " below 524,000 in magnitude"
        )


def _where(item: RoundItem) -> str:
    tensor = item.weight.name
    return f"tensor '{tensor}'" if tensor == f"{item.module}.weight" else f"tensor '{tensor}' (module {item.module})"


def part_of(role: Role, item: RoundItem, scheme: Scheme, out: QuantizedWeight) -> NDArray[Any]:
    """One stored tensor of a quantized weight, as it is written."""
    rows, columns = item.shape
    if role == "words":
        return out.words
    if role == "scales":
        return packing.bf16_bits_of(out.scales.view(np.float16).astype(np.float32)) if _bf16(scheme) else out.scales
    if role == "zeros":
        return packing.qzeros(scheme.grid.groups(columns), rows, scheme.grid.bits)
    if role == "shape":
        return np.array([rows, columns], np.int64)
    return (np.arange(columns, dtype=np.int32) // scheme.grid.span(columns)).astype(np.int32)


def _bf16(scheme: Scheme) -> bool:
    return scheme.scale_dtype == "BF16"


def write_part(
    part: NDArray[Any], extent: Extent, target: OpenTarget, fs: FileSystem, taken: Taken | None = None
) -> None:
    """Write a stored tensor to its place, and put the digests of its chunks into `taken`."""
    data = np.ascontiguousarray(part).data.cast("B")
    if len(data) != extent.length:
        raise ExecutionError(f"internal: a part of {len(data)} bytes for an extent of {extent.length}")
    if taken is not None:
        take(data, extent.shard, extent.offset, taken)
    fs.write_all(target(extent.shard), data, extent.offset)
