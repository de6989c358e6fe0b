"""Codes, words and values of integer weights, and bits of floats: numpy, no rounding decisions.

A code is an unsigned integer of 4 or 8 bits; 8 or 128 stands for zero. Words are int32 and hold the codes of
consecutive input channels, the first in the lowest bits. Two layouts hold the same words: "gptq" (the GPTQ tensor
``qweight``) runs along the output channels, "row" (``weight_packed`` of compressed-tensors' pack-quantized) along the
input channels; each is the other's transpose.
"""

# O: output channels, I: input channels, R: a run of rows, G: groups of a row, W: words of a row (I * bits / 32).

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from shardxform.base.tensors import TensorRef, TensorSpec
from shardxform.errors import ExecutionError, SchemeError
from shardxform.formats.decoded import compiled
from shardxform.formats.encoding import Cut, Role, SourceDtype
from shardxform.formats.scheme import Grid, Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "IntRows",
    "bf16_bits_of",
    "code_sum",
    "dequantize",
    "determined",
    "empty_of",
    "first_of",
    "float32_of",
    "half_bits_of",
    "move",
    "not_held",
    "pack",
    "qzeros",
    "refuse_asymmetric",
    "refuse_odd",
    "transpose_into",
    "unpack",
    "values_of",
    "zero_values",
]

TRANSPOSE_BLOCK = 128
_Scalar = TypeVar("_Scalar", bound=np.generic)
_NUMPY: Final[dict[str, Any]] = {
    "F16": np.uint16,
    "BF16": np.uint16,
    "I32": np.int32,
    "U32": np.uint32,
    "I64": np.int64,
    "F32": np.float32,
}
_LARGEST_SCALE: Final = np.float32(2.0**119)  # times 128, the largest code, still a BF16


@dataclass(frozen=True, slots=True)
class IntRows:
    """Rows of an integer weight in memory.

    Attributes:
        words, scales: of the whole weight as they are stored; scales as bits.
        layout: of both.
        grid: bits and groups.
        scale_spec: name and dtype of the stored scales.
        module: name of the weight.
        first, count: the rows that these are.

    """

    words: NDArray[np.int32]
    scales: NDArray[np.uint16]
    layout: Layout
    grid: Grid
    scale_spec: TensorSpec
    module: str
    first: int
    count: int

    @property
    def fits_half(self) -> bool:
        """Whether float16 is known to hold every value: see `integers.Ints.fits_half`."""
        return self.grid.bits == 4 and self.grid.scale_grid == "bf16"

    def where(self, row: int) -> str:
        """Name a row in a message."""
        return f"tensor '{self.module}': row {self.first + row}"

    def cut(self, cut: Cut) -> IntRows:
        """Some of the rows."""
        assert not cut.transposed
        if cut.is_run:
            return replace(self, first=self.first + cut.first, count=cut.count)
        axis, at = 1 if self.layout == "gptq" else 0, self.first + cut.of(np.arange(self.count))
        words, scales = self.words.take(at, axis), self.scales.take(at, axis)
        return replace(self, words=words, scales=scales, first=0, count=cut.count)

    def turned(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """int32 words [R, W] and float32 scales [R, G] of rows `start`..`stop - 1`, whichever way they are stored."""
        begin, end = self.first + start, self.first + stop
        words = rows_between(self.words, self.layout, begin, end)
        bits = rows_between(self.scales, self.layout, begin, end)
        if self.layout == "row":
            return words, float32_of(bits.copy(), self.scale_spec.dtype)
        words_RW = np.empty(words.shape[::-1], words.dtype)
        transpose_into(words, words_RW)
        return words_RW, np.ascontiguousarray(float32_of(bits.copy(), self.scale_spec.dtype).T)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """`scale * (code - zero)`, exact in float32 [R, I]."""
        return values_of(*self.turned(start, stop), self.grid)

    def raw(self, start: int, stop: int) -> tuple[NDArray[np.generic], SourceDtype]:
        """The values: nothing narrower holds them."""
        return self.values(start, stop), "F32"


def move(
    sources: Sequence[IntRows], out: tuple[NDArray[np.generic], NDArray[np.generic]], layout: Layout, scale_dtype: str
) -> None:
    """Write words and scales of rows, one below the other, in a layout and with a dtype of scales, to the bit.

    Raises:
        ExecutionError: the dtype cannot hold a scale.

    """
    row = 0
    for rows in sources:
        bits = _scales_as(scale_dtype, rows)
        for stored, new in ((rows.words, out[0]), (bits, out[1])):
            found = rows_between(stored, rows.layout, rows.first, rows.first + rows.count)
            into = rows_between(new, layout, row, row + rows.count)
            if rows.layout == layout:
                into[...] = found
            else:
                transpose_into(found, into)
        row += rows.count


def _scales_as(dtype: str, rows: IntRows) -> NDArray[np.uint16]:
    """Bits of the scales in another type, which must hold every one exactly."""
    if dtype == rows.scale_spec.dtype:
        return rows.scales
    values = float32_of(rows.scales, rows.scale_spec.dtype)
    bits = bf16_bits_of(values) if dtype == "BF16" else half_bits_of(values)
    if bad := first_of(float32_of(bits, dtype) != values):
        raise ExecutionError(
            f"tensor '{rows.scale_spec.name}': scale {values[bad]} at {list(bad)} is stored as {rows.scale_spec.dtype};"
            f" the target's {dtype} cannot hold it exactly"
        )
    return bits


def empty_of(ref: TensorRef) -> NDArray[np.generic]:
    """Make an array for a part of an integer weight; floats are bits."""
    return np.empty(ref.spec.shape, _NUMPY[ref.spec.dtype])


def determined(role: Role, shape: tuple[int, int], grid: Grid) -> NDArray[np.generic]:
    """What is stored of a weight's shape, or of columns in their own order."""
    if role == "shape":
        return np.array(shape, np.int64)
    return (np.arange(shape[1], dtype=np.int32) // grid.span(shape[1])).astype(np.int32)


def refuse_odd(role: Role, ref: TensorRef, found: NDArray[np.generic], shape: tuple[int, int], grid: Grid) -> None:
    """Hold a part against what a symmetric weight in its own order determines of it.

    Raises:
        ExecutionError: says what is there instead.

    """
    if role == "zeros":
        wanted = qzeros(1, 32, grid.bits)[0, 0]
        if bad := first_of(found != wanted):
            word = int(found[bad]) & 0xFFFFFFFF
            raise ExecutionError(
                f"tensor '{ref.name}': zero points 0x{word:08X} at {list(bad)}, expected 0x{int(wanted):08X}:"
                " an asymmetric weight, or one of checkpoint_format gptq_v2, neither of which is supported"
            )
    elif role == "g_idx":
        if bad := first_of(found != determined(role, shape, grid)):
            raise ExecutionError(
                f"tensor '{ref.name}': column {bad[0]} is in group {found[bad]}; expected groups of consecutive"
                " columns: act-order is not supported"
            )
    elif role == "shape" and found.tolist() != list(shape):
        raise ExecutionError(f"tensor '{ref.name}': {found.tolist()}, expected the weight's shape {list(shape)}")
    elif role == "scales":
        values = float32_of(found, ref.spec.dtype)
        if bad := first_of(~(np.abs(values) < _LARGEST_SCALE)):
            raise ExecutionError(f"tensor '{ref.name}': scale {values[bad]} at {list(bad)}; expected finite scales")


def zero_values(scales: NDArray[np.uint16], dtype: str, bits: int) -> NDArray[np.uint16]:
    """What the code 0 stands for: MLX's `biases`, which are a power of two times the scales, and as exact, as bits."""
    values = float32_of(scales, dtype) * np.float32(-(1 << (bits - 1)))
    return bf16_bits_of(values) if dtype == "BF16" else half_bits_of(values)


def refuse_asymmetric(ref: TensorRef, biases: NDArray[np.uint16], scales: NDArray[np.uint16], bits: int) -> None:
    """Hold MLX's biases against what a symmetric weight has.

    Raises:
        ExecutionError: names the first that is another.

    """
    wanted = zero_values(scales, ref.spec.dtype, bits)
    if bad := first_of(wanted != biases):
        found, expected = (float32_of(each, ref.spec.dtype)[bad] for each in (biases, wanted))
        raise ExecutionError(
            f"tensor '{ref.name}': {found} at {list(bad)}, expected {expected}, {-(1 << (bits - 1))} times the scale:"
            " an asymmetric weight, which is not supported"
        )


def first_of(wrong: NDArray[np.bool_]) -> tuple[int, ...]:
    """Index of the first element that is set; empty when none is."""
    if not wrong.any():
        return ()
    return tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))


def rows_between(array: NDArray[_Scalar], layout: Layout, start: int, stop: int) -> NDArray[_Scalar]:
    """View of the words or scales of rows `start`..`stop - 1` of a weight."""
    return array[:, start:stop] if layout == "gptq" else array[start:stop]


def float32_of(bits: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Bits of BF16, F16 or F32 -> float32, exact."""
    if dtype == "BF16":
        wide = bits.astype(np.uint32)
        wide <<= np.uint32(16)  # in place: a third less time
        return wide.view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32)


def pack(codes_OI: NDArray[np.uint8], bits: int, layout: Layout) -> NDArray[np.int32]:
    """Pack codes.

    Args:
        codes_OI: uint8 [O, I], each below 2^bits; I a multiple of 32 / bits.
        bits: 4 or 8.
        layout: "gptq" or "row".

    Returns:
        int32 words, [I * bits / 32, O] for "gptq" (a transposed view), [O, I * bits / 32] for "row".

    Raises:
        SchemeError: Unsupported bits, or codes that do not fill whole words.
    """
    _check(bits, codes_OI.shape[1])
    if bits == 4:
        codes_OI = codes_OI[:, 0::2] | (codes_OI[:, 1::2] << np.uint8(4))
    words_OW = _native(np.ascontiguousarray(codes_OI).view("<i4"))
    return words_OW.T if layout == "gptq" else words_OW


def unpack(words: NDArray[np.int32], bits: int, layout: Layout) -> NDArray[np.uint8]:
    """Unpack words.

    Args:
        words: int32, [W, O] for "gptq", [O, W] for "row".
        bits: 4 or 8.
        layout: "gptq" or "row".

    Returns:
        uint8 codes [O, W * 32 / bits].

    Raises:
        SchemeError: Unsupported bits.
    """
    _check(bits, 0)
    words_OW = np.ascontiguousarray(words.T if layout == "gptq" else words).astype("<i4", copy=False)
    pairs = words_OW.view(np.uint8)
    if bits == 8:
        return pairs
    halves = pairs.astype("<u2")  # 0x00BA -> 0x0BA0 | 0x00BA -> 0x0B0A: three times as fast as every other byte
    halves |= halves << np.uint16(4)
    halves &= np.uint16(0x0F0F)
    return halves.view(np.uint8)


def qzeros(groups: int, out_features: int, bits: int) -> NDArray[np.int32]:
    """The symmetric zero points of the GPTQ layout, stored one too low: 7 per nibble, or 127 per byte.

    Returns:
        int32 [G, O * bits / 32].

    Raises:
        SchemeError: Unsupported bits, or output channels that do not fill whole words.
    """
    _check(bits, out_features)
    return np.full((groups, out_features * bits // 32), 0x77777777 if bits == 4 else 0x7F7F7F7F, np.int32)


def dequantize(
    codes_OI: NDArray[np.uint8], scale_OG: NDArray[np.generic], bits: int, group_size: int
) -> NDArray[np.float32]:
    """Values of codes: ``scale * (code - zero)``, exact in float32.

    Args:
        codes_OI: uint8 [O, I].
        scale_OG: [O, G], float16 or its bits as uint16; the last group may be short.
        bits: 4 or 8.
        group_size: Columns of a full group; -1 for the whole row.

    Returns:
        float32 [O, I].
    """
    columns = codes_OI.shape[1]
    half_OG = scale_OG.view(np.float16) if scale_OG.dtype == np.uint16 else scale_OG
    scale_OI = np.repeat(half_OG.astype(np.float32), columns if group_size == -1 else group_size, axis=1)[:, :columns]
    return (codes_OI.astype(np.float32) - np.float32(1 << (bits - 1))) * scale_OI


def values_of(words_RW: NDArray[np.int32], scale_RG: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """`dequantize` of words in rows [R, W] with their scales, by compiled code where it can."""
    if grid.bits == 4:
        values_RI = np.empty((len(words_RW), words_RW.shape[1] * 8), np.float32)
        block = (1, grid.span(values_RI.shape[1]))
        if compiled("int4", np.ascontiguousarray(words_RW).view(np.uint8), scale_RG, 0, block, values_RI):
            return values_RI
    return dequantize(unpack(words_RW, grid.bits, "row"), scale_RG, grid.bits, grid.group_size)


def bf16_bits_of(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite float32 -> BF16 bits, to nearest even (a NaN may become an infinity)."""
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def half_bits_of(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Float32 -> float16 bits, to nearest even; an infinity from 65520 on."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).view(np.uint16)


def not_held(half_bits: NDArray[np.uint16], values: NDArray[np.float32], exact: bool) -> tuple[int, ...]:
    """Index of the first value that float16 made infinite, or with `exact` rounded; empty when there is none."""
    half = half_bits.view(np.float16)
    return first_of(half != values if exact else np.isinf(half))


def transpose_into(source: NDArray[np.generic], target: NDArray[np.generic]) -> None:
    """Copy ``source`` [A, B] transposed into ``target`` [B, A]: words or scales from one layout to the other.

    Copies block by block, so that neither side is walked against its grain, with no temporaries.

    Raises:
        ValueError: The shapes or types do not match.
    """
    if target.shape != source.shape[::-1] or target.dtype != source.dtype:
        found = f"{target.dtype} {list(target.shape)}"
        raise ValueError(f"transpose: expected {source.dtype} {list(source.shape[::-1])}, found {found}")
    for a in range(0, source.shape[0], TRANSPOSE_BLOCK):
        for b in range(0, source.shape[1], TRANSPOSE_BLOCK):
            block = source[a : a + TRANSPOSE_BLOCK, b : b + TRANSPOSE_BLOCK]
            target[b : b + TRANSPOSE_BLOCK, a : a + TRANSPOSE_BLOCK] = block.T


def _check(bits: int, channels: int) -> None:
    if bits not in (4, 8):
        raise SchemeError(f"bits: expected 4 or 8, found {bits}")
    if channels * bits % 32:
        raise SchemeError(f"packing: expected a multiple of {32 // bits} channels, found {channels}")


def _native(words: NDArray[np.generic]) -> NDArray[np.int32]:
    return words.view(np.int32) if sys.byteorder == "little" else words.astype(np.int32)


# -- sums ---------------------------------------------------------------------------------------------------------

_NIBBLES: Final = np.uint64(0x0F0F0F0F0F0F0F0F)
_PAIRS: Final = np.uint64(0x00FF00FF00FF00FF)
_SUMMED: Final = 128  # words of eight bytes, the pairs of which sum up to 128 * 2 * 255 < 2^16
_BLOCK: Final = 64 * _SUMMED  # words that stay in the cache


def code_sum(data: NDArray[np.uint8], bits: int) -> int:
    """Sum of the codes, of 4 or 8 bits, in a run of whole words; four lanes of 16 bits are summed at a time."""
    whole = len(data) // (8 * _SUMMED) * _SUMMED
    words = data[: 8 * whole].view("<u8")
    total = 0
    for start in range(0, whole, _BLOCK):
        x = words[start : start + _BLOCK]
        if bits == 4:
            x = (x & _NIBBLES) + ((x >> np.uint64(4)) & _NIBBLES)
        x = (x & _PAIRS) + ((x >> np.uint64(8)) & _PAIRS)
        total += int(x.reshape(-1, _SUMMED).sum(axis=1).view("<u2").sum(dtype=np.int64))
    rest = data[8 * whole :]
    return total + int((rest if bits == 8 else (rest & 15) + (rest >> 4)).sum(dtype=np.int64))
