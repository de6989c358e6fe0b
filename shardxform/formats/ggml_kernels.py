"""Compiled rounding to ggml's blocks, bit-equal to the numpy rules in ``ggml_blocks``: one pass, on the calling thread.

The searches of blocks of 256 columns run over many parts of blocks at a time, one in each lane, so that each part's
sums are still taken in the order of its columns. What lanes need beside their values is in one array, at places that
are known when it is compiled: the compiler then sees that they do not overlap.
"""

# N: blocks, S: columns of a block, B: bytes of a block, K: columns of a part, L: lanes; R: rows, W: words of a row,
# G: groups of a row, H: halves of a row, which are two bytes.

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
from numba import types

from shardxform.base.tensors import BLOCKS
from shardxform.formats.ggml_blocks import E2M1, EPSILON, STEPS, UNEVEN
from shardxform.formats.kernels import _bits, _float, _round_to_half, jit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]

__all__ = ["of_words", "rounded_numba"]

U8: Final = np.uint8
U32: Final = np.uint32
I32: Final = np.int32
U64: Final = np.uint64
F32: Final = np.float32

LANES: Final = 32
MAGNITUDE: Final = np.uint32(0x7FFFFFFF)


@jit
def _put_half(x: np.float32, block: Bytes, at: int) -> np.float32:
    """Write the float16 nearest to x, and give it back as float32."""
    bits = _bits(x)
    sign = (bits >> U32(16)) & U32(0x8000)
    magnitude = bits & MAGNITUDE
    if magnitude >= U32(0x477FF000):  # from 65520 on
        half, value = U32(0x7E00) if magnitude > U32(0x7F800000) else U32(0x7C00), _float(U32(0x7F800000))
    else:
        value = _round_to_half(_float(magnitude))
        rounded_numba = _bits(value)
        normal, small = (rounded_numba - U32(112 << 23)) >> U32(13), U32(I32(value * F32(2.0**24)))
        half = small if rounded_numba < U32(0x38800000) else normal
    half |= sign
    block[at], block[at + 1] = U8(half & U32(255)), U8(half >> U32(8))
    return -value if sign else value


@jit
def _nearest(x: np.float32) -> np.int32:
    """As `ggml_blocks._nearest`."""
    return I32(_bits(F32(x + F32(12582912))) & U32(0x007FFFFF)) - I32(0x00400000)


@jit
def _extreme(x: Floats) -> np.float32:
    """Value of the largest magnitude, the first of equals; 0 of zeros."""
    largest = U32(0)
    for k in range(x.size):
        largest = max(largest, _bits(x[k]) & MAGNITUDE)
    for k in range(x.size):
        if _bits(x[k]) & MAGNITUDE == largest:
            return F32(x[k] + F32(0))
    return F32(0)


@jit
def _inverse(d: np.float32) -> np.float32:
    """1 / d, and 0 of 0."""
    return F32(0) if d == F32(0) else F32(F32(1) / d)


# -- blocks of 32 columns ----------------------------------------------------------------------------------------------


@jit
def _cut(x: Floats, base: np.float32, d: np.float32, half: np.float32, codes: Bytes) -> None:
    """Codes (x - base) / d, as ggml cuts them off; zeros where 1 / d is infinite, from which x86 makes no integers."""
    inverse = _inverse(d)
    if _bits(inverse) & MAGNITUDE == U32(0x7F800000):
        codes[:] = U8(0)
        return
    for k in range(codes.size):
        codes[k] = U8(I32(F32(F32(F32(x[k] - base) * inverse) + half)))


@jit
def _at_most(codes: Bytes, most: int) -> None:
    """Codes are signed bytes."""
    for k in range(codes.size):
        codes[k] = min(np.int8(codes[k]), np.int8(most))


@jit
def _put_nibbles(codes: Bytes, block: Bytes, at: int) -> None:
    for k in range(16):
        block[U64(at) + U64(k)] = (codes[k] & U8(15)) | (codes[U64(k) + U64(16)] << U8(4))


@jit
def _put_fifths(codes: Bytes, block: Bytes, at: int) -> None:
    bits = U32(0)
    for k in range(32):
        bits |= U32((codes[k] >> U8(4)) & U8(1)) << U32(k)
    for k in range(4):
        block[at + k] = U8((bits >> U32(8 * k)) & U32(255))


def _to_symmetric(values_NS: Floats, out_NB: Bytes, zero: int, _: int) -> None:
    """Q4_0 and Q5_0: `zero` is 8 or 16."""
    codes = np.empty(32, U8)
    for n in range(values_NS.shape[0]):
        x, block = values_NS[n], out_NB[n]
        d = F32(_extreme(x) / F32(-zero))
        _put_half(d, block, 0)
        _cut(x, F32(0), d, F32(F32(zero) + F32(0.5)), codes)
        _at_most(codes, 2 * zero - 1)
        if zero == 16:
            _put_fifths(codes, block, 2)
        _put_nibbles(codes, block, 6 if zero == 16 else 2)


def _to_affine(values_NS: Floats, out_NB: Bytes, most: int, _: int) -> None:
    """Q4_1 and Q5_1: `most` is 15 or 31."""
    codes = np.empty(32, U8)
    for n in range(values_NS.shape[0]):
        x, block = values_NS[n], out_NB[n]
        low, high = x[0], x[0]
        for k in range(32):
            low, high = x[k] if x[k] < low else low, x[k] if x[k] > high else high
        d = F32(F32(high - low) / F32(most))
        _put_half(d, block, 0)
        _put_half(low, block, 2)
        _cut(x, low, d, F32(0.5), codes)
        if most == 31:
            _put_fifths(codes, block, 4)
        else:
            _at_most(codes, 15)
        _put_nibbles(codes, block, 8 if most == 31 else 4)


def _to_bytes(values_NS: Floats, out_NB: Bytes, _: int, __: int) -> None:
    """Q8_0."""
    for n in range(values_NS.shape[0]):
        x, block = values_NS[n], out_NB[n]
        d = F32(abs(_extreme(x)) / F32(127))
        _put_half(d, block, 0)
        inverse = _inverse(d)
        if _bits(inverse) & MAGNITUDE == U32(0x7F800000):
            inverse = F32(0)
        for k in range(32):
            scaled = F32(x[k] * inverse)
            whole = np.trunc(scaled)
            away = np.copysign(F32(1), scaled) if abs(F32(scaled - whole)) >= F32(0.5) else F32(0)
            block[U64(k) + U64(2)] = U8(I32(F32(whole + away)))


def _to_mxfp4(values_NS: Floats, out_NB: Bytes, _: int, __: int) -> None:
    codes, best, found = np.empty(32, U8), np.empty(32, F32), np.empty(32, F32)
    for n in range(values_NS.shape[0]):
        x, block = values_NS[n], out_NB[n]
        largest, power = abs(_extreme(x)), U32(0)
        if largest > F32(0):
            power = U32(I32(F32(F32(np.floor(F32(np.log2(np.float64(largest))))) - F32(2)) + F32(127))) & U32(255)
        block[0] = U8(power)
        step = _float(U32(0x00200000) << power if power < U32(2) else (power - U32(1)) << U32(23))
        for k in range(32):
            best[k], found[k] = abs(x[k]), F32(0)
        for code in range(1, 16):
            value = F32(E2M1[code] * step)
            for k in range(32):
                error = abs(F32(value - x[k]))
                found[k] = F32(code) if error < best[k] else found[k]
                best[k] = min(error, best[k])
        for k in range(32):
            codes[k] = U8(found[k])
        _put_nibbles(codes, block, 1)


# -- searches ----------------------------------------------------------------------------------------------------------
# Places in the array of what lanes need, in lanes.

# The range of the values; what the best codes so far were found with; their scale and error; sums; what is tried.

LOW: Final = 0
HIGH: Final = LANES
INVERSE: Final = 2 * LANES
BASE: Final = 3 * LANES
SCALE: Final = 4 * LANES
BEST: Final = 5 * LANES
SUM_W: Final = 6 * LANES
SUM_X: Final = 7 * LANES
TRIED: Final = 8 * LANES
FOUND: Final = 9 * LANES
LEAST: Final = 10 * LANES
SUM_L: Final = 11 * LANES
SUM_L2: Final = 12 * LANES
SUM_XL: Final = 13 * LANES
ERROR: Final = 14 * LANES
PLACES: Final = 15 * LANES


@jit
def _spread(values_NS: Floats, first: int, lanes: int, x_KL: Floats) -> None:
    """Parts `first`.. of all blocks, one below the other, to lanes; those beyond the last are zeros."""
    columns = x_KL.size // LANES
    flat = values_NS.reshape(-1)
    for r in range(LANES):
        for k in range(columns):
            x_KL[k * LANES + r] = flat[(first + r) * columns + k] if r < lanes else F32(0)


@jit
def _weigh(x_KL: Floats, weight_KL: Floats, p: Floats) -> None:
    """Weights of values, their sums, and the range of values."""
    for r in range(LANES):
        p[ERROR + r], p[LOW + r], p[HIGH + r] = F32(0), F32(0), x_KL[r]
    for k in range(32):
        for r in range(LANES):
            x = x_KL[k * LANES + r]
            p[ERROR + r] += F32(x * x)
            p[LOW + r] = x if x < p[LOW + r] else p[LOW + r]
            p[HIGH + r] = x if x > p[HIGH + r] else p[HIGH + r]
    for r in range(LANES):
        p[ERROR + r] = np.sqrt(F32(p[ERROR + r] / F32(32)))
        p[SUM_W + r], p[SUM_X + r] = F32(0), F32(0)
    for k in range(32):
        for r in range(LANES):
            x = x_KL[k * LANES + r]
            weight = F32(p[ERROR + r] + abs(x))
            weight_KL[k * LANES + r] = weight
            p[SUM_W + r] += weight
            p[SUM_X + r] += F32(weight * x)


@jit
def _code(x_KL: Floats, weight_KL: Floats, code_KL: Floats, p: Floats, most: int) -> None:
    """Codes under the inverse scales that are tried, and weighted sums of them."""
    highest = I32(most)
    for r in range(LANES):
        p[SUM_L + r], p[SUM_L2 + r], p[SUM_XL + r] = F32(0), F32(0), F32(0)
    for k in range(32):
        for r in range(LANES):
            x = x_KL[k * LANES + r]
            code = F32(max(I32(0), min(highest, _nearest(F32(p[TRIED + r] * F32(x - p[LOW + r]))))))
            code_KL[k * LANES + r] = code
            weighted = F32(weight_KL[k * LANES + r] * code)
            p[SUM_L + r] += weighted
            p[SUM_L2 + r] += F32(weighted * code)
            p[SUM_XL + r] += F32(weighted * x)


@jit
def _draw(p: Floats) -> None:
    """Scale and least value, at most 0, of least squared error for the codes; NaN where there are none."""
    for r in range(LANES):
        sum_w, sum_x = p[SUM_W + r], p[SUM_X + r]
        sum_l, sum_l2, sum_xl = p[SUM_L + r], p[SUM_L2 + r], p[SUM_XL + r]
        width = F32(F32(sum_w * sum_l2) - F32(sum_l * sum_l))
        scale = F32(F32(F32(sum_w * sum_xl) - F32(sum_x * sum_l)) / width)
        least = F32(F32(F32(sum_l2 * sum_x) - F32(sum_l * sum_xl)) / width)
        if least > F32(0):
            scale, least = F32(sum_xl / sum_l2), F32(0)
        p[FOUND + r] = scale if width > F32(0) else F32(np.nan)
        p[LEAST + r] = least


@jit
def _err(x_KL: Floats, weight_KL: Floats, code_KL: Floats, p: Floats) -> None:
    """Weighted squared error of the codes under the scale and least value found."""
    for r in range(LANES):
        p[ERROR + r] = F32(0)
    for k in range(32):
        for r in range(LANES):
            at = k * LANES + r
            error = F32(F32(F32(p[FOUND + r] * code_KL[at]) + p[LEAST + r]) - x_KL[at])
            p[ERROR + r] += F32(weight_KL[at] * F32(error * error))


@jit
def _take(p: Floats) -> None:
    """Keep what is better than the best so far."""
    for r in range(LANES):
        better = p[ERROR + r] < p[BEST + r]
        p[INVERSE + r] = p[TRIED + r] if better else p[INVERSE + r]
        p[BASE + r] = p[LOW + r] if better else p[BASE + r]
        p[SCALE + r] = p[FOUND + r] if better else p[SCALE + r]
        p[LOW + r] = p[LEAST + r] if better else p[LOW + r]
        p[BEST + r] = p[ERROR + r] if better else p[BEST + r]


@jit
def _search_affine(x_KL: Floats, weight_KL: Floats, code_KL: Floats, p: Floats, at: tuple[int, int]) -> None:
    """Scales and least values of parts, as `ggml_blocks._affine_scales` finds them."""
    most, steps = at
    first = F32(-1) if most == 15 else F32(-0.5)
    _weigh(x_KL, weight_KL, p)
    for r in range(LANES):
        p[TRIED + r] = F32(F32(most) / F32(p[HIGH + r] - p[LOW + r]))
    _code(x_KL, weight_KL, code_KL, p, most)
    for r in range(LANES):
        p[FOUND + r], p[LEAST + r] = F32(F32(1) / p[TRIED + r]), p[LOW + r]
    _err(x_KL, weight_KL, code_KL, p)
    for r in range(LANES):
        p[INVERSE + r], p[BASE + r], p[SCALE + r], p[BEST + r] = p[TRIED + r], p[LOW + r], p[FOUND + r], p[ERROR + r]
    for step in range(steps + 1):
        factor = F32(F32(first + F32(F32(0.1) * F32(step))) + F32(most))
        for r in range(LANES):
            p[TRIED + r] = F32(factor / F32(p[HIGH + r] - p[LOW + r]))
        _code(x_KL, weight_KL, code_KL, p, most)
        _draw(p)
        _err(x_KL, weight_KL, code_KL, p)
        _take(p)


@jit
def _six_bits(found: Floats, block: Bytes, at: int, codes: Bytes) -> np.float32:
    """Write the float16 that multiplies the scales of a block, and give it; and the scales as integers of six bits."""
    most = F32(0)
    for j in range(8):
        most = found[j] if found[j] > most else most
    inverse = F32(F32(63) / most) if most > F32(0) else F32(0)
    for j in range(8):
        codes[j] = min(U8(63), U8(_nearest(F32(inverse * found[j])) & I32(255)))
    return _put_half(F32(most / F32(63)), block, at)


@jit
def _put_scales(scales: Bytes, mins: Bytes, block: Bytes) -> None:
    for j in range(4):
        block[4 + j] = scales[j] | ((scales[j + 4] >> U8(4)) << U8(6))
        block[8 + j] = mins[j] | ((mins[j + 4] >> U8(4)) << U8(6))
        block[12 + j] = (scales[j + 4] & U8(15)) | (mins[j + 4] << U8(4))


@jit
def _affine_block(x: Floats, r: int, p: Floats, block: Bytes, most: int, codes: Bytes) -> None:
    """Write the scales of a block whose parts are in lanes from `r` on, and find its codes."""
    scales, mins, least = np.empty(8, U8), np.empty(8, U8), np.empty(8, F32)
    for j in range(8):
        least[j] = -p[LOW + r + j]
    d = _six_bits(p[SCALE + r : SCALE + r + 8], block, 0, scales)
    dmin = _six_bits(least, block, 2, mins)
    _put_scales(scales, mins, block)
    highest = I32(most)
    for j in range(8):
        step, shift = F32(d * F32(scales[j])), F32(dmin * F32(mins[j]))
        inverse, base, start = p[INVERSE + r + j], p[BASE + r + j], U64(32 * j)
        if step == F32(0):
            for k in range(32):
                code = _nearest(F32(inverse * F32(x[start + U64(k)] - base)))
                codes[start + U64(k)] = U8(max(I32(0), min(highest, code)))
        else:
            for k in range(32):
                code = _nearest(F32(F32(x[start + U64(k)] + shift) / step))
                codes[start + U64(k)] = U8(max(I32(0), min(highest, code)))


@jit
def _put_affine(codes: Bytes, block: Bytes, most: int) -> None:
    """Lower bits of two parts in 32 bytes; before them of Q5_K the fifth bits, of a column of all parts a byte."""
    start = 16
    if most == 31:
        start = 48
        for k in range(32):
            bits = U8(0)
            for j in range(8):
                bits |= ((codes[32 * j + k] >> U8(4)) & U8(1)) << U8(j)
            block[16 + k] = bits
    for j in range(4):
        low, base = U64(64 * j), U64(start + 32 * j)
        for k in range(32):
            block[base + U64(k)] = (codes[low + U64(k)] & U8(15)) | (codes[low + U64(k) + U64(32)] << U8(4))


def _to_affine_k(values_NS: Floats, out_NB: Bytes, most: int, steps: int) -> None:
    """Q4_K and Q5_K: `most` is 15 or 31."""
    x_KL, weight_KL, code_KL = np.empty(32 * LANES, F32), np.empty(32 * LANES, F32), np.empty(32 * LANES, F32)
    p, codes = np.zeros(PLACES, F32), np.empty(256, U8)
    for first in range(0, values_NS.shape[0], LANES // 8):
        blocks = min(LANES // 8, values_NS.shape[0] - first)
        _spread(values_NS, 8 * first, 8 * blocks, x_KL)
        _search_affine(x_KL, weight_KL, code_KL, p, (most, steps))
        for n in range(blocks):
            _affine_block(values_NS[first + n], 8 * n, p, out_NB[first + n], most, codes)
            _put_affine(codes, out_NB[first + n], most)


@jit
def _extremes(x_KL: Floats, p: Floats) -> None:
    """Value of the largest magnitude in each lane, the first of equals."""
    for r in range(LANES):
        p[BASE + r], p[BEST + r] = F32(0), F32(0)
    for k in range(x_KL.size // LANES):
        for r in range(LANES):
            x = x_KL[k * LANES + r]
            p[BASE + r] = x if abs(x) > p[BEST + r] else p[BASE + r]
            p[BEST + r] = max(abs(x), p[BEST + r])


@jit
def _moments(x_KL: Floats, p: Floats) -> None:
    """As `ggml_blocks._moments`."""
    for r in range(LANES):
        p[SUM_XL + r], p[SUM_L2 + r] = F32(0), F32(0)
    for k in range(16):
        for r in range(LANES):
            x = x_KL[k * LANES + r]
            code = F32(max(I32(-32), min(I32(31), _nearest(F32(p[TRIED + r] * x)))))
            weight = F32(x * x)
            p[SUM_XL + r] += F32(F32(weight * x) * code)
            p[SUM_L2 + r] += F32(F32(weight * code) * code)


@jit
def _uneven_moments(x_KL: Floats, p: Floats) -> None:
    """The same for the numbers that codes of IQ4_NL stand for."""
    for r in range(LANES):
        p[SUM_XL + r], p[SUM_L2 + r] = F32(0), F32(0)
    for k in range(32):
        for r in range(LANES):
            x = x_KL[k * LANES + r]
            scaled, q = F32(p[TRIED + r] * x), UNEVEN[0]
            for step in range(15):
                q = UNEVEN[step + 1] if scaled >= STEPS[step] else q
            weighted = F32(F32(x * x) * q)
            p[SUM_XL + r] += F32(weighted * x)
            p[SUM_L2 + r] += F32(weighted * q)


@jit
def _begin(p: Floats) -> None:
    """Take the scale of the first codes."""
    for r in range(LANES):
        square = p[SUM_L2 + r]
        scale = F32(p[SUM_XL + r] / square) if square > F32(0) else F32(0)
        p[INVERSE + r], p[SCALE + r], p[BEST + r] = p[TRIED + r], scale, F32(scale * p[SUM_XL + r])


@jit
def _take_scale(p: Floats) -> None:
    """Keep the scale of codes that are better than the best so far."""
    for r in range(LANES):
        along, square = p[SUM_XL + r], p[SUM_L2 + r]
        better = square > F32(0) and F32(along * along) > F32(p[BEST + r] * square)
        scale = F32(along / square)
        p[INVERSE + r] = p[TRIED + r] if better else p[INVERSE + r]
        p[SCALE + r] = scale if better else p[SCALE + r]
        p[BEST + r] = F32(scale * along) if better else p[BEST + r]


@jit
def _search_symmetric(x_KL: Floats, p: Floats) -> None:
    """Scales of parts, as `ggml_blocks._symmetric_scales` finds them."""
    _extremes(x_KL, p)
    for r in range(LANES):
        p[TRIED + r] = F32(F32(-32) / p[BASE + r])
    _moments(x_KL, p)
    _begin(p)
    for step in range(-9, 10):
        factor = -F32(F32(32) + F32(F32(0.1) * F32(step)))
        if step == 0:
            continue
        for r in range(LANES):
            p[TRIED + r] = F32(factor / p[BASE + r])
        _moments(x_KL, p)
        _take_scale(p)
    for r in range(LANES):
        if abs(p[BASE + r]) < EPSILON:
            p[SCALE + r], p[INVERSE + r] = F32(0), F32(0)


@jit
def _symmetric_block(x: Floats, r: int, p: Floats, block: Bytes, codes: Bytes) -> None:
    """Write the scales of a block whose parts are in lanes from `r` on, and find its codes."""
    most = _extreme(p[SCALE + r : SCALE + r + 16])
    if abs(most) < EPSILON:
        block[:] = U8(0)
        codes[:] = U8(0)
        return
    inverse = F32(F32(-128) / most)
    d = _put_half(F32(F32(1) / inverse), block, 208)
    for j in range(16):
        scale = min(I32(127), _nearest(F32(inverse * p[SCALE + r + j])))
        block[192 + j] = U8(scale & I32(255))
        step, start = F32(d * F32(np.int8(scale))), U64(16 * j)
        tried = p[INVERSE + r + j]
        for k in range(16):
            value = x[start + U64(k)]
            code = _nearest(F32(tried * value) if step == F32(0) else F32(value / step))
            codes[start + U64(k)] = U8(max(I32(-32), min(I32(31), code)) + I32(32))
        if step == F32(0) and tried == F32(0):
            codes[16 * j : 16 * j + 16] = U8(0)


@jit
def _put_six_bit_codes(codes: Bytes, block: Bytes) -> None:
    for half in range(2):
        start, low, high = U64(128 * half), U64(64 * half), U64(128 + 32 * half)
        for k in range(64):
            at = start + U64(k)
            block[low + U64(k)] = (codes[at] & U8(15)) | (codes[at + U64(64)] << U8(4))
        for k in range(32):
            at = start + U64(k)
            pairs = (codes[at] >> U8(4)) | ((codes[at + U64(32)] >> U8(4)) << U8(2))
            pairs |= ((codes[at + U64(64)] >> U8(4)) << U8(4)) | ((codes[at + U64(96)] >> U8(4)) << U8(6))
            block[high + U64(k)] = pairs


def _to_q6_k(values_NS: Floats, out_NB: Bytes, _: int, __: int) -> None:
    x_KL, p, codes = np.empty(16 * LANES, F32), np.zeros(PLACES, F32), np.empty(256, U8)
    for first in range(0, values_NS.shape[0], LANES // 16):
        blocks = min(LANES // 16, values_NS.shape[0] - first)
        _spread(values_NS, 16 * first, 16 * blocks, x_KL)
        _search_symmetric(x_KL, p)
        for n in range(blocks):
            _symmetric_block(values_NS[first + n], 16 * n, p, out_NB[first + n], codes)
            _put_six_bit_codes(codes, out_NB[first + n])


@jit
def _search_uneven(x_KL: Floats, p: Floats) -> None:
    """Scales of blocks, as `ggml_blocks._to_iq4_nl` finds them."""
    _extremes(x_KL, p)
    for r in range(LANES):
        p[TRIED + r] = F32(F32(1) / F32(-p[BASE + r] / UNEVEN[0]))
    _uneven_moments(x_KL, p)
    _begin(p)
    for step in range(-7, 8):
        factor = F32(F32(step) + UNEVEN[0])
        for r in range(LANES):
            p[TRIED + r] = F32(factor / p[BASE + r])
        _uneven_moments(x_KL, p)
        _take_scale(p)
    for r in range(LANES):
        if abs(p[BASE + r]) < EPSILON:
            p[SCALE + r] = F32(0)


def _to_iq4_nl(values_NS: Floats, out_NB: Bytes, _: int, __: int) -> None:
    x_KL, p, codes = np.empty(32 * LANES, F32), np.zeros(PLACES, F32), np.empty(32, U8)
    for first in range(0, values_NS.shape[0], LANES):
        blocks = min(LANES, values_NS.shape[0] - first)
        _spread(values_NS, first, blocks, x_KL)
        _search_uneven(x_KL, p)
        for n in range(blocks):
            x, block = values_NS[first + n], out_NB[first + n]
            _put_half(p[SCALE + n], block, 0)
            inverse = _inverse(p[SCALE + n])
            for k in range(32):
                scaled, code = F32(x[k] * inverse), I32(0)
                for step in range(15):
                    code += I32(scaled >= STEPS[step])
                codes[k] = U8(code)
            _put_nibbles(codes, block, 2)


_KERNELS: Final[dict[str, tuple[Callable[..., None], int, int]]] = {
    "Q4_0": (_to_symmetric, 8, 0),
    "Q4_1": (_to_affine, 15, 0),
    "Q5_0": (_to_symmetric, 16, 0),
    "Q5_1": (_to_affine, 31, 0),
    "Q8_0": (_to_bytes, 0, 0),
    "MXFP4": (_to_mxfp4, 0, 0),
    "IQ4_NL": (_to_iq4_nl, 0, 0),
    "Q4_K": (_to_affine_k, 15, 20),
    "Q5_K": (_to_affine_k, 31, 15),
    "Q6_K": (_to_q6_k, 0, 0),
}
"""Kernels, and what they are told besides arrays."""


@cache
def _compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    values = types.Array(types.float32, 2, "C", readonly=True)
    return jit(kernel, (values, types.Array(types.uint8, 2, "C"), types.int64, types.int64))


def rounded_numba(values_NS: Floats, type_name: str) -> Bytes:
    """Blocks uint8 [N, B] of finite values float32 [N, S], C-contiguous; compiles, or loads from disk, on first use."""
    kernel, first, second = _KERNELS[type_name]
    blocks_NB = np.empty((len(values_NS), BLOCKS[type_name][1]), np.uint8)
    _compiled(kernel)(values_NS, blocks_NB, first, second)
    return blocks_NB


# -- integers ----------------------------------------------------------------------------------------------------------

NIBBLES: Final = np.uint32(0x0F0F0F0F)
BYTE: Final = np.uint32(0xFF)


def _regrouped(words_RW: NDArray[np.int32], half_RG: NDArray[np.uint16], span: int, out_RH: NDArray[np.uint16]) -> None:
    for r in range(words_RW.shape[0]):
        words_W, half_G, out_H = words_RW[r], half_RG[r], out_RH[r]
        for n in range(words_W.size // 4):
            at = 9 * n
            out_H[at] = half_G[n // span]
            for pair in range(2):  # eight codes of either half of a block: 0, 2.. and 1, 3.. of them
                first, second = U32(words_W[4 * n + pair]), U32(words_W[4 * n + pair + 2])
                even = (first & NIBBLES) | ((second & NIBBLES) << U32(4))
                odd = ((first >> U32(4)) & NIBBLES) | (second & ~NIBBLES)
                for k in range(4):
                    shift = U32(8 * k)
                    low, high = (even >> shift) & BYTE, (odd >> shift) & BYTE
                    out_H[at + 1 + 4 * pair + k] = np.uint16(low | (high << U32(8)))


@cache
def _regrouping() -> Callable[..., None]:
    words, halves = (types.Array(of, 2, "C", readonly=True) for of in (types.int32, types.uint16))
    return jit(_regrouped, (words, halves, types.int64, types.Array(types.uint16, 2, "C")))


def of_words(words_RW: NDArray[np.int32], half_RG: NDArray[np.uint16], span: int) -> Bytes:
    """Blocks of Q4_0 that hold codes of 4 bits, what ``ggml_blocks.of_codes`` makes of them unpacked.

    Args:
        words_RW: int32 [R, I / 8], codes of a row in order, lowest bits first.
        half_RG: float16 bits [R, G].
        span: columns of a group.

    """
    out_RH = np.empty((len(words_RW), words_RW.shape[1] // 4 * 9), np.uint16)
    _regrouping()(np.ascontiguousarray(words_RW), np.ascontiguousarray(half_RG), span // 32, out_RH)
    return out_RH.view(np.uint8)
