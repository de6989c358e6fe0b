"""Integers of MLX with biases of their own, as mlx_lm.convert rounds weights: `scale * code + bias`. Read only.

What `quantize` writes has biases that its scales determine, and is read as the symmetric integers that it is, in
`formats.integers`. Codes of 2, 4 or 8 bits lie in words of 32, the first in the lowest bits.
"""

# O: output channels, I: input channels, R: a run of rows, G: groups of a row, B: bytes of a row.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from shardxform.base.tensors import TensorRef, TensorSpec
from shardxform.errors import CheckpointError
from shardxform.formats.decoded import ScaledRows, refuse_scales
from shardxform.formats.encoding import Cut, Encoded, PartSpec, Read, Role, Storage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Affine", "AffineRule"]

_BITS: Final = (2, 4, 8)
_SCALES: Final = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Affine:
    """Codes of `bits`, with a scale and a bias for each `group` of columns."""

    bits: int
    group: int

    def __str__(self) -> str:
        return f"{self.bits}-bit integers with biases, groups of {self.group}"

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.bits

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the tensors that stand for a matrix; its scales may have another dtype."""
        scales = (rows, columns // self.group)
        return (
            PartSpec("words", "weight", "U32", (rows, columns * self.bits // 32)),
            PartSpec("scales", "scales", "BF16", scales),
            PartSpec("biases", "biases", "BF16", scales),
        )

    def held(self, parts: Mapping[Role, TensorRef], cut: Cut | None) -> int:
        """Scales and biases in float32, as they are read and as they are used; all values where they are turned."""
        rows, words = parts["words"].spec.shape
        turned = 0 if cut is None or cut.is_run else 4 * rows * words * 32 // self.bits
        return 16 * parts["scales"].nbytes + turned

    def open(self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool) -> ScaledRows:
        """Read scales and biases; rows are read when they are asked for.

        Raises:
            ExecutionError: a scale or a bias is no number; names the tensor.

        """
        from shardxform.formats import packing

        found = {}
        for role in ("scales", "biases"):
            ref = parts[role]
            bits_OG = packing.empty_of(ref)
            read(ref, bits_OG)
            found[role] = packing.float32_of(bits_OG, ref.spec.dtype)
            if checked:
                refuse_scales(found[role], ref.name)
        words = parts["words"]
        rows, columns = words.spec.shape
        codes = replace(words, spec=TensorSpec(words.name, "U8", (rows, 4 * columns)))
        decoding = _Codes(self.bits, found["biases"])
        return ScaledRows(codes.name, 0, shape[0], codes, read, decoding, found["scales"], checked, self.bits)


@dataclass(frozen=True, slots=True)
class _Codes:
    """Turns codes into values."""

    bits: int
    biases_OG: NDArray[np.float32]

    def decoded(self, codes_RB: NDArray[np.uint8], scales: NDArray[np.float32], begin: int) -> NDArray[np.float32]:
        """Each code times its scale, and its bias, in float32: one product, one sum."""
        import numpy as np

        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        codes_RI = ((codes_RB[:, :, None] >> shifts) & np.uint8((1 << self.bits) - 1)).reshape(len(codes_RB), -1)
        scale_RG, bias_RG = (each[begin : begin + len(codes_RB)] for each in (scales, self.biases_OG))
        codes_RGC = codes_RI.reshape(*scale_RG.shape, -1).astype(np.float32)
        values: NDArray[Any] = codes_RGC * scale_RG[..., None] + bias_RG[..., None]
        return values.reshape(codes_RI.shape)


@dataclass(frozen=True, slots=True)
class AffineRule:
    """How weights are stored: codes of `bits`, or as `others` has it by the names of modules."""

    bits: int
    others: Mapping[str, int]

    def encoded(self, weight: TensorRef, tensors: Mapping[str, TensorRef]) -> Encoded | None:
        """Give the weight whose words are `weight`; None where it holds none.

        Raises:
            CheckpointError: scales and biases are missing or are none of it.

        """
        if weight.spec.dtype != "U32" or not weight.name.endswith(".weight"):
            return None
        stem, shape = weight.name.removesuffix(".weight"), weight.spec.shape
        bits = self.others.get(stem, self.bits)
        scales, biases = (tensors.get(f"{stem}.{last}") for last in ("scales", "biases"))
        if scales is None or biases is None:
            raise CheckpointError(
                f"tensor '{weight.name}' is U32, but has no {stem}.scales and {stem}.biases beside it"
            )
        if bits not in _BITS or len(shape) != 2 or scales.spec.dtype not in _SCALES:
            raise CheckpointError(
                f"tensor '{weight.name}' {list(shape)}: expected words of codes of 2, 4 or 8 bits [O, words], with"
                f" scales of {', '.join(_SCALES)}; found {bits} bits, scales {scales.spec.dtype}"
            )
        rows, columns = shape[0], shape[1] * 32 // bits
        groups = scales.spec.shape[-1] if scales.spec.shape else 0
        wanted = TensorSpec(biases.name, scales.spec.dtype, (rows, groups))
        if biases.spec != wanted or scales.spec.shape != (rows, groups) or not groups or columns % groups:
            raise CheckpointError(
                f"tensor '{scales.name}': {list(scales.spec.shape)}, biases {biases.spec.dtype}"
                f" {list(biases.spec.shape)}: no scales for groups of {columns} columns of {rows} rows"
            )
        parts: tuple[tuple[Role, TensorRef], ...] = (("words", weight), ("scales", scales), ("biases", biases))
        return Encoded.of(Storage(Affine(bits, columns // groups), parts, (rows, columns)), weight.name)
