"""FP8 as releases store it: a byte a weight, and scales for blocks of it, for rows, or for all of it.

The scales of a block-wise weight [O, I] are [ceil(O / rows), ceil(I / columns)]: the last blocks may be partial
(DeepSeek-V3's `kv_a_proj_with_mqa` has 576 rows in blocks of 128). A value is its code times the scale, whatever the
scale is called; in float32, where a code is exact and the product is rounded once.

Values are rounded to it as compressed-tensors and DeepSeek's kernels do: the scale brings the largest magnitude of its
block to the largest code, is rounded to its own dtype, or up to a power of two where the config says `ue8m0`; a code is
the nearest to the quotient, of two the even one, and beyond the largest the largest.
"""

# O: output channels, I: input channels, R: a run of rows, S, T: rows and columns of blocks.

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shardxform.base.tensors import FP8, TensorRef, TensorSpec
from shardxform.errors import CheckpointError
from shardxform.formats.decoded import HUGE, ScaledRows, compiled, refuse_scales
from shardxform.formats.encoding import Cut, Encoded, PartSpec, Read, Role, Storage
from shardxform.model.layout import SCALES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ELEMENTS", "Element", "Fp8", "ScaleRule", "decoded_codes", "powers_of_two", "scale_rule"]

_OF_MISTRAL: Final = "qscale_weight"
"""What Mistral calls them, in blocks or one for a weight; `qscale_act` beside it is of activations."""

_NAMES: Final = (*SCALES, _OF_MISTRAL, "scale")

_READ: Final = ("F8_E4M3", "F8_E5M2")
_SCALE_DTYPES: Final = frozenset({"F32", "BF16", "F16"})
_SMALLEST: Final = 2.0**-126  # the smallest normal float32
_POWER_DTYPES: Final = frozenset({"F8_E8M0", "U8"})  # powers of two, where the config says ue8m0

Shape = tuple[int, ...]


# -- codes --------------------------------------------------------------------------------------------------------


class Element(NamedTuple):
    """A float of a byte or less.

    Attributes:
        mantissa: bits behind the point of the significand.
        bias: of the exponent.
        largest: the largest finite number.
        sign: place of the sign's bit.

    """

    mantissa: int
    bias: int
    largest: float
    sign: int

    def nearest(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes of the nearest numbers, of two the even one; beyond the largest, the largest. No value is NaN."""
        import numpy as np

        magnitude = np.minimum(np.abs(values), np.float32(self.largest))
        bits, shift = magnitude.view(np.uint32), np.uint32(23 - self.mantissa)
        rounded = bits + np.uint32((1 << (22 - self.mantissa)) - 1) + ((bits >> shift) & np.uint32(1))
        codes = (rounded >> shift) - np.uint32((127 - self.bias) << self.mantissa)
        small = magnitude < 2.0 ** (1 - self.bias)  # whose distance is that of the smallest
        if small.any():
            codes[small] = np.rint(magnitude[small] * np.float32(2.0 ** (self.bias - 1 + self.mantissa)))
        codes |= np.signbit(values).astype(np.uint32) << np.uint32(self.sign)
        return codes.astype(np.uint8)


ELEMENTS: Final[Mapping[str, Element]] = {
    "E2M1": Element(1, 1, 6.0, 3),
    "F8_E4M3": Element(3, 7, 448.0, 7),
    "F8_E5M2": Element(2, 15, 57344.0, 7),
}
"""The floats that codes are, by the name of the dtype."""


# -- the encoding -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fp8:
    """Bytes of a dtype with scales.

    Attributes:
        dtype: F8_E4M3 or F8_E5M2.
        block: rows and columns that share a scale; None for all of them. The last blocks may be partial.
        scale_suffix, scale_dtype: of the scales as they are stored.
        powers: whether scales are powers of two, in whatever dtype.
        turned: whether scales are stored by columns and rows of blocks, [T, S].

    """

    dtype: str
    block: tuple[int | None, int | None]
    scale_suffix: str
    scale_dtype: str
    powers: bool = False
    turned: bool = False

    def __str__(self) -> str:
        rows, columns = self.block
        if rows and columns:
            return f"FP8 in blocks of {rows} x {columns}"
        return "FP8, a scale a row" if rows else "FP8, one scale"

    @property
    def width(self) -> int:
        """Bits of a code."""
        return 8

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the weight and its scales."""
        scales = (-(-rows // (self.block[0] or rows)), -(-columns // (self.block[1] or columns)))
        scales = scales[::-1] if self.turned else scales
        return (
            PartSpec("values", "weight", self.dtype, (rows, columns)),
            PartSpec("scales", self.scale_suffix, self.scale_dtype, scales),
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
        import numpy as np

        ref = parts["scales"]
        bits = np.empty(ref.spec.shape, {"F32": "f4", "BF16": "u2", "F16": "u2"}.get(ref.spec.dtype, "u1"))
        read(ref, bits)
        scale_ST = self.scales(bits.reshape(self.parts(*shape)[1].shape))
        if checked:
            refuse_scales(scale_ST, ref.name)
        fast = self._compiled if float(np.abs(scale_ST).max(initial=0)) < HUGE else None
        codes = parts["values"]
        return ScaledRows(codes.name, 0, shape[0], codes, read, self, scale_ST, checked, 8, fast)

    def _compiled(
        self, codes_RB: NDArray[np.uint8], scales: NDArray[np.float32], begin: int, out_RI: NDArray[np.float32]
    ) -> bool:
        """What `decoded` gives, of E4M3 that is a number."""
        if self.dtype != "F8_E4M3":
            return False
        rows, columns = self.block[0] or begin + len(codes_RB), self.block[1] or codes_RB.shape[1]
        return compiled("F8_E4M3", codes_RB, scales, begin, (rows, columns), out_RI)

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a scale in a weight of that shape."""
        return self.block[0] or shape[0], self.block[1] or shape[1]

    def table(self) -> NDArray[np.float32]:
        """Values of all bytes [256, 1]."""
        return decoded_codes(self.dtype)[:, None]

    def decoded(self, codes_RB: NDArray[np.uint8], scales: NDArray[np.float32], begin: int) -> NDArray[np.float32]:
        """Codes times the scale of their block, each product rounded once."""
        import numpy as np

        values_RI = np.take(decoded_codes(self.dtype), codes_RB)
        end, columns = begin + len(values_RI), values_RI.shape[1]
        rows = self.block[0] or end  # of one scale for all rows, they are in block 0
        for block in range(begin // rows, -(-end // rows)):
            scale_I = np.repeat(scales[block], self.block[1] or columns)[:columns]
            values_RI[max(block * rows - begin, 0) : (block + 1) * rows - begin] *= scale_I
        return values_RI

    def scales(self, bits: NDArray[Any], _whole: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Scales of what is stored for them."""
        from shardxform.formats.packing import float32_of

        scales = float32_of(bits, self.scale_dtype) if bits.itemsize > 1 else powers_of_two(bits)
        return scales.T if self.turned else scales

    # -- rounding values to it --------------------------------------------------------------------------------

    def maxima(self, values_OI: NDArray[np.float32]) -> NDArray[np.float32]:
        """The largest magnitude under each scale [S, T]."""
        import numpy as np

        rows, columns = values_OI.shape
        height, width = self.block[0] or rows, self.block[1] or columns
        starts = np.arange(0, columns, width)
        most_ST = np.empty((-(-rows // height), len(starts)), np.float32)
        for block in range(len(most_ST)):
            values = values_OI[block * height : (block + 1) * height]
            most_I = np.maximum(values.max(axis=0), -values.min(axis=0))
            most_ST[block] = np.maximum.reduceat(most_I, starts)
        return most_ST

    def scale_bits(self, most_ST: NDArray[np.float32], _whole: NDArray[np.float32] | None = None) -> NDArray[Any]:
        """Scales under which the largest magnitudes are the largest code, as they are stored; 1 where all is zero."""
        import numpy as np

        from shardxform.formats import packing

        most_ST = np.ascontiguousarray(most_ST.T) if self.turned else most_ST
        scale_ST = most_ST / np.float32(ELEMENTS[self.dtype].largest)
        scale_ST = np.where(scale_ST > 0, np.maximum(scale_ST, np.float32(_SMALLEST)), np.float32(1))
        if self.powers or self.scale_dtype in _POWER_DTYPES:
            fraction, exponent = np.frexp(scale_ST)
            power = exponent - (fraction == 0.5)  # rounded up
            if self.scale_dtype in _POWER_DTYPES:
                bits: NDArray[np.uint8] = np.clip(power + 127, 0, 254).astype(np.uint8)
                return bits
            scale_ST = np.ldexp(np.float32(1), power)
        if self.scale_dtype == "F32":
            return scale_ST
        if self.scale_dtype == "BF16":
            return packing.bf16_bits_of(scale_ST)
        return packing.half_bits_of(np.clip(scale_ST, np.float32(2.0**-14), np.float32(65504)))

    def codes(self, values_RI: NDArray[np.float32], scales: NDArray[np.float32], begin: int) -> NDArray[np.uint8]:
        """Codes of rows `begin`.. of a weight under all its scales; the reverse of `decoded`."""
        import numpy as np

        quotient_RI = np.empty_like(values_RI)
        end, columns = begin + len(values_RI), values_RI.shape[1]
        rows = self.block[0] or end
        for block in range(begin // rows, -(-end // rows)):
            run = slice(max(block * rows - begin, 0), (block + 1) * rows - begin)
            scale_I = np.repeat(scales[block], self.block[1] or columns)[:columns]
            np.divide(values_RI[run], scale_I, out=quotient_RI[run])
        return ELEMENTS[self.dtype].nearest(quotient_RI)

    def laid_out(self, codes_OB: NDArray[np.uint8], bits: NDArray[Any]) -> dict[Role, NDArray[Any]]:
        """Codes and scales as they are."""
        return {"values": codes_OB, "scales": bits}


@functools.cache
def decoded_codes(dtype: str) -> NDArray[np.float32]:
    """Values of all 256 codes. E4M3 has no infinities, and NaN where all other bits are set; E5M2 is half a float16."""
    import numpy as np

    codes = np.arange(256)
    if dtype == "F8_E5M2":
        return (codes.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    magnitude = np.where(codes & 127 == 127, np.nan, magnitude)
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


def powers_of_two(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scales of E8M0: powers of two, and a NaN."""
    import numpy as np

    return np.take(_powers(), bits)


@functools.cache
def _powers() -> NDArray[np.float32]:
    """All 256."""
    import numpy as np

    return np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


# -- what configs say of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """How a config says that scales are stored: `names` that clients read, and dtypes.

    `block` is rows and columns of a block, empty for one scale a weight or, with `rows`, one a row; None where the
    config does not say. `transposed` says that stacks of the family hold matrices [I, O]: scales may be stored like
    them, or like the matrices [O, I].
    """

    names: tuple[str, ...]
    block: tuple[int, ...] | None
    rows: bool = False
    dtypes: frozenset[str] = _SCALE_DTYPES
    transposed: bool = False

    @property
    def powers(self) -> bool:
        """Whether scales are powers of two."""
        return self.dtypes >= _POWER_DTYPES

    def shapes(self, weight: Shape) -> tuple[Shape, ...] | None:
        """Shapes that the scales of a weight may have; None for any."""
        if self.block is None or len(weight) < 2:
            return None
        if self.block:
            if self.transposed and len(weight) == 3:
                return _of_blocks(weight, self.block) + _of_blocks((weight[0], *weight[:0:-1]), self.block)
            return _of_blocks(weight, self.block)
        *stacked, rows, _ = weight
        if self.rows:
            return (*stacked, rows, 1), (*stacked, rows)
        return (tuple(stacked), (*stacked, 1), (*stacked, 1, 1))

    def fault(self, scale: TensorSpec, weight: Shape) -> str:
        """Say why these are no scales of such a weight; empty when they are."""
        if scale.dtype not in self.dtypes:
            return f"{scale.dtype}, expected {' or '.join(sorted(self.dtypes))} for the scales of an FP8 weight"
        shapes = self.shapes(weight)
        if shapes is None or scale.shape in shapes:
            return ""
        blocks = f" in blocks of {list(self.block)}" if self.block else ""
        return f"shape {list(scale.shape)}, expected {list(shapes[0])} for a weight {list(weight)}{blocks}"

    def beside(self, weight: TensorSpec) -> tuple[str, tuple[str, ...]]:
        """What names of scales of a weight begin with, and may end with: stacks may have no last part of their own."""
        return _beside(weight, self.names)

    def named(self, weight: TensorSpec) -> tuple[str, ...]:
        """All that scales of a weight are called by anybody, as `beside` has it."""
        return _beside(weight, _NAMES)[1]

    def encoded(self, weight: TensorRef, tensors: Mapping[str, TensorRef]) -> Encoded | None:
        """The weight [O, I], or stack of them [E, O, I], whose codes are `weight`; None for one that is not FP8.

        Raises:
            CheckpointError: its scales are missing, or are none of it; or it is FP8 of a kind that is not read.

        """
        spec = weight.spec
        if spec.dtype not in FP8:
            return None
        if (last := spec.name.rpartition(".")[2]) in self.names or last in SCALES:
            return None  # scales may be FP8 themselves
        if spec.dtype not in _READ or len(spec.shape) not in (2, 3) or self.block is None:
            kinds = " and ".join(_READ)
            raise CheckpointError(
                f"tensor '{spec.name}' is {spec.dtype} {list(spec.shape)}; matrices [O, I] of {kinds} are read"
            )
        stem, names = self.beside(spec)
        there = [name for name in _each(names, self.named(spec)) if stem + name in tensors]
        if len(there) > 1:
            both = "' and '".join(stem + name for name in there)
            raise CheckpointError(f"tensor '{spec.name}' has scales twice: '{both}'; expected one of them")
        suffix = next((name for name in there if name in names), None)
        if suffix is None:
            raise CheckpointError(
                f"tensor '{stem}{names[0]}' is missing; its weight is {spec.dtype}, which means nothing without"
            )
        scales = tensors[stem + suffix]
        turned = self._is_turned(scales.spec, spec.shape)
        if wrong := self.fault(scales.spec, spec.shape):
            raise CheckpointError(f"tensor '{scales.name}': {wrong}")
        block = (self.block[0], self.block[1]) if self.block else (1 if self.rows else None, None)
        encoding = _one_fp8(spec.dtype, block, suffix, scales.spec.dtype, self.powers, turned)
        rows, columns = spec.shape[-2:]
        pairs = [(weight, scales)]
        if len(spec.shape) == 3:
            pairs = [(weight.index(at), scales.index(at)) for at in range(spec.shape[0])]
        storages = [Storage(encoding, (("values", one), ("scales", its)), (rows, columns)) for one, its in pairs]
        return Encoded(TensorSpec(spec.name, "BF16", spec.shape), (), tuple(storages))

    def _is_turned(self, scales: TensorSpec, stack: Shape) -> bool:
        """Whether the scales of a stack of transposed matrices are those of the matrices as they are meant.

        Raises:
            CheckpointError: blocks are no squares, or there are as many of them in either direction.

        """
        if not (self.transposed and self.block and len(stack) == 3):
            return False
        aligned, turned = self.shapes(stack) or ((), ())
        if self.block[0] != self.block[1]:
            raise CheckpointError(
                f"tensor '{scales.name}': scales of a stack that is stored transposed, in blocks of {list(self.block)}:"
                " which size is that of rows cannot be told; expected square blocks"
            )
        if aligned == turned:
            raise CheckpointError(
                f"tensor '{scales.name}': {list(scales.shape)} scales of a stack that is stored transposed"
                f" {list(stack)}: whether they are transposed too cannot be told from a square; read a checkpoint with"
                " experts one by one, or in 16 bits"
            )
        return scales.shape == turned


def _beside(weight: TensorSpec, names: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    if len(weight.shape) == 3 and not weight.name.endswith("weight"):
        return f"{weight.name}_", tuple(name.removeprefix("weight_") for name in names)
    return weight.name.removesuffix("weight"), names


@functools.cache
def _each(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    """All of these, once."""
    return tuple(dict.fromkeys(names + others))


_one_fp8 = functools.lru_cache(maxsize=64)(Fp8)


@functools.lru_cache(maxsize=1024)
def _of_blocks(weight: Shape, block: tuple[int, ...]) -> tuple[Shape, ...]:
    """The one shape that scales of blocks have."""
    *stacked, rows, columns = weight
    return ((*stacked, -(-rows // block[0]), -(-columns // block[1])),)


def scale_rule(declared: Mapping[str, object]) -> ScaleRule | None:
    """Read how a quantization_config says that scales are stored; None for blocks that are none."""
    method = declared.get("quant_method")
    if method == "fp8":
        block = declared.get("weight_block_size")
        power = declared.get("scale_fmt") == "ue8m0"
        dtypes = _SCALE_DTYPES | _POWER_DTYPES if power else _SCALE_DTYPES
        if block is None:
            return ScaleRule((*SCALES, _OF_MISTRAL), (), dtypes=dtypes)
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            return ScaleRule((SCALES[0], _OF_MISTRAL), tuple(block), dtypes=dtypes)
        return None
    if method == "fbgemm_fp8":
        return ScaleRule(SCALES[1:], (), rows=True)
    if method == "compressed-tensors":
        return ScaleRule(SCALES[1:], *_of_groups(declared.get("config_groups")))
    return ScaleRule(SCALES, None)


def _of_groups(groups: object) -> tuple[tuple[int, ...] | None, bool]:
    """Blocks, and whether there is a scale a row, where all groups of compressed-tensors agree on it."""
    listed = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") for group in listed if isinstance(group, Mapping)]
    said = [(w.get("strategy"), tuple(w.get("block_structure") or ())) for w in weights if isinstance(w, Mapping)]
    kinds = {(name, block) for name, block in said if isinstance(name, str) and all(type(n) is int for n in block)}
    if len(kinds) != 1 or not all(isinstance(name, str) for name, _ in said):
        return None, False
    strategy, block = kinds.pop()
    if strategy == "block":
        return (block if len(block) == 2 and all(type(n) is int and n > 0 for n in block) else None), False
    return (() if strategy in ("tensor", "channel") else None), strategy == "channel"
