"""The bytes of ggml's blocks, in numpy: from codes and scales, from floats by ggml's own rules, and back to floats.

The rules are those of `quantize_row_*_ref` in ggml-quants.c of llama.cpp, in float32, each operation rounded by itself,
as ggml's library computes it where its compiler does not fuse a product with a sum: on x86-64, whatever the machine.
"""

# R: a run of rows, I: input channels, G: groups of a row, N: blocks, S: columns of a block, B: bytes.

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from shardxform.base.tensors import BLOCKS
from shardxform.formats.scheme import Grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]
    Ints = NDArray[np.int32]

__all__ = ["block_values", "of_codes", "overflowing", "rounded_numpy"]

_HALF: Final = 2  # bytes of a float16
_MIDDLE: Final = 128  # a code of 8 bits that means zero
_MIDDLES: Final = 0x8080_8080_8080_8080


def of_codes(codes_RI: Bytes, half_RG: NDArray[np.uint16], grid: Grid, type_name: str) -> Bytes:
    """Blocks of Q4_0 or Q8_0 that hold symmetric codes, each with its group's scale.

    Args:
        codes_RI: uint8 [R, I], offset by the grid's code of zero.
        half_RG: float16 bits [R, G].
        grid: bits, at most as many as the type has, and groups.
        type_name: Q4_0 or Q8_0.

    """
    rows, columns = codes_RI.shape
    group_of_block = np.arange(0, columns, 32) // grid.span(columns)
    if type_name == "Q8_0" and grid.bits == 4:
        codes_RI = codes_RI + np.uint8(_MIDDLE - grid.zero_code)
    eights_RNE = np.ascontiguousarray(codes_RI).view("<u8").reshape(rows, -1, 4)  # eight codes at a time
    if type_name == "Q4_0":
        eights_RNE = eights_RNE[..., :2] | (eights_RNE[..., 2:] << np.uint64(4))
    else:
        eights_RNE = eights_RNE ^ np.uint64(_MIDDLES)  # two's complement
    out = np.empty((rows, columns // 32), [("d", "<u2"), ("codes", "<u8", (eights_RNE.shape[-1],))])
    out["d"], out["codes"] = half_RG[:, group_of_block], eights_RNE
    return out.view(np.uint8).reshape(rows, -1)


def overflowing(blocks_RB: Bytes, type_name: str) -> tuple[int, ...]:
    """Row and block of the first scale that is infinite in float16; empty when none is."""
    blocks_RNB = blocks_RB.reshape(len(blocks_RB), -1, BLOCKS[type_name][1])
    for at in _SCALES[type_name]:
        magnitude = blocks_RNB[..., at + 1] & 0x7F
        if (magnitude >= 0x7C).any():
            row, block = np.argwhere(magnitude >= 0x7C)[0]
            return int(row), int(block)
    return ()


def rounded_numpy(values_NS: Floats, type_name: str) -> Bytes:
    """Blocks uint8 [N, B] of finite values float32 [N, S], by ggml's rule: what ``ggml_kernels.rounded`` compiles."""
    with np.errstate(all="ignore"):  # scales may be zero, or overflow, as in C
        return _RULES[type_name](values_NS)


def block_values(blocks_RB: Bytes, type_name: str) -> Floats:
    """Values of blocks, float32 [R, I]; see ``Ggml.unreadable`` for types whose are known."""
    rows = len(blocks_RB)
    blocks_NB = blocks_RB.reshape(-1, BLOCKS[type_name][1])
    with np.errstate(all="ignore"):  # scales may be no numbers
        return _decoder(type_name)(blocks_NB).reshape(rows, -1)


@cache
def _decoder(type_name: str) -> Callable[[Bytes], Floats]:
    """What decodes blocks of a type: of those that are not written here, the gguf package."""
    if type_name in _DECODED:
        return _DECODED[type_name]
    from gguf import GGMLQuantizationType, quants

    type_number = GGMLQuantizationType[type_name]
    return lambda blocks_NB: quants.dequantize(blocks_NB, type_number)


# -- pieces ------------------------------------------------------------------------------------------------------------
# Of N blocks of any rows, or of P parts of blocks.


def _half(values: Floats) -> Bytes:
    """float16 bytes [N, 2] of numbers [N]."""
    return values.astype("<f2")[:, None].view(np.uint8)


def _number(blocks_NB: Bytes, at: int = 0) -> Floats:
    """Numbers [N, 1] whose float16 bytes are at a place of each block."""
    return np.ascontiguousarray(blocks_NB[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(codes: Bytes) -> Bytes:
    """[..., 32] codes of 4 bits -> [..., 16]: those of the first half below those of the second."""
    return codes[..., :16] | (codes[..., 16:] << np.uint8(4))


def _halved(nibbles: Bytes) -> Bytes:
    """[..., B] -> [..., 2 * B] codes of 4 bits: all lower ones, then all upper ones."""
    return np.concatenate((nibbles & np.uint8(15), nibbles >> np.uint8(4)), axis=-1)


def _fifths(codes_NS: Bytes) -> Bytes:
    """The fifth bits of 32 codes, as 4 bytes."""
    return np.packbits((codes_NS >> np.uint8(4)) & np.uint8(1), axis=1, bitorder="little")


def _with_fifths(nibbles: Bytes, fifths: Bytes) -> Bytes:
    """Codes of 5 bits [N, 32]."""
    return _halved(nibbles) | (np.unpackbits(fifths, axis=1, bitorder="little") << np.uint8(4))


def _inverse(d: Floats) -> Floats:
    """1 / d, and 0 of 0."""
    return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _truncated(x: Floats) -> Bytes:
    """(int8_t) of floats, as x86 has it for those that are no such integer."""
    return np.where(np.abs(x) < 2.0**31, x, np.float32(0)).astype(np.int32).astype(np.int8).view(np.uint8)


def _at_most(codes: Bytes, most: int) -> Bytes:
    """Signed bytes, but `most` for larger ones."""
    return np.minimum(codes.view(np.int8), np.int8(most)).view(np.uint8)


def _away(x: Floats) -> Floats:
    """C's roundf: to nearest, halves away from zero."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= np.float32(0.5), np.copysign(np.float32(1), x), np.float32(0))


def _nearest(x: Floats) -> Ints:
    """To nearest, ties to even, by the bits of a sum; beyond 22 bits what these are, as ggml's nearest_int has it."""
    return ((x + np.float32(12582912)).view(np.int32) & np.int32(0x007FFFFF)) - np.int32(0x00400000)


def _extreme(values_NS: Floats) -> Floats:
    """Value of the largest magnitude in each block, the first of equals; the positive zero of zeros."""
    return _at(values_NS, np.abs(values_NS).argmax(axis=1)) + np.float32(0)


def _at(values_NS: Floats, at: NDArray[np.intp]) -> Floats:
    """One value of each block."""
    return np.take_along_axis(values_NS, at[:, None], axis=1)[:, 0]


# -- blocks of 32 columns ----------------------------------------------------------------------------------------------


def _to_q4_0(values_NS: Floats) -> Bytes:
    d = _extreme(values_NS) / np.float32(-8)
    codes = _truncated(values_NS * _inverse(d)[:, None] + np.float32(8.5))
    return np.concatenate((_half(d), _nibbles(_at_most(codes, 15))), axis=1)


def _to_q5_0(values_NS: Floats) -> Bytes:
    d = _extreme(values_NS) / np.float32(-16)
    codes = _truncated(values_NS * _inverse(d)[:, None] + np.float32(16.5))
    codes = _at_most(codes, 31)
    return np.concatenate((_half(d), _fifths(codes), _nibbles(codes & np.uint8(15))), axis=1)


def _to_q8_0(values_NS: Floats) -> Bytes:
    d = np.abs(values_NS).max(axis=1) / np.float32(127)
    return np.concatenate((_half(d), _truncated(_away(values_NS * _inverse(d)[:, None]))), axis=1)


def _from_least(values_NS: Floats, most: int) -> tuple[Bytes, Bytes]:
    """Scale and least value as float16, and codes from 0 to about `most`, as signed bytes."""
    low, high = _at(values_NS, values_NS.argmin(axis=1)), _at(values_NS, values_NS.argmax(axis=1))
    d = (high - low) / np.float32(most)
    codes = _truncated((values_NS - low[:, None]) * _inverse(d)[:, None] + np.float32(0.5))
    return np.concatenate((_half(d), _half(low)), axis=1), codes


def _to_q4_1(values_NS: Floats) -> Bytes:
    scales, codes = _from_least(values_NS, 15)
    return np.concatenate((scales, _nibbles(_at_most(codes, 15))), axis=1)


def _to_q5_1(values_NS: Floats) -> Bytes:
    scales, codes = _from_least(values_NS, 31)
    return np.concatenate((scales, _fifths(codes), _nibbles(codes & np.uint8(15))), axis=1)


def _of_q4_0(blocks_NB: Bytes) -> Floats:
    return (_halved(blocks_NB[:, 2:]).astype(np.float32) - np.float32(8)) * _number(blocks_NB)


def _of_q4_1(blocks_NB: Bytes) -> Floats:
    return _halved(blocks_NB[:, 4:]).astype(np.float32) * _number(blocks_NB) + _number(blocks_NB, 2)


def _of_q5_0(blocks_NB: Bytes) -> Floats:
    codes = _with_fifths(blocks_NB[:, 6:], blocks_NB[:, 2:6])
    return (codes.astype(np.float32) - np.float32(16)) * _number(blocks_NB)


def _of_q5_1(blocks_NB: Bytes) -> Floats:
    codes = _with_fifths(blocks_NB[:, 8:], blocks_NB[:, 4:8])
    return codes.astype(np.float32) * _number(blocks_NB) + _number(blocks_NB, 2)


def _of_q8_0(blocks_NB: Bytes) -> Floats:
    return blocks_NB[:, 2:].view(np.int8).astype(np.float32) * _number(blocks_NB)


EPSILON: Final = np.float32(1e-15)
"""Largest value of a group that is all zeros to ggml (GROUP_MAX_EPS)."""

# -- codes that stand for numbers of a table ---------------------------------------------------------------------------

E2M1: Final = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)
"""Twice what a code of MXFP4 stands for."""

UNEVEN: Final = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)
"""What a code of IQ4_NL stands for."""

STEPS: Final = (UNEVEN[:-1] + UNEVEN[1:]) / np.float32(2)
"""From which numbers on the next code is the nearest: also by ggml's comparison of differences in float32."""


def _to_mxfp4(values_NS: Floats) -> Bytes:
    """The largest value is at most 6 times the power of two, or is taken for it; codes are the nearest, by trial."""
    largest = np.abs(values_NS).max(axis=1)
    exponent = np.floor(np.log2(largest.astype(np.float64)).astype(np.float32))  # C's log2f, which rounds upwards too
    power = np.where(largest > 0, exponent - np.float32(2) + np.float32(127), np.float32(0))
    power_N = power.astype(np.int32).astype(np.uint8)
    step = _half_powers(power_N)[:, None]
    codes, best = np.zeros(values_NS.shape, np.uint8), np.abs(values_NS)
    for code in range(1, 16):
        error = np.abs(E2M1[code] * step - values_NS)
        better = error < best
        np.copyto(codes, np.uint8(code), where=better)
        np.copyto(best, error, where=better)
    return np.concatenate((power_N[:, None], _nibbles(codes)), axis=1)


def _half_powers(power: Bytes) -> Floats:
    """2 to the power of p - 128: half of what E8M0 says, for codes that stand for half of what the table has."""
    bits = power.astype(np.uint32)
    return np.where(bits < 2, np.uint32(0x00200000) << bits, (bits - np.uint32(1)) << np.uint32(23)).view(np.float32)


def _of_mxfp4(blocks_NB: Bytes) -> Floats:
    return E2M1[_halved(blocks_NB[:, 1:])] * _half_powers(blocks_NB[:, :1])


def _to_iq4_nl(values_NS: Floats) -> Bytes:
    """The scale of least squared error, weighted by the square of the values, of 16 that are tried."""
    x_SN = np.ascontiguousarray(values_NS.T)
    most = _extreme(values_NS)
    scale, best = _fit(x_SN, np.float32(1) / (-most / UNEVEN[0]), None)
    for step in range(-7, 8):
        scale, best = _fit(x_SN, (np.float32(step) + UNEVEN[0]) / most, (scale, best))
    scale = np.where(np.abs(most) < EPSILON, np.float32(0), scale)
    inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    codes = np.searchsorted(STEPS, x_SN * inverse, side="right").astype(np.uint8).T
    return np.concatenate((_half(scale), _nibbles(codes)), axis=1)


def _fit(x_SN: Floats, inverse: Floats, so_far: tuple[Floats, Floats] | None) -> tuple[Floats, Floats]:
    """Scale of least squared error for the codes that an inverse scale gives, if it is better than the one so far."""
    along, square = np.zeros_like(inverse), np.zeros_like(inverse)
    for x in x_SN:
        q = UNEVEN[np.searchsorted(STEPS, inverse * x, side="right")]
        wq = x * x * q
        along += wq * x
        square += wq * q
    found = along / square
    if so_far is None:
        found = np.where(square > 0, found, np.float32(0))
        return found, found * along
    better = (square > 0) & (along * along > so_far[1] * square)
    return np.where(better, found, so_far[0]), np.where(better, found * along, so_far[1])


def _of_iq4_nl(blocks_NB: Bytes) -> Floats:
    return UNEVEN[_halved(blocks_NB[:, 2:])] * _number(blocks_NB)


# -- blocks of 256 columns ---------------------------------------------------------------------------------------------
# Parts of 16 or 32 columns have scales that are integers times the float16 of the block.


def _to_q4_k(values_NS: Floats) -> Bytes:
    head, codes = _affine_codes(values_NS, 15, np.float32(-1), 20)
    codes = codes.reshape(-1, 4, 2, 32)
    return np.concatenate((head, (codes[:, :, 0] | (codes[:, :, 1] << np.uint8(4))).reshape(-1, 128)), axis=1)


def _to_q5_k(values_NS: Floats) -> Bytes:
    head, codes = _affine_codes(values_NS, 31, np.float32(-0.5), 15)
    fifths = np.packbits((codes >> np.uint8(4)).swapaxes(1, 2), axis=2, bitorder="little").reshape(-1, 32)
    codes = (codes & np.uint8(15)).reshape(-1, 4, 2, 32)
    low = (codes[:, :, 0] | (codes[:, :, 1] << np.uint8(4))).reshape(-1, 128)
    return np.concatenate((head, fifths, low), axis=1)


def _affine_codes(values_NS: Floats, most: int, first: np.float32, steps: int) -> tuple[Bytes, Bytes]:
    """The scales of blocks, as their first 16 bytes, and codes [N, 8, 32] from 0 to `most`."""
    x_SP = np.ascontiguousarray(values_NS.reshape(-1, 32).T)
    scale_P, least_P, inverse_P, base_P = _affine_scales(x_SP, most, first, steps)
    d, scales = _six_bits(scale_P)
    dmin, mins = _six_bits(least_P)
    head = np.concatenate((_half(d), _half(dmin), _packed_scales(scales, mins)), axis=1)
    step_P = (_number(head) * scales).reshape(-1)
    shift_P = (_number(head, 2) * mins).reshape(-1)
    codes = np.where(step_P == 0, _nearest(inverse_P * (x_SP - base_P)), _nearest((x_SP + shift_P) / step_P))
    return head, np.clip(codes, 0, most).astype(np.uint8).T.reshape(-1, 8, 32)


def _six_bits(found_P: Floats) -> tuple[Floats, Bytes]:
    """The float32 that multiplies the scales of a block [N], and these as integers of six bits [N, 8]."""
    found = found_P.reshape(-1, 8)
    most = np.maximum(found.max(axis=1), np.float32(0))
    inverse = np.where(most > 0, np.float32(63) / most, np.float32(0))
    codes = _nearest(inverse[:, None] * found).astype(np.uint8)
    return most / np.float32(63), np.minimum(codes, np.uint8(63))


def _packed_scales(scales: Bytes, mins: Bytes) -> Bytes:
    """Eight scales and eight mins of six bits -> 12 bytes; of the last four, the upper bits are with the first four."""
    high = np.uint8(4), np.uint8(6)
    first = scales[:, :4] | (scales[:, 4:] >> high[0] << high[1])
    second = mins[:, :4] | (mins[:, 4:] >> high[0] << high[1])
    third = (scales[:, 4:] & np.uint8(15)) | (mins[:, 4:] << high[0])
    return np.concatenate((first, second, third), axis=1)


def _affine_scales(x_SP: Floats, most: int, first: np.float32, steps: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Scales and least values of least squared error, weighted by size, as make_qkx2_quants finds them.

    Returns:
        scale and magnitude of the least value [P]; and what the codes were found with: an inverse scale and a base [P].

    """
    weight_SP = np.sqrt(_sum(x_SP * x_SP) / np.float32(32)) + np.abs(x_SP)
    sum_w, sum_x = _sum(weight_SP), _sum(weight_SP * x_SP)
    low, high = np.minimum(x_SP.min(axis=0), np.float32(0)), x_SP.max(axis=0)
    base = low.copy()
    inverse = np.float32(most) / (high - low)
    scale = np.float32(1) / inverse
    codes = _codes(x_SP, inverse, low, most)
    best = _squared(x_SP, weight_SP, codes, scale, low)
    for step in range(steps + 1):
        tried = (first + np.float32(0.1) * np.float32(step) + np.float32(most)) / (high - low)
        codes = _codes(x_SP, tried, low, most)
        found, least = _line(x_SP, weight_SP, codes, sum_w, sum_x)
        error = _squared(x_SP, weight_SP, codes, found, least)
        better = error < best
        for old, new in ((inverse, tried), (base, low), (best, error), (scale, found), (low, least)):
            np.copyto(old, new, where=better)
    return scale, -low, inverse, base


def _codes(x_SP: Floats, inverse: Floats, low: Floats, most: int) -> Floats:
    """Codes from 0 to `most`, as floats."""
    return np.clip(_nearest(inverse * (x_SP - low)), 0, most).astype(np.float32)


def _line(x_SP: Floats, weight_SP: Floats, codes: Floats, sum_w: Floats, sum_x: Floats) -> tuple[Floats, Floats]:
    """Scale and least value, at most 0, of least squared error for given codes; NaN where there are none."""
    weighted = weight_SP * codes
    sum_l, sum_l2, sum_xl = _sum(weighted), _sum(weighted * codes), _sum(weighted * x_SP)
    width = sum_w * sum_l2 - sum_l * sum_l
    scale: Floats = np.divide(sum_w * sum_xl - sum_x * sum_l, width)
    least: Floats = np.divide(sum_l2 * sum_x - sum_l * sum_xl, width)
    above = least > 0
    np.copyto(scale, sum_xl / sum_l2, where=above)
    least[above] = 0
    scale[~(width > 0)] = np.nan
    return scale, least


def _squared(x_SP: Floats, weight_SP: Floats, codes: Floats, scale: Floats, least: Floats) -> Floats:
    error = scale * codes + least - x_SP
    return _sum(weight_SP * (error * error))


def _sum(terms_SP: Floats) -> Floats:
    """Sum of rows from the first to the last, in float32: np.sum would choose an order of its own."""
    total = np.zeros(terms_SP.shape[1], np.float32)
    for terms in terms_SP:
        total += terms
    return total


def _to_q6_k(values_NS: Floats) -> Bytes:
    x_SP = np.ascontiguousarray(values_NS.reshape(-1, 16).T)
    scale_P, inverse_P = _symmetric_scales(x_SP)
    found = scale_P.reshape(-1, 16)
    most = _extreme(found)
    inverse = np.float32(-128) / most
    scales = np.minimum(_nearest(inverse[:, None] * found), 127).astype(np.int8)
    d = _half(np.float32(1) / inverse)
    step_P = (_number(d) * scales).reshape(-1)
    codes = np.where(step_P == 0, _nearest(inverse_P * x_SP), _nearest(x_SP / step_P))
    codes = (np.clip(codes, -32, 31) + 32).astype(np.uint8)
    codes[:, (inverse_P == 0) & (step_P == 0)] = 0  # of zeros
    out = np.concatenate((_six_bit_codes(codes.T.reshape(-1, 256)), scales.view(np.uint8), d), axis=1)
    out[np.abs(most) < EPSILON] = 0
    return out


def _six_bit_codes(codes: Bytes) -> Bytes:
    """[N, 256] -> [N, 192]: lower bits, four columns 32 apart in two bytes, then the upper two of the same in one."""
    quarters = codes.reshape(-1, 2, 4, 32)
    low, high = quarters & np.uint8(15), quarters >> np.uint8(4)
    nibbles = low[:, :, :2] | (low[:, :, 2:] << np.uint8(4))
    pairs = (
        high[:, :, 0] | (high[:, :, 1] << np.uint8(2)) | (high[:, :, 2] << np.uint8(4)) | (high[:, :, 3] << np.uint8(6))
    )
    return np.concatenate((nibbles.reshape(-1, 128), pairs.reshape(-1, 64)), axis=1)


def _symmetric_scales(x_SP: Floats) -> tuple[Floats, Floats]:
    """Scales of least squared error, weighted by the squares, as make_qx_quants finds them for codes from -32 to 31.

    Returns:
        scale [P], and the inverse scale that the codes were found with; 0 for both where all is zero.

    """
    extreme = _extreme(np.ascontiguousarray(x_SP.T))
    inverse = np.float32(-32) / extreme
    along, square = _moments(x_SP, inverse)
    scale = np.where(square != 0, along / square, np.float32(0))
    best = scale * along
    for step in (*range(-9, 0), *range(1, 10)):
        tried = -(np.float32(32) + np.float32(0.1) * np.float32(step)) / extreme
        along, square = _moments(x_SP, tried)
        better = (square > 0) & (along * along > best * square)
        found = along / square
        for old, new in ((inverse, tried), (scale, found), (best, found * along)):
            np.copyto(old, new, where=better)
    zero = np.abs(extreme) < EPSILON
    return np.where(zero, np.float32(0), scale), np.where(zero, np.float32(0), inverse)


def _moments(x_SP: Floats, inverse: Floats) -> tuple[Floats, Floats]:
    """Weighted sums of values times codes and of squares of codes, weights being squares of values."""
    codes = np.clip(_nearest(inverse * x_SP), -32, 31).astype(np.float32)
    weight = x_SP * x_SP
    return _sum(weight * x_SP * codes), _sum(weight * codes * codes)


def _of_q4_k(blocks_NB: Bytes) -> Floats:
    return _affine_values(blocks_NB, _halved(blocks_NB[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _of_q5_k(blocks_NB: Bytes) -> Floats:
    fifths = (blocks_NB[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    codes = _halved(blocks_NB[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _affine_values(blocks_NB, codes | (fifths << np.uint8(4)))


def _affine_values(blocks_NB: Bytes, codes: Bytes) -> Floats:
    """Values of codes [N, 8, 32]."""
    first, second, third = blocks_NB[:, 4:8], blocks_NB[:, 8:12], blocks_NB[:, 12:16]
    high = np.uint8(6), np.uint8(4)
    scales = np.concatenate((first & 63, (third & 15) | (first >> high[0] << high[1])), axis=1)
    mins = np.concatenate((second & 63, (third >> high[1]) | (second >> high[0] << high[1])), axis=1)
    step, shift = _number(blocks_NB) * scales, _number(blocks_NB, 2) * mins
    values: Floats = step[:, :, None] * codes - shift[:, :, None]
    return values.reshape(-1, 256)


def _of_q6_k(blocks_NB: Bytes) -> Floats:
    nibbles = blocks_NB[:, :128].reshape(-1, 2, 2, 32)
    low = np.concatenate((nibbles & np.uint8(15), nibbles >> np.uint8(4)), axis=2)
    pairs = blocks_NB[:, 128:192].reshape(-1, 2, 1, 32)
    high = (pairs >> np.array((0, 2, 4, 6), np.uint8)[:, None]) & np.uint8(3)
    codes = (low | (high << np.uint8(4))).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    scales = blocks_NB[:, 192:208].view(np.int8).astype(np.float32)
    values: Floats = (_number(blocks_NB, 208) * scales)[:, :, None] * codes
    return values.reshape(-1, 256)


_RULES: Final[dict[str, Callable[[Floats], Bytes]]] = {
    "Q4_0": _to_q4_0,
    "Q4_1": _to_q4_1,
    "Q5_0": _to_q5_0,
    "Q5_1": _to_q5_1,
    "Q8_0": _to_q8_0,
    "MXFP4": _to_mxfp4,
    "IQ4_NL": _to_iq4_nl,
    "Q4_K": _to_q4_k,
    "Q5_K": _to_q5_k,
    "Q6_K": _to_q6_k,
}
_DECODED: Final[dict[str, Callable[[Bytes], Floats]]] = {
    "Q4_0": _of_q4_0,
    "Q4_1": _of_q4_1,
    "Q5_0": _of_q5_0,
    "Q5_1": _of_q5_1,
    "Q8_0": _of_q8_0,
    "MXFP4": _of_mxfp4,
    "IQ4_NL": _of_iq4_nl,
    "Q4_K": _of_q4_k,
    "Q5_K": _of_q5_k,
    "Q6_K": _of_q6_k,
}
_SCALES: Final[dict[str, tuple[int, ...]]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "Q1_0", "Q2_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    **dict.fromkeys(("MXFP4", "NVFP4", "IQ1_M"), ()),
}
"""Where in a block its float16 scales are; none where they are powers of two or other small floats, or in pieces."""
