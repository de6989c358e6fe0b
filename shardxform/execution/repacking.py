"""Executing a `Repack` step: read a stored weight, check what only its data can tell, write it anew.

One stored weight and one new one are in memory at a time; a dequantized one is written tile by tile. What the target
could not say is refused, naming the tensor: zero points of an asymmetric weight, columns in another order, a scale that
the target's type would round, a value beyond float16.
"""

# O: output channels, I: input channels, W: words of a row, G: groups of a row.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardxform.base.file_system import FileSystem
from shardxform.errors import ExecutionError
from shardxform.execution.copying import Files, OpenTarget
from shardxform.formats import packing
from shardxform.formats.loading import Loaded, StoredReader, first_of, identity, rows_between, scale_values, turned
from shardxform.formats.scheme import Role, Scheme
from shardxform.plan.convert import TILE_WEIGHTS, Repack, RepackItem
from shardxform.plan.plan import Extent

__all__ = ["repack_step"]


def repack_step(
    step: Repack, files: Files, fs: FileSystem, on_bytes: Callable[[int], None], stopped: Callable[[], None]
) -> dict[str, Any]:
    """Write every weight of `step` in its new form.

    Args:
        step: what to do.
        files: where to read and write.
        fs: effects.
        on_bytes: called with the bytes written after each part.
        stopped: raises when the run is to stop.

    Returns:
        facts for the record: none.

    Raises:
        ExecutionError: a stored tensor holds what the target cannot say; names it.

    """
    reader = StoredReader(step.source, files[0])
    for item in step.items:
        stopped()
        if step.target is None:
            _write_weight(item, step, reader, files[1], fs, on_bytes, stopped)
            continue
        parts = _repacked(item, step.source, step.target, reader)
        for role, extent in item.parts:
            assert role != "weight"
            _write(parts[role], extent.offset, extent, files[1], fs)
            on_bytes(extent.length)
    return {}


# -- quantized to quantized ---------------------------------------------------------------------------------------


def _repacked(item: RepackItem, source: Scheme, target: Scheme, reader: StoredReader) -> dict[Role, NDArray[Any]]:
    """The parts of one weight, its rows put together from those of stored ones."""
    grid, layout = target.grid, target.layout
    rows, columns = item.shape
    words = np.empty(grid.word_shape(layout, rows, columns), np.int32)
    scales = np.empty(grid.scale_shape(layout, rows, columns), np.uint16)
    row = 0
    for piece in item.pieces:
        loaded = reader.load(piece.module)
        bits = _scales_as(target.scale_dtype, loaded)
        to = (row, row + piece.stop - piece.start)
        for stored, new in ((loaded.words, words), (bits, scales)):
            _move(
                rows_between(stored, source.layout, piece.start, piece.stop),
                rows_between(new, layout, *to),
                source,
                target,
            )
        row = to[1]
    parts: dict[Role, NDArray[Any]] = {"words": words, "scales": scales}
    if layout == "row":
        return {**parts, "shape": np.array([rows, columns], np.int64)}
    zeros = packing.qzeros(grid.groups(columns), rows, grid.bits)
    return {**parts, "zeros": zeros, "g_idx": identity(grid, columns)}


def _move(stored: NDArray[Any], new: NDArray[Any], source: Scheme, target: Scheme) -> None:
    if source.layout == target.layout:
        new[...] = stored
    else:
        packing.transpose_into(stored, new)


def _scales_as(dtype: str, loaded: Loaded) -> NDArray[np.uint16]:
    """Bits of the scales in another type, which must hold every one exactly."""
    if dtype == loaded.scale_dtype:
        return loaded.scales
    values = scale_values(loaded.scales, loaded.scale_dtype)
    bits = packing.bf16_bits_of(values) if dtype == "BF16" else packing.half_bits_of(values)
    if bad := first_of(scale_values(bits, dtype) != values):
        raise ExecutionError(
            f"tensor '{loaded.scales_name}': scale {values[bad]} at {list(bad)} is stored as {loaded.scale_dtype};"
            f" the target's {dtype} cannot hold it exactly"
        )
    return bits


# -- quantized to 16 bits -----------------------------------------------------------------------------------------


def _write_weight(
    item: RepackItem,
    step: Repack,
    reader: StoredReader,
    target: OpenTarget,
    fs: FileSystem,
    on_bytes: Callable[[int], None],
    stopped: Callable[[], None],
) -> None:
    """Dequantize rows of one stored weight and write them, a tile at a time."""
    ((_, extent),) = item.parts
    (piece,) = item.pieces
    words_OW, scale_OG = turned(reader.load(piece.module), step.source.layout, piece.start, piece.stop)
    rows, columns = item.shape
    tile = max(1, TILE_WEIGHTS // columns)
    grid = step.source.grid
    offset = extent.offset
    for start in range(0, rows, tile):
        stopped()
        codes_OI = packing.unpack(words_OW[start : start + tile], grid.bits, "row")
        values_OI = packing.dequantize(codes_OI, scale_OG[start : start + tile], grid.bits, grid.group_size)
        bits_OI = _rounded(values_OI, step, f"tensor '{piece.module.name}'", piece.start + start)
        _write(bits_OI, offset, extent, target, fs)
        offset += bits_OI.nbytes
        on_bytes(bits_OI.nbytes)


def _rounded(values_OI: NDArray[np.float32], step: Repack, where: str, first_row: int) -> NDArray[np.uint16]:
    """Bits of the values in the step's type; float16 must not overflow, nor round what the plan calls exact."""
    if step.dtype == "BF16":
        return packing.bf16_bits_of(values_OI)
    bits_OI = packing.half_bits_of(values_OI)
    half_OI = bits_OI.view(np.float16)
    if bad := first_of(half_OI != values_OI if step.exact else np.isinf(half_OI)):
        row, column = bad
        raise ExecutionError(
            f"{where}: row {first_row + row}, column {column} stands for {values_OI[bad]}, which float16 cannot hold"
            f"{' exactly' if np.isfinite(half_OI[bad]) else ''}; use `target.format` bf16"
        )
    return bits_OI


def _write(part: NDArray[Any], offset: int, extent: Extent, target: OpenTarget, fs: FileSystem) -> None:
    data = np.ascontiguousarray(part).data.cast("B")
    if offset < extent.offset or offset + len(data) > extent.offset + extent.length:
        raise ExecutionError(f"internal: {len(data)} bytes at {offset} for an extent of {extent.length}")
    fs.write_all(target(extent.shard), data, offset)
