"""Executing a `Gather` step: read what holds a matrix or vector, and write its values in the order that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.base.file_system import FileSystem
from shardxform.base.readers import SourceReader
from shardxform.base.tensors import BITS, TensorRef
from shardxform.execution.copying import Files
from shardxform.plan.steps import Gather

__all__ = ["SlabReader", "gather_step", "raw_bits"]

_UNSIGNED: Final = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class SlabReader:
    """Reads stored tensors whole, as bits; keeps the last one, of which the next matrix is often another cut."""

    def __init__(self, source: SourceReader) -> None:
        self._source = source
        self._last: tuple[TensorRef, NDArray[Any]] | None = None

    def read(self, ref: TensorRef) -> NDArray[Any]:
        """Bits of a tensor in its shape, as unsigned integers."""
        if self._last is None or self._last[0] != ref:
            self._last = None  # freed before the next one is read
            self._last = (ref, raw_bits(ref, self._source))
        return self._last[1]


def raw_bits(ref: TensorRef, source: SourceReader) -> NDArray[Any]:
    """Read the bits of a tensor as unsigned integers of its width, in its shape."""
    array = np.empty(ref.spec.shape, _UNSIGNED[BITS[ref.spec.dtype]])
    view = array.reshape(-1).view(np.uint8).data
    done = 0
    for piece in ref.ranges:
        source.read_into(piece, view[done : done + piece.length])
        source.done_with(piece)
        done += piece.length
    return array


def gather_step(
    step: Gather, files: Files, fs: FileSystem, on_bytes: Callable[[int], None], stopped: Callable[[], None]
) -> dict[str, Any]:
    """Write every item of `step`.

    Args:
        step: what to do.
        files: where to read and write.
        fs: effects.
        on_bytes: called with the bytes written after each item.
        stopped: raises when the run is to stop.

    Returns:
        no facts: values are not looked at.

    """
    reader = SlabReader(files[0])
    for item in step.items:
        stopped()
        values = np.ascontiguousarray(item.cut.of(reader.read(item.tensor)))
        fs.write_all(files[1](item.extent.shard), values.reshape(-1).view(np.uint8).data, item.extent.offset)
        on_bytes(item.extent.length)
    return {}
