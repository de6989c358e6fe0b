"""Reading stored quantized weights: words and scales of one module at a time, checked.

What only the data can tell is refused here, naming the tensor: zero points of an asymmetric weight, columns in another
order, scales that are not finite.
"""

# O: output channels, I: input channels, W: words of a row, G: groups of a row.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.base.readers import SourceReader
from shardxform.base.tensors import TensorRef
from shardxform.errors import ExecutionError
from shardxform.formats import packing
from shardxform.formats.grid import Grid, Layout
from shardxform.formats.scheme import Role, Scheme
from shardxform.formats.stored import StoredModule

__all__ = ["Loaded", "StoredReader", "first_of", "identity", "rows_between", "scale_values", "turned"]

_NUMPY: Final[dict[str, Any]] = {"F16": np.uint16, "BF16": np.uint16, "I32": np.int32, "I64": np.int64}
_LARGEST_SCALE: Final = np.float32(2.0**119)  # times 128, the largest code, still a BF16


@dataclass(slots=True)
class Loaded:
    """A stored weight in memory: words and scales in the source's layout, scales as bits of `scale_dtype`."""

    words: NDArray[np.int32]
    scales: NDArray[np.uint16]
    scale_dtype: str
    scales_name: str


class StoredReader:
    """Reads and checks stored weights. Keeps the last one, of which the next item often wants the other rows."""

    def __init__(self, scheme: Scheme, source: SourceReader) -> None:
        self._scheme = scheme
        self._source = source
        self._last: tuple[StoredModule, Loaded] | None = None

    def load(self, module: StoredModule) -> Loaded:
        """Read a module's parts, checked."""
        if self._last is not None and self._last[0] is module:
            return self._last[1]
        self._last = None  # freed before the next one is read
        refs = dict(module.parts)
        for role in refs.keys() - {"words", "scales"}:
            _check(role, refs[role], self._read(refs[role]), module, self._scheme.grid)
        scales = refs["scales"]
        bits = self._read(scales)
        _refuse_bad_scales(scale_values(bits, scales.spec.dtype), scales.name)
        loaded = Loaded(self._read(refs["words"]), bits, scales.spec.dtype, scales.name)
        self._last = (module, loaded)
        return loaded

    def _read(self, ref: TensorRef) -> NDArray[Any]:
        array = np.empty(ref.spec.shape, _NUMPY[ref.spec.dtype])
        view = array.data.cast("B")
        done = 0
        for piece in ref.ranges:
            self._source.read_into(piece, view[done : done + piece.length])
            done += piece.length
        return array


# -- checks -------------------------------------------------------------------------------------------------------


def _check(role: Role, ref: TensorRef, found: NDArray[Any], module: StoredModule, grid: Grid) -> None:
    """Hold a part that a symmetric weight in its own order determines against that."""
    rows, columns = module.shape
    if role == "zeros":
        wanted = packing.qzeros(1, 32, grid.bits)[0, 0]
        if bad := first_of(found != wanted):
            word = int(found[bad]) & 0xFFFFFFFF
            raise ExecutionError(
                f"tensor '{ref.name}': zero points 0x{word:08X} at {list(bad)}, expected 0x{int(wanted):08X}:"
                " an asymmetric weight, or one of checkpoint_format gptq_v2, neither of which is supported"
            )
    elif role == "g_idx":
        if bad := first_of(found != identity(grid, columns)):
            raise ExecutionError(
                f"tensor '{ref.name}': column {bad[0]} is in group {found[bad]}; expected groups of consecutive"
                " columns: act-order is not supported"
            )
    elif found.tolist() != [rows, columns]:
        raise ExecutionError(f"tensor '{ref.name}': {found.tolist()}, expected the weight's shape {[rows, columns]}")


def _refuse_bad_scales(values: NDArray[np.float32], name: str) -> None:
    if bad := first_of(~(np.abs(values) < _LARGEST_SCALE)):
        raise ExecutionError(f"tensor '{name}': scale {values[bad]} at {list(bad)}; expected finite scales")


def first_of(wrong: NDArray[np.bool_]) -> tuple[int, ...]:
    """Index of the first element that is set; empty when none is."""
    if not wrong.any():
        return ()
    return tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))


def rows_between(array: NDArray[Any], layout: Layout, start: int, stop: int) -> NDArray[Any]:
    """View of the words or scales of rows `start`..`stop - 1` of a weight."""
    return array[:, start:stop] if layout == "gptq" else array[start:stop]


def scale_values(bits: NDArray[np.uint16], dtype: str) -> NDArray[np.float32]:
    """Scales as float32, from their bits in F16 or BF16."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def identity(grid: Grid, columns: int) -> NDArray[np.int32]:
    """The `g_idx` of columns in their own order, int32 [I]."""
    return (np.arange(columns, dtype=np.int32) // grid.span(columns)).astype(np.int32)


def turned(loaded: Loaded, layout: Layout, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """int32 words [O, W] and float32 scales [O, G] of rows `start`..`stop - 1`, whichever way they are stored."""
    words = rows_between(loaded.words, layout, start, stop)
    scales = scale_values(rows_between(loaded.scales, layout, start, stop).copy(), loaded.scale_dtype)
    if layout == "row":
        return words, scales
    words_OW = np.empty(words.shape[::-1], words.dtype)
    packing.transpose_into(words, words_OW)
    return words_OW, np.ascontiguousarray(scales.T)
