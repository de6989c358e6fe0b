"""Executing a `Repack` step: read a stored weight, check what only its data can tell, write it anew.

One stored weight and one new one are in memory at a time; a dequantized one is written tile by tile. What the target
could not say is refused, naming the tensor: zero points of an asymmetric weight, columns in another order, a scale that
the target's type would round.
"""

# O: output channels, I: input channels, W: words of a row, G: groups of a row.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.copying import Files, OpenSource, OpenTarget
from shardxform.errors import ExecutionError
from shardxform.fsio import FileSystem
from shardxform.plan import Extent
from shardxform.quantize import packing
from shardxform.quantize.convert import TILE_WEIGHTS, Piece, Repack, RepackItem
from shardxform.quantize.grid import Grid, Layout
from shardxform.quantize.stored import StoredModule
from shardxform.scheme import Role, Scheme
from shardxform.tensors import TensorRef

__all__ = ["repack_step"]

_NUMPY: Final[dict[str, Any]] = {"F16": np.uint16, "BF16": np.uint16, "I32": np.int32, "I64": np.int64}
_LARGEST_SCALE: Final = np.float32(2.0**119)  # times 128, the largest code, still a BF16


@dataclass(slots=True)
class _Loaded:
    """A stored weight in memory: words and scales in the source's layout, scales as bits of `scale_dtype`."""

    words: NDArray[np.int32]
    scales: NDArray[np.uint16]
    scale_dtype: str
    scales_name: str


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
    reader = _Reader(step.source, files[0], fs)
    for item in step.items:
        stopped()
        if step.target is None:
            _write_weight(item, step.source, reader, files[1], fs, on_bytes, stopped)
            continue
        parts = _repacked(item, step.source, step.target, reader)
        for role, extent in item.parts:
            assert role != "weight"
            _write(parts[role], extent.offset, extent, files[1], fs)
            on_bytes(extent.length)
    return {}


class _Reader:
    """Reads and checks stored weights. Keeps the last one, of which the next item often wants the other rows."""

    def __init__(self, scheme: Scheme, source: OpenSource, fs: FileSystem) -> None:
        self._scheme = scheme
        self._source = source
        self._fs = fs
        self._last: tuple[StoredModule, _Loaded] | None = None

    def load(self, module: StoredModule) -> _Loaded:
        """Read a module's parts, checked."""
        if self._last is not None and self._last[0] is module:
            return self._last[1]
        self._last = None  # freed before the next one is read
        refs = dict(module.parts)
        for role in refs.keys() - {"words", "scales"}:
            _check(role, refs[role], self._read(refs[role]), module, self._scheme.grid)
        scales = refs["scales"]
        bits = self._read(scales)
        _refuse_bad_scales(_values(bits, scales.spec.dtype), scales.name)
        loaded = _Loaded(self._read(refs["words"]), bits, scales.spec.dtype, scales.name)
        self._last = (module, loaded)
        return loaded

    def _read(self, ref: TensorRef) -> NDArray[Any]:
        array = np.empty(ref.spec.shape, _NUMPY[ref.spec.dtype])
        view = array.data.cast("B")
        done = 0
        for piece in ref.ranges:
            self._fs.read_exact_into(self._source(piece.file), view[done : done + piece.length], piece.offset)
            done += piece.length
        return array


# -- checks -------------------------------------------------------------------------------------------------------


def _check(role: Role, ref: TensorRef, found: NDArray[Any], module: StoredModule, grid: Grid) -> None:
    """Hold a part that a symmetric weight in its own order determines against that."""
    rows, columns = module.shape
    if role == "zeros":
        wanted = packing.qzeros(1, 32, grid.bits)[0, 0]
        if bad := _first(found != wanted):
            word = int(found[bad]) & 0xFFFFFFFF
            raise ExecutionError(
                f"tensor '{ref.name}': zero points 0x{word:08X} at {list(bad)}, expected 0x{int(wanted):08X}:"
                " an asymmetric weight, or one of checkpoint_format gptq_v2, neither of which is supported"
            )
    elif role == "g_idx":
        if bad := _first(found != _identity(grid, columns)):
            raise ExecutionError(
                f"tensor '{ref.name}': column {bad[0]} is in group {found[bad]}; expected groups of consecutive"
                " columns: act-order is not supported"
            )
    elif found.tolist() != [rows, columns]:
        raise ExecutionError(f"tensor '{ref.name}': {found.tolist()}, expected the weight's shape {[rows, columns]}")


def _refuse_bad_scales(values: NDArray[np.float32], name: str) -> None:
    if bad := _first(~(np.abs(values) < _LARGEST_SCALE)):
        raise ExecutionError(f"tensor '{name}': scale {values[bad]} at {list(bad)}; expected finite scales")


def _first(wrong: NDArray[np.bool_]) -> tuple[int, ...]:
    """Index of the first element that is set; empty when none is."""
    if not wrong.any():
        return ()
    return tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))


# -- quantized to quantized ---------------------------------------------------------------------------------------


def _repacked(item: RepackItem, source: Scheme, target: Scheme, reader: _Reader) -> dict[Role, NDArray[Any]]:
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
            _move(_rows(stored, source.layout, piece.start, piece.stop), _rows(new, layout, *to), source, target)
        row = to[1]
    parts: dict[Role, NDArray[Any]] = {"words": words, "scales": scales}
    if layout == "row":
        return {**parts, "shape": np.array([rows, columns], np.int64)}
    zeros = packing.qzeros(grid.groups(columns), rows, grid.bits)
    return {**parts, "zeros": zeros, "g_idx": _identity(grid, columns)}


def _rows(array: NDArray[Any], layout: Layout, start: int, stop: int) -> NDArray[Any]:
    """View of the words or scales of rows `start`..`stop - 1` of a weight."""
    return array[:, start:stop] if layout == "gptq" else array[start:stop]


def _move(stored: NDArray[Any], new: NDArray[Any], source: Scheme, target: Scheme) -> None:
    if source.layout == target.layout:
        new[...] = stored
    else:
        packing.transpose_into(stored, new)


def _scales_as(dtype: str, loaded: _Loaded) -> NDArray[np.uint16]:
    """Bits of the scales in another type, which must hold every one exactly."""
    if dtype == loaded.scale_dtype:
        return loaded.scales
    values = _values(loaded.scales, loaded.scale_dtype)
    with np.errstate(over="ignore", under="ignore"):
        bits = packing.bf16_bits_of(values) if dtype == "BF16" else values.astype(np.float16).view(np.uint16)
    if bad := _first(_values(bits, dtype) != values):
        raise ExecutionError(
            f"tensor '{loaded.scales_name}': scale {values[bad]} at {list(bad)} is stored as {loaded.scale_dtype};"
            f" the target's {dtype} cannot hold it exactly"
        )
    return bits


def _values(bits: NDArray[np.uint16], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def _identity(grid: Grid, columns: int) -> NDArray[np.int32]:
    return (np.arange(columns, dtype=np.int32) // grid.span(columns)).astype(np.int32)


# -- quantized to bfloat16 ----------------------------------------------------------------------------------------


def _write_weight(
    item: RepackItem,
    source: Scheme,
    reader: _Reader,
    target: OpenTarget,
    fs: FileSystem,
    on_bytes: Callable[[int], None],
    stopped: Callable[[], None],
) -> None:
    """Dequantize rows of one stored weight and write them, a tile at a time."""
    ((_, extent),) = item.parts
    (piece,) = item.pieces
    words_OW, scale_OG = _turned(piece, source.layout, reader.load(piece.module))
    rows, columns = item.shape
    tile = max(1, TILE_WEIGHTS // columns)
    grid = source.grid
    offset = extent.offset
    for start in range(0, rows, tile):
        stopped()
        codes_OI = packing.unpack(words_OW[start : start + tile], grid.bits, "row")
        bits_OI = packing.dequantize_bf16(codes_OI, scale_OG[start : start + tile], grid.bits, grid.group_size)
        _write(bits_OI, offset, extent, target, fs)
        offset += bits_OI.nbytes
        on_bytes(bits_OI.nbytes)


def _turned(piece: Piece, layout: Layout, loaded: _Loaded) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Words [O, W] and scales [O, G] of the rows of a piece, whichever way they are stored."""
    words = _rows(loaded.words, layout, piece.start, piece.stop)
    scales = _values(_rows(loaded.scales, layout, piece.start, piece.stop).copy(), loaded.scale_dtype)
    if layout == "row":
        return words, scales
    words_OW = np.empty(words.shape[::-1], words.dtype)
    packing.transpose_into(words, words_OW)
    return words_OW, np.ascontiguousarray(scales.T)


def _write(part: NDArray[Any], offset: int, extent: Extent, target: OpenTarget, fs: FileSystem) -> None:
    data = np.ascontiguousarray(part).data.cast("B")
    if offset < extent.offset or offset + len(data) > extent.offset + extent.length:
        raise ExecutionError(f"internal: {len(data)} bytes at {offset} for an extent of {extent.length}")
    fs.write_all(target(extent.shard), data, offset)
