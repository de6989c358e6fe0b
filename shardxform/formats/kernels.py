"""Compiled round-to-nearest: one pass per tile of rows from raw bits to packed words, on the calling thread.

Bit-equal to the numpy backend in ``rtn``. The global interpreter lock is released while a kernel runs, so callers
may quantize different rows from different threads. Importing this module needs numba; compiled code is cached on disk
where there is a writable place, and recompiled per process otherwise.

What keeps the inner loops vectorised: they run over a row, a group, or the 32 rows of a tile, and reduce integers only
(the order of float additions is part of the result); offsets are unsigned, because a signed index may wrap around;
division follows numpy, because Python's would branch on zero. Slices are per row, never per group: each costs a
reference count.
"""

# O: output rows, I: input columns, R: rows of a tile (32), G: groups of a row, C: scale candidates, K: columns of a
# chunk (128), W: words of a row.

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, cast

import numpy as np
from numba import config, njit, types
from numpy.typing import NDArray

__all__ = ["RoundSettings", "quantizer"]

F = TypeVar("F", bound=Callable[..., Any])

U8: Final = np.uint8
U32: Final = np.uint32
I32: Final = np.int32
U64: Final = np.uint64
F32: Final = np.float32
F64: Final = np.float64

Bits = NDArray[np.uint32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Codes = NDArray[np.uint8]
Words = NDArray[np.int32]
Scales = tuple[Floats, Floats]
"""Signed scales and the magnitudes or reciprocals beside them."""
At = tuple[int, int]
"""Where a row, a group or a tile stands, and how many there are."""

LANES: Final = 32
CHUNK: Final = 128
SIGN: Final = np.uint32(0x80000000)
MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
SMALLEST_SCALE: Final = np.float32(168 * 2.0**-24)  # float16(1e-5); exact in bf16 too
HALF_OVERFLOW: Final = np.float32(65536.0)
BYTES_OF_16: Final = np.uint64(0x00FF00FF00FF00FF)
HALVES_OF_32: Final = np.uint64(0x0000FFFF0000FFFF)


SOURCES: Final = (
    "base/constants.py",
    "base/tensors.py",
    "formats/decoding_kernels.py",
    "formats/ggml_blocks.py",
    "formats/ggml_kernels.py",
    "formats/kernels.py",
    "formats/rounding.py",
    "tuning/elementwise.py",
    "tuning/kernels.py",
    "verification/kernels.py",
)
"""All that compiled code is made of: it holds what a kernel calls and reads elsewhere, which numba does not look at."""


def cache_folder(package: Path) -> Path:
    """Where code compiled from these very sources is kept: where numba is told to, in the package, or in the home.

    Code of other sources lies elsewhere, so that none of it runs after an update, nor is unpickled.
    """
    sources = hashlib.sha256(b"".join((package / name).read_bytes() for name in SOURCES)).hexdigest()
    folder = package / "__pycache__"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.access(package, os.W_OK) and os.path.isabs(home):
        folder = Path(home, "shardxform")
    return Path(os.environ.get("NUMBA_CACHE_DIR") or folder, f"kernels-{sources[:16]}")


_CACHE: Final = str(cache_folder(Path(__file__).parents[1]))


def jit(function: F, signature: object = None) -> F:
    """Compile, with a disk cache if there is a place for it (numba raises where no directory is writable)."""
    given = config.CACHE_DIR  # type: ignore[attr-defined]
    config.CACHE_DIR = _CACHE  # type: ignore[attr-defined]
    try:
        compiled = njit(signature, nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        compiled = njit(signature, nogil=True, error_model="numpy")(function)
    finally:
        config.CACHE_DIR = given  # type: ignore[attr-defined]
    return cast(F, compiled)


@jit
def _bits(x: np.float32) -> np.uint32:
    return F32(x).view(U32)


@jit
def _float(u: np.uint32) -> np.float32:
    return U32(u).view(F32)


@jit
def _half_value(h: np.uint32) -> np.float32:
    """float16 bits -> float32, exact; infinities and NaN come out as finite values of at least 65536."""
    magnitude = h & U32(0x7FFF)
    if magnitude < U32(0x400):
        value = _bits(F32(I32(magnitude)) * F32(2.0**-24))
    else:
        value = U32((magnitude << U32(13)) + U32(112 << 23))
    return _float(value | ((h & U32(0x8000)) << U32(16)))


@jit
def _round_to_half(x: np.float32) -> np.float32:
    """Round x >= 0 to float16, ties to even, kept as float32; 65536 and more where float16 overflows."""
    a = _bits(x)
    normal = _float((a + U32(0xFFF) + ((a >> U32(13)) & U32(1))) & U32(0xFFFFE000))
    # Below 2^-14 float16 is fixed-point with steps of 2^-24, which is what float32 has at one half.
    return F32(F32(x + F32(0.5)) - F32(0.5)) if x < F32(2.0**-14) else normal


@jit
def _round_to_grid(x: np.float32, bf16: int) -> np.float32:
    """Round x >= 0 to the nearest scale of the grid, not yet clamped."""
    if bf16:
        a = _bits(x)
        return _round_to_half(_float((a + U32(0x7FFF) + ((a >> U32(16)) & U32(1))) & U32(0xFFFF0000)))
    return _round_to_half(x)


@jit
def _half_bits(scale: np.float32) -> np.uint16:
    """float16 bits of a float32 that float16 can hold."""
    a = _bits(abs(scale))
    sign = U32(0x8000) if scale < F32(0) else U32(0)
    if a < U32(0x38800000):
        return np.uint16(U32(I32(_float(a) * F32(2.0**24))) | sign)
    return np.uint16(((a - U32(112 << 23)) >> U32(13)) | sign)


@jit
def _decode(row: Bits | NDArray[np.uint16], kind: int, out: Bits) -> None:
    """Raw bits of a row -> float32 bits. ``kind``: 0 BF16, 1 F16, 2 F32."""
    if kind == 0:
        for k in range(row.size):
            out[k] = U32(row[k]) << U32(16)
    elif kind == 1:
        for k in range(row.size):
            out[k] = _bits(_half_value(U32(row[k])))
    else:
        for k in range(row.size):
            out[k] = U32(row[k])


@jit
def _extremes(row: Bits, start: int, columns: int) -> tuple[np.uint32, np.uint32]:
    """Float bits of max(w, 0), and of the magnitude of min(w, 0), by integer comparisons (LLVM may reorder those)."""
    high, low, base = I32(0), U32(0), U64(start)
    for k in range(columns):
        bits = row[base + U64(k)]
        high = max(high, I32(bits))
        low = max(low, bits)
    return U32(high), U32(low & MAGNITUDE) if low >= SIGN else U32(0)


@jit
def _first_nonfinite(row: Bits, start: int, columns: int, limit: np.uint32) -> int:
    for k in range(start, start + columns):
        if row[k] & MAGNITUDE >= limit:
            return k
    return -1


@jit
def _spread(scale_GR: Floats, r: int, span: int, scale_I: Floats) -> None:
    """Write each group's scale to all of its columns."""
    for g in range(scale_GR.shape[0]):
        scale, base = scale_GR[g, r], U64(g * span)
        for k in range(min(span, scale_I.size - g * span)):
            scale_I[base + U64(k)] = scale


@jit
def _round_row(row: Floats, scale_I: Floats, codes: Codes, zero: int) -> None:
    low, high, shift = F32(-zero), F32(zero - 1), I32(zero)
    for k in range(codes.size):
        q = min(max(np.rint(row[k] / scale_I[k]), low), high)
        codes[k] = U8(I32(q) + shift)


@jit
def _plain_scales(row: Bits, at: At, scales: Scales, p: RoundSettings, found: NDArray[np.int64]) -> None:
    """Min/max scales of one row, and what a report or a refusal needs to know about it."""
    r, number = at
    scale_GR, magnitude_GR = scales
    for g in range(scale_GR.shape[0]):
        start = g * p.span
        columns = min(p.span, row.size - start)
        high, low = _extremes(row, start, columns)
        largest = U32(max(high, low))
        if largest >= U32(p.limit) and found[0] < 0:
            found[0], found[1] = number, _first_nonfinite(row, start, columns, U32(p.limit))
        found[3] += largest == U32(0)
        magnitude_GR[g, r] = _float(largest) / F32(p.zero)
        scale = _round_to_grid(magnitude_GR[g, r], p.bf16)
        if scale >= HALF_OVERFLOW and largest < U32(p.limit) and found[2] < 0:
            found[2] = number
        # A scale that rounds to zero has lost its sign; the clamp then takes the positive side.
        clamped = max(scale, SMALLEST_SCALE)
        scale_GR[g, r] = -clamped if high >= low and scale > F32(0) else clamped


@jit
def _candidates(scale_R: Floats, magnitude_R: Floats, factors: Floats, bf16: int, out: Scales) -> None:
    """Scales tried per row, and their reciprocals: the min/max one, then each factor with its sign and the other."""
    scale_CR, step_CR = out
    largest = F32(65280.0) if bf16 else F32(65504.0)
    for r in range(LANES):
        scale_CR[0, r] = scale_R[r]
    for f in range(factors.size):
        for r in range(LANES):
            shrunk = _round_to_grid(F32(magnitude_R[r] * factors[f]), bf16)
            shrunk = min(max(shrunk, SMALLEST_SCALE), largest)
            signed = -shrunk if scale_R[r] < F32(0) else shrunk
            scale_CR[2 * f + 1, r] = signed
            scale_CR[2 * f + 2, r] = -signed
            step_CR[2 * f + 1, r] = F32(1) / signed
            step_CR[2 * f + 2, r] = F32(1) / -signed


@jit
def _transpose_chunk(weights_RI: Floats, rows: int, start: int, columns: int, chunk_KR: Floats) -> None:
    base = U64(start)
    for r in range(rows):
        for k in range(columns):
            chunk_KR[k, r] = weights_RI[r, base + U64(k)]


@jit
def _plain_error(chunk_KR: Floats, columns: int, scale_R: Floats, zero: int, acc_R: Floats) -> None:
    """Squared error of a chunk under the min/max scale, with the codes that would be written."""
    low, high = F32(-zero), F32(zero - 1)
    for r in range(LANES):
        acc_R[r] = F32(0)
    for k in range(columns):
        for r in range(LANES):
            q = np.rint(min(max(chunk_KR[k, r] / scale_R[r], low), high))
            error = F32(chunk_KR[k, r] - F32(scale_R[r] * q))
            acc_R[r] += F32(error * error)


@jit
def _candidate_error(chunk_KR: Floats, columns: int, scales_R: Scales, zero: int, acc_R: Floats) -> None:
    """The same under another scale, its codes from a product with the reciprocal: wrong only where two are as near."""
    scale_R, step_R = scales_R
    low, high = F32(-zero), F32(zero - 1)
    for r in range(LANES):
        acc_R[r] = F32(0)
    for k in range(columns):
        for r in range(LANES):
            q = np.rint(min(max(F32(chunk_KR[k, r] * step_R[r]), low), high))
            error = F32(chunk_KR[k, r] - F32(scale_R[r] * q))
            acc_R[r] += F32(error * error)


@jit
def _squared_errors(chunk_KR: Floats, columns: int, scratch: tuple[Floats, Floats, Floats, Doubles], zero: int) -> None:
    """Add each candidate's squared error over a chunk: float32 in column order within it, float64 across chunks."""
    scale_CR, step_CR, acc_CR, total_CR = scratch
    _plain_error(chunk_KR, columns, scale_CR[0], zero, acc_CR[0])
    for c in range(1, scale_CR.shape[0]):
        _candidate_error(chunk_KR, columns, (scale_CR[c], step_CR[c]), zero, acc_CR[c])
    for c in range(scale_CR.shape[0]):
        for r in range(LANES):
            total_CR[c, r] += F64(acc_CR[c, r])


@jit
def _search_group(
    weights_RI: Floats,
    at: At,
    scales: Scales,
    factors: Floats,
    scratch: tuple[Floats, Floats, Floats, Floats, Doubles],
    p: RoundSettings,
) -> None:
    """Replace the scales of one group in all rows of the tile by the candidates of least squared error."""
    rows, g = at
    scale_GR, magnitude_GR = scales
    chunk_KR, scale_CR, step_CR, acc_CR, total_CR = scratch
    stop = min((g + 1) * p.span, weights_RI.shape[1])
    _candidates(scale_GR[g], magnitude_GR[g], factors, p.bf16, (scale_CR, step_CR))
    total_CR[:] = 0.0
    for start in range(g * p.span, stop, CHUNK):
        columns = min(CHUNK, stop - start)
        _transpose_chunk(weights_RI, rows, start, columns, chunk_KR)
        _squared_errors(chunk_KR, columns, (scale_CR, step_CR, acc_CR, total_CR), p.zero)
    for r in range(rows):
        best = total_CR[0, r] * (1.0 - 2.0**-15)  # beyond what float32 sums may err by: never worse than min/max
        for c in range(1, scale_CR.shape[0]):
            if total_CR[c, r] < best:
                best, scale_GR[g, r] = total_CR[c, r], scale_CR[c, r]


@jit
def _pack_row(codes: Codes, words: Words, bits: int) -> None:
    """Codes of a row, one per byte -> int32 words, first code in the lowest bits."""
    if bits == 8:
        eight = codes.view(I32)
        for i in range(words.size):
            words[i] = eight[i]
    else:
        four = codes.view(U64)
        for i in range(words.size):
            x = four[i]
            x = (x | (x >> U64(4))) & BYTES_OF_16
            x = (x | (x >> U64(8))) & HALVES_OF_32
            words[i] = I32(x | (x >> U64(16)))


@jit
def _emit(words_RW: Words, scale_GR: Floats, at: At, words: Words, scales: NDArray[np.uint16], row_major: int) -> None:
    """Store a tile's words and scale bits, rows of the weight along the first or the last dimension."""
    first, rows = at
    if row_major:
        for r in range(rows):
            for i in range(words.shape[1]):
                words[first + r, i] = words_RW[r, i]
            for g in range(scales.shape[1]):
                scales[first + r, g] = _half_bits(scale_GR[g, r])
    else:
        for i in range(words.shape[0]):
            for r in range(rows):
                words[i, first + r] = words_RW[r, i]
        for g in range(scales.shape[0]):
            for r in range(rows):
                scales[g, first + r] = _half_bits(scale_GR[g, r])


def _quantize(
    w_OI: Bits | NDArray[np.uint16], p: RoundSettings, factors: Floats, words: Words, scales: NDArray[np.uint16]
) -> tuple[int, int, int, int]:
    """Round and pack all rows.

    Returns row and column of the first non-finite weight, the first row with a scale beyond float16 (-1 for none), and
    the number of all-zero groups.
    """
    O, I = w_OI.shape  # noqa: E741
    groups, row_words = -(-I // p.span), I * p.bits // 32
    slots = LANES if factors.size else 1  # the search wants all rows of a tile at once; otherwise one stays in cache
    tile_RI = np.zeros((slots, I), U32)
    weights_RI = tile_RI.view(F32)
    grid = np.ones((groups, LANES), F32), np.zeros((groups, LANES), F32)
    codes, scale_I = np.empty(I, U8), np.empty(I, F32)
    words_RW = np.empty((LANES, row_words + 16), I32)  # an odd number of cache lines: a column spreads over the sets
    floats_3CR = np.ones((3, 2 * factors.size + 1, LANES), F32)
    total_CR = np.zeros((2 * factors.size + 1, LANES), F64)
    scratch = np.zeros((CHUNK, LANES), F32), floats_3CR[0], floats_3CR[1], floats_3CR[2], total_CR
    found = np.array([-1, -1, -1, 0])
    for first in range(0, O, LANES):
        rows = min(LANES, O - first)
        for r in range(rows if factors.size else 0):
            _decode(w_OI[first + r], p.kind, tile_RI[r])
            _plain_scales(tile_RI[r], (r, first + r), grid, p, found)
        for g in range(groups if factors.size else 0):
            _search_group(weights_RI, (rows, g), grid, factors, scratch, p)
        for r in range(rows):
            slot = r if factors.size else 0
            if not factors.size:
                _decode(w_OI[first + r], p.kind, tile_RI[0])
                _plain_scales(tile_RI[0], (r, first + r), grid, p, found)
            _spread(grid[0], r, p.span, scale_I)
            _round_row(weights_RI[slot], scale_I, codes, p.zero)
            _pack_row(codes, words_RW[r, :row_words], p.bits)
        _emit(words_RW, grid[0], (first, rows), words, scales, p.row_major)
    return found[0], found[1], found[2], found[3]


class RoundSettings(NamedTuple):
    """What a kernel is told besides its arrays; all plain integers.

    Attributes:
        kind: Source bits: 0 BF16, 1 F16, 2 F32.
        bits: Width of a code.
        zero: The code of 0.
        span: Columns of a full group, a multiple of 32.
        limit: float32 bits from which a decoded magnitude stands for an infinity or NaN.
        bf16: Scales on the bf16 grid.
        row_major: Words along the columns of a row ("row") rather than along the rows ("gptq").
    """

    kind: int
    bits: int
    zero: int
    span: int
    limit: int
    bf16: int
    row_major: int


@cache
def quantizer(wide: bool) -> Callable[..., tuple[int, int, int, int]]:
    """The compiled kernel for uint32 (``wide``) or uint16 source bits; compiles or loads from disk on first use."""
    source = types.Array(types.uint32 if wide else types.uint16, 2, "C", readonly=True)
    settings = types.NamedUniTuple(types.int64, len(RoundSettings._fields), RoundSettings)  # type: ignore[no-untyped-call]
    factors = types.Array(types.float32, 1, "C", readonly=True)
    signature = (source, settings, factors, types.int32[:, :], types.uint16[:, :])
    return jit(_quantize, signature)
