"""Small floats in blocks along a row, as releases store them: MXFP4, MXFP8 and NVFP4.

A block is 32 columns (OCP Microscaling Formats, version 1.0) or 16 (NVFP4) that share a scale: a power of two (E8M0),
or an E4M3 float which a float32 of the whole tensor multiplies or divides. Codes of four bits (E2M1) lie two in a byte,
the lower column in the lower half. A value is its code times its scale: exact in float32 where the scale is a power of
two; else `code * (scale * whole)` or `code * (scale / whole)`, each product rounded once, as compressed-tensors and
ModelOpt compute it.

Values are rounded to it as compressed-tensors does. A power of two is that of the block's largest magnitude, less the
exponent of the largest code, and one more where the magnitude would be rounded beyond that code (torchao calls it
`EVEN`). An E4M3 scale brings the largest magnitude of the block to the largest code; the scale of the whole tensor
stays as it is, since clients want that of a gate and of its up projection to be one. A code is the nearest to the
quotient, of two the even one, and beyond the largest the largest.
"""

# O: output channels, I: input channels, R: a run of rows, G: blocks of a row, S: columns of a block.

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from shardxform.base.tensors import TensorRef, TensorSpec
from shardxform.errors import CheckpointError, ExecutionError
from shardxform.formats.decoded import HUGE, ScaledRows, compiled, refuse_scales
from shardxform.formats.encoding import Cut, Encoded, PartSpec, Read, Role, Storage
from shardxform.formats.fp8 import ELEMENTS, decoded_codes, powers_of_two

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["E2M1", "MXFP4", "MXFP8", "NVFP4", "Microscaled", "MicroscalingRule", "StackRule"]

E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the eight codes without a sign."""

Element = Literal["E2M1", "F8_E4M3", "F8_E5M2"]
Whole = Literal["", "multiplied", "divided"]


@dataclass(frozen=True, slots=True)
class Microscaled:
    """Codes with a scale for each block of columns.

    Attributes:
        element: what a code is.
        group: columns of a block.
        whole: whether a scale of the whole tensor multiplies the scales of blocks, or divides them, or is not there.
        suffixes, dtypes: of the codes, the scales, and the scale of the whole tensor.

    """

    element: Element
    group: int
    whole: Whole = ""
    suffixes: tuple[str, ...] = ("weight_packed", "weight_scale")
    dtypes: tuple[str, ...] = ("U8", "U8")

    def __str__(self) -> str:
        if self.element != "E2M1":
            return f"MXFP8 in blocks of {self.group}"
        return f"{'NVFP4' if self.whole else 'MXFP4'} in blocks of {self.group}"

    @property
    def width(self) -> int:
        """Bits of a code."""
        return 8 // self.per_byte

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 2 if self.element == "E2M1" else 1

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the codes, their scales, and the scale of all."""
        shapes = ((rows, columns // self.per_byte), (rows, columns // self.group), ())
        roles: tuple[Role, ...] = ("values", "scales", "whole")
        found = zip(roles, self.suffixes, self.dtypes, shapes, strict=False)
        return tuple(PartSpec(role, suffix, dtype, shape) for role, suffix, dtype, shape in found)

    def held(self, parts: Mapping[Role, TensorRef], cut: Cut | None) -> int:
        """The scales, in float32, and all values where they are turned; else rows are read when they are asked for."""
        turned = 0 if cut is None or cut.is_run else 4 * self.per_byte * parts["values"].nbytes
        return 4 * parts["scales"].spec.shape[0] * parts["scales"].spec.shape[1] + turned

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> ScaledRows:
        """Read the scales.

        Raises:
            ExecutionError: one is not finite, or that of all is not positive.

        """
        import numpy as np

        ref = parts["scales"]
        bits_OG = np.empty((shape[0], shape[1] // self.group), np.uint8)
        read(ref, bits_OG)
        whole = np.empty((), np.float32) if self.whole else None
        if whole is not None:
            read(parts["whole"], whole)
            if checked and not 0 < float(whole) < float("inf"):
                raise ExecutionError(f"tensor '{parts['whole'].name}': {whole}, expected a positive scale of all")
        scale_OG = self.scales(bits_OG, whole)
        if checked:
            refuse_scales(scale_OG, ref.name)
        # Codes of four bits are numbers, and stay numbers under all but huge scales.
        bounded = float(np.abs(scale_OG).max(initial=0)) < HUGE
        codes, checked = parts["values"], checked and not (self.element == "E2M1" and bounded)
        fast = self._compiled if bounded and self.element != "F8_E5M2" else None
        return ScaledRows(codes.name, 0, shape[0], codes, read, self, scale_OG, checked, self.width, fast)

    def _compiled(
        self, codes_RB: NDArray[np.uint8], scales: NDArray[np.float32], begin: int, out_RI: NDArray[np.float32]
    ) -> bool:
        """What `decoded` gives, of numbers."""
        assert self.element != "F8_E5M2"
        return compiled(self.element, codes_RB, scales, begin, (1, self.group), out_RI)

    def block_of(self, _shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        return 1, self.group

    def table(self) -> NDArray[np.float32]:
        """Values of all bytes [256, 1], or both of them [256, 2], the lower half first."""
        import numpy as np

        return _pairs().view(np.float32).reshape(256, 2) if self.per_byte == 2 else decoded_codes(self.element)[:, None]

    def decoded(self, codes_RB: NDArray[np.uint8], scales: NDArray[np.float32], begin: int) -> NDArray[np.float32]:
        """Codes times the scale of their block."""
        import numpy as np

        table = _pairs() if self.element == "E2M1" else decoded_codes(self.element)
        values_RI = np.take(table, codes_RB).view(np.float32)
        rows = len(values_RI)
        blocks_RGS = values_RI.reshape(rows, -1, self.group)
        blocks_RGS *= scales[begin : begin + rows, :, None]
        return values_RI

    def scales(self, bits: NDArray[Any], whole: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Scales of what is stored for them, and for the whole tensor."""
        import numpy as np

        if whole is None:
            return powers_of_two(bits)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            local = np.take(decoded_codes("F8_E4M3"), bits)
            scales: NDArray[np.float32] = local * whole if self.whole == "multiplied" else local / whole
        return scales

    # -- rounding values to it --------------------------------------------------------------------------------

    def maxima(self, values_OI: NDArray[np.float32]) -> NDArray[np.float32]:
        """The largest magnitude of every block [O, G]."""
        import numpy as np

        values_OGS = values_OI.reshape(len(values_OI), -1, self.group)
        most_OG: NDArray[np.float32] = np.maximum(values_OGS.max(axis=-1), -values_OGS.min(axis=-1))
        return most_OG

    def scale_bits(self, most_OG: NDArray[np.float32], whole: NDArray[np.float32] | None = None) -> NDArray[Any]:
        """Scales of blocks with these magnitudes, as they are stored."""
        import numpy as np

        element = ELEMENTS[self.element]
        if whole is None:
            # From 1.75 of a power of two on, which four bits would round to two of it: as compressed-tensors has it.
            power = (np.ascontiguousarray(most_OG).view(np.uint32) + np.uint32(1 << 21)) >> np.uint32(23)
            return np.clip(power.astype(np.int64) - int(np.log2(element.largest)), 0, 254).astype(np.uint8)
        with np.errstate(over="ignore"):
            local_OG = most_OG / np.float32(element.largest)
            local_OG = local_OG / whole if self.whole == "multiplied" else local_OG * whole
        return np.maximum(ELEMENTS["F8_E4M3"].nearest(local_OG), np.uint8(1))  # a scale of zero would lose all

    def codes(self, values_RI: NDArray[np.float32], scales: NDArray[np.float32], begin: int) -> NDArray[np.uint8]:
        """Codes of rows `begin`.. of a weight under all its scales; the reverse of `decoded`."""
        import numpy as np

        rows, columns = values_RI.shape
        blocks_RGS = values_RI.reshape(rows, -1, self.group)
        codes = ELEMENTS[self.element].nearest(blocks_RGS / scales[begin : begin + rows, :, None])
        codes_RI = codes.reshape(rows, columns)
        if self.per_byte == 1:
            return codes_RI
        pairs: NDArray[np.uint8] = codes_RI[:, ::2] | codes_RI[:, 1::2] << np.uint8(4)
        return pairs

    def laid_out(self, codes_OB: NDArray[np.uint8], bits: NDArray[Any]) -> dict[Role, NDArray[Any]]:
        """Codes and scales as they are."""
        return {"values": codes_OB, "scales": bits}


MXFP4: Final = Microscaled("E2M1", 32)
MXFP8: Final = Microscaled("F8_E4M3", 32, suffixes=("weight", "weight_scale"), dtypes=("F8_E4M3", "U8"))
NVFP4: Final = Microscaled(
    "E2M1",
    16,
    "divided",
    ("weight_packed", "weight_scale", "weight_global_scale"),
    ("U8", "F8_E4M3", "F32"),
)
"""As compressed-tensors has them; others differ in names and dtypes of the parts."""


@functools.cache
def _pairs() -> NDArray[np.uint64]:
    """Both values of every byte [256], the lower half first, as the bits of two floats."""
    import numpy as np

    values = np.array((*E2M1, *(-value for value in E2M1)), np.float32)
    codes = np.arange(256)
    return np.stack((values[codes & 15], values[codes >> 4]), axis=-1).view(np.uint64)[:, 0]


@dataclass(frozen=True, slots=True)
class MicroscalingRule:
    """What a config says is stored in one way: `encoding` has the names and dtypes of the parts."""

    encoding: Microscaled

    def encoded(self, weight: TensorRef, tensors: Mapping[str, TensorRef]) -> Encoded | None:
        """The weight whose codes are `weight`; raises as `storage` does."""
        storage = self.storage(weight, tensors)
        return Encoded.of(storage, f"{storage.name}.weight") if storage else None

    def storage(self, weight: TensorRef, tensors: Mapping[str, TensorRef]) -> Storage | None:
        """What is stored for the weight whose codes are `weight`; None where they are no such codes.

        Raises:
            CheckpointError: scales are missing, or are none of it.

        """
        encoding, spec = self.encoding, weight.spec
        stem, _, last = spec.name.rpartition(".")
        if last != encoding.suffixes[0]:
            return None
        if spec.dtype != encoding.dtypes[0] or len(spec.shape) != 2:
            if last == "weight":  # which may be in 16 bits
                return None
            raise CheckpointError(
                f"tensor '{spec.name}': {spec.dtype} {list(spec.shape)}, expected {encoding.dtypes[0]} [O, ..]"
            )
        rows, columns = spec.shape[0], spec.shape[1] * encoding.per_byte
        if columns % encoding.group:
            raise CheckpointError(f"tensor '{spec.name}': {columns} columns are no blocks of {encoding.group}")
        found: list[tuple[Role, TensorRef]] = [("values", weight)]
        for part in encoding.parts(rows, columns)[1:]:
            ref = tensors.get(f"{stem}.{part.suffix}")
            if ref is None:
                raise CheckpointError(f"tensor '{stem}.{part.suffix}' is missing; its weight means nothing without")
            if wrong := _fault(ref.spec, part):
                raise CheckpointError(f"tensor '{ref.name}': {wrong} for a weight {[rows, columns]}")
            found.append((part.role, ref))
        return Storage(encoding, tuple(found), (rows, columns))


@dataclass(frozen=True, slots=True)
class StackRule:
    """Stacks as gpt-oss has them: codes `<stack>_blocks` [E, O, G, 16] and scales `<stack>_scales` [E, O, G].

    They are stored row by row, and the stacks of 16 bits that they stand for hold each matrix transposed, [E, I, O].
    """

    def encoded(self, weight: TensorRef, tensors: Mapping[str, TensorRef]) -> Encoded | None:
        """The stack that codes stand for; None for other tensors.

        Raises:
            CheckpointError: scales are missing, or codes and scales are no stacks.

        """
        spec = weight.spec
        stem = spec.name.removesuffix("_blocks")
        if stem == spec.name:
            return None
        scales = tensors.get(f"{stem}_scales")
        if scales is None:
            raise CheckpointError(f"tensor '{stem}_scales' is missing; '{spec.name}' means nothing without")
        half = MXFP4.group // 2
        if spec.dtype != "U8" or len(spec.shape) != 4 or spec.shape[3] != half:
            raise CheckpointError(
                f"tensor '{spec.name}': {spec.dtype} {list(spec.shape)}, expected U8 [E, O, G, {half}]"
            )
        if scales.spec.dtype != "U8" or scales.spec.shape != spec.shape[:3]:
            found = f"{scales.spec.dtype} {list(scales.spec.shape)}"
            raise CheckpointError(f"tensor '{scales.name}': {found}, expected U8 {list(spec.shape[:3])}")
        count, rows, groups, _ = spec.shape
        shape = (rows, groups * MXFP4.group)
        turned = Cut(0, shape[1], transposed=True)
        sources = []
        for one in range(count):
            codes = weight.index(one).reshaped((rows, groups * half))
            parts: tuple[tuple[Role, TensorRef], ...] = (("values", codes), ("scales", scales.index(one)))
            sources.append(Storage(_STACKED, parts, shape, turned))
        return Encoded(TensorSpec(stem, "BF16", (count, shape[1], rows)), (), tuple(sources))


_STACKED: Final = Microscaled("E2M1", 32, suffixes=("blocks", "scales"))


def _fault(found: TensorSpec, part: PartSpec) -> str:
    """Say why a tensor is not a part; empty when it is. A scale of all may be a vector of one."""
    shapes = (part.shape,) if part.shape else ((), (1,))
    dtypes = {part.dtype, "F8_E8M0"} if part.dtype == "U8" and part.role == "scales" else {part.dtype}
    if found.shape in shapes and found.dtype in dtypes:
        return ""
    return f"{found.dtype} {list(found.shape)}, expected {' or '.join(sorted(dtypes))} {list(shapes[-1])}"
