"""Integers of a byte as they are, which compressed-tensors calls `int-quantized`: weights of W8A8 models. Read only.

A value is its code times the scale of its row, of its group of columns, or of the whole weight, in float32: a code is
exact there and the product is rounded once. What such a model does to activations says nothing of its weights.
"""

# O: output channels, I: input channels, R: a run of rows, S, T: rows and columns of blocks.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shardxform.base.tensors import TensorRef
from shardxform.errors import CheckpointError
from shardxform.formats.decoded import ScaledRows, refuse_scales
from shardxform.formats.encoding import Cut, Encoded, PartSpec, Read, Role, Storage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Int8", "Int8Rule"]

_SCALES: Final = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Int8:
    """Codes of a byte with scales.

    Attributes:
        block: rows and columns that share a scale; None for all of them.
        scale_shape, scale_dtype: of the scales as they are stored.

    """

    block: tuple[int | None, int | None]
    scale_shape: tuple[int, ...]
    scale_dtype: str

    def __str__(self) -> str:
        rows, columns = self.block
        groups = f"groups of {columns}" if columns else "a scale a row" if rows else "one scale"
        return f"8-bit integers as they are, {groups}"

    @property
    def width(self) -> int:
        """Bits of a code."""
        return 8

    @property
    def unwritten(self) -> str:
        """Why values are not rounded to it."""
        return "which is read only"

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the codes and their scales."""
        return (
            PartSpec("values", "weight", "I8", (rows, columns)),
            PartSpec("scales", "weight_scale", self.scale_dtype, self.scale_shape),
        )

    def held(self, parts: Mapping[Role, TensorRef], cut: Cut | None) -> int:
        """The scales, in float32, and all values where they are turned; else rows are read when they are asked for."""
        turned = 0 if cut is None or cut.is_run else 4 * parts["values"].nbytes
        return 4 * parts["scales"].nbytes + turned

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> ScaledRows:
        """Read the scales.

        Raises:
            ExecutionError: one is not finite.

        """
        from shardxform.formats import packing

        ref = parts["scales"]
        bits = packing.empty_of(ref)
        read(ref, bits)
        scales = packing.float32_of(bits, ref.spec.dtype)
        scale_ST = scales.reshape(-1, 1) if self.block[1] is None else scales
        if checked:
            refuse_scales(scale_ST, ref.name)
        codes = parts["values"]
        return ScaledRows(codes.name, 0, shape[0], codes, read, self, scale_ST, checked, 8)

    def decoded(self, codes_RB: NDArray[np.uint8], scales: NDArray[np.float32], begin: int) -> NDArray[np.float32]:
        """Codes times their scales."""
        import numpy as np

        values_RI = codes_RB.view(np.int8).astype(np.float32)
        own = scales if self.block[0] is None else scales[begin : begin + len(values_RI)]
        columns = values_RI.shape[1]
        values_RI *= np.repeat(own, self.block[1] or columns, axis=1)[:, :columns]
        return values_RI


@dataclass(frozen=True, slots=True)
class Int8Rule:
    """How a config says that bytes are stored: a scale for `group` columns, -1 for a row, 0 for a whole weight."""

    group: int

    def encoded(self, weight: TensorRef, tensors: Mapping[str, TensorRef]) -> Encoded | None:
        """Give the weight whose codes are `weight`; None where it holds none.

        Raises:
            CheckpointError: its scales are missing or are none of it, or it has zero points.

        """
        spec, (stem, _, last) = weight.spec, weight.name.rpartition(".")
        if last != "weight" or spec.dtype != "I8" or len(spec.shape) != 2:
            return None
        scales = tensors.get(f"{stem}.weight_scale")
        if scales is None:
            raise CheckpointError(f"tensor '{stem}.weight_scale' is missing; its weight means nothing without")
        if f"{stem}.weight_zero_point" in tensors:
            raise CheckpointError(f"tensor '{stem}.weight_zero_point': zero points of plain int8 weights are not read")
        rows, columns = spec.shape
        wanted = {-1: ((rows, 1), (rows,)), 0: ((), (1,), (1, 1))}.get(self.group)
        wanted = wanted or ((rows, -(-columns // self.group)),)
        if scales.spec.shape not in wanted or scales.spec.dtype not in _SCALES:
            raise CheckpointError(
                f"tensor '{scales.name}': {scales.spec.dtype} {list(scales.spec.shape)}, expected"
                f" {' or '.join(_SCALES)} {list(wanted[0])} for a weight {list(spec.shape)}"
            )
        block = (1 if self.group else None, self.group if self.group > 0 else None)
        encoding = Int8(block, scales.spec.shape, scales.spec.dtype)
        parts: tuple[tuple[Role, TensorRef], ...] = (("values", weight), ("scales", scales))
        return Encoded.of(Storage(encoding, parts, (rows, columns)), weight.name)
