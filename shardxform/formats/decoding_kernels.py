"""Compiled decoding: codes of a byte or of four bits times the scale of their block, in one pass on the calling thread.

Bit-equal to the numpy code of ``fp8``, ``microscaling`` and ``packing``: a code is exact in float32, and the product is
rounded once. Importing this module needs numba; compiled code is cached as in ``kernels``, whose rules for inner loops
hold here too.
"""

# R: a run of rows, I: input columns, B: bytes of a row of codes, S, T: rows and columns of blocks.

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, Literal

import numpy as np
from numba import types
from numpy.typing import NDArray

from shardxform.formats.kernels import F32, I32, U32, _bits, _float, jit

__all__ = ["CHUNK", "SHARE", "Kind", "decode_run"]

CHUNK: Final = 32
"""Columns at a time where codes have four bits: a number that is compiled in, and that a row is a multiple of."""

SHARE: Final = 16
"""Columns of which a block is a multiple where codes have four bits; at most two blocks share a chunk."""

Kind = Literal["F8_E4M3", "E2M1", "int4"]
"""Codes that are decoded here; of the last two, two are in a byte."""

_HALF: Final = np.uint32(CHUNK // 2)
_UNIT: Final = np.uint32(1)
_NAN: Final = np.uint32(127)  # of E4M3, less the sign
_EIGHT_BITS: Final = np.uint32((127 - 7) << 23)  # what the exponent of a float32 has beyond that of E4M3
_FOUR_BITS: Final = np.uint32((127 - 1) << 23)  # beyond that of E2M1


@jit
def _e4m3(code: np.uint32) -> np.float32:
    """The number of a code; of NaN, one that is none."""
    size = code & U32(127)
    if size < U32(8):  # noqa: SIM108 numba takes no such expression
        value = _bits(F32(I32(size)) * F32(2.0**-9))
    else:
        value = U32((size << U32(20)) + _EIGHT_BITS)
    return _float(value | U32((code & U32(128)) << U32(24)))


@jit
def _e2m1(code: np.uint32) -> np.float32:
    size = code & U32(7)
    if size < U32(2):  # noqa: SIM108
        value = _bits(F32(I32(size)) * F32(0.5))
    else:
        value = U32((size << U32(22)) + _FOUR_BITS)
    return _float(value | U32((code & U32(8)) << U32(28)))


def _wide(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], at: tuple[int, int, int], out: NDArray[np.float32]
) -> np.uint32:
    """Rows of E4M3, the first of them row `at[0]`, in blocks of `at[1]` rows and `at[2]` columns; 1 if one is NaN."""
    begin, height, width = at
    columns, found = out.shape[1], U32(0)
    for row in range(out.shape[0]):
        stored, values = codes[row], out[row]
        block = (begin + row) // height
        for part in range(scales.shape[1]):
            first, scale = U32(part * width), scales[block, part]
            for i in range(U32(min(width, columns - part * width))):
                code = U32(stored[first + U32(i)])
                found |= U32(U32(code & _NAN) == _NAN)
                values[first + U32(i)] = _e4m3(code) * scale
    return found


def _pairs(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], at: tuple[int, int], out: NDArray[np.float32]
) -> None:
    """Rows of E2M1, the first of them row `at[0]`, with a scale for `at[1]` columns; lower halves are first."""
    begin, width = at
    for row in range(out.shape[0]):
        stored, values, own = codes[row], out[row], scales[begin + row]
        for chunk in range(out.shape[1] // CHUNK):
            one, other = own[chunk * CHUNK // width], own[(chunk * CHUNK + SHARE) // width]
            first = U32(U32(chunk) * _HALF)
            for i in range(_HALF):  # one loop, since shorter ones are unrolled and not vectorised
                scale = one if i < _HALF // U32(2) else other
                code, place = U32(stored[first + U32(i)]), U32(U32(2) * (first + U32(i)))
                values[place] = _e2m1(U32(code & U32(15))) * scale
                values[place + _UNIT] = _e2m1(U32(code >> U32(4))) * scale


def _nibbles(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], at: tuple[int, int], out: NDArray[np.float32]
) -> None:
    """Rows of integers of four bits, less 8; as `_pairs`."""
    begin, width = at
    for row in range(out.shape[0]):
        stored, values, own = codes[row], out[row], scales[begin + row]
        for chunk in range(out.shape[1] // CHUNK):
            one, other = own[chunk * CHUNK // width], own[(chunk * CHUNK + SHARE) // width]
            first = U32(U32(chunk) * _HALF)
            for i in range(_HALF):
                scale = one if i < _HALF // U32(2) else other
                code, place = U32(stored[first + U32(i)]), U32(U32(2) * (first + U32(i)))
                values[place] = F32(I32(U32(code & U32(15))) - I32(8)) * scale
                values[place + _UNIT] = F32(I32(U32(code >> U32(4))) - I32(8)) * scale


_CODES: Final = types.Array(types.uint8, 2, "C", readonly=True)
_SCALES: Final = types.Array(types.float32, 2, "C", readonly=True)
_FOURS: Final[dict[str, Callable[..., Any]]] = {"E2M1": _pairs, "int4": _nibbles}


@cache
def _compiled(kind: str) -> Callable[..., Any]:
    function, numbers = (_FOURS[kind], 2) if kind in _FOURS else (_wide, 3)
    at = types.UniTuple(types.int64, numbers)  # type: ignore[no-untyped-call]
    return jit(function, (_CODES, _SCALES, at, types.float32[:, ::1]))


def decode_run(
    kind: Kind,
    codes_RB: NDArray[np.uint8],
    scale_ST: NDArray[np.float32],
    begin: int,
    block: tuple[int, int],
    out_RI: NDArray[np.float32],
) -> bool:
    """Decode rows `begin`.. of a weight.

    Args:
        kind: what a code is.
        codes_RB: as they are stored.
        scale_ST: all scales of the weight.
        begin: the first of the rows.
        block: rows and columns that share a scale, the last ones perhaps fewer; one row where codes have four bits.
        out_RI: where values go, float32 [R, I].

    Returns:
        whether they are there: not where a code is NaN, or those of four bits lie in blocks that are not compiled.

    """
    scale_ST = np.ascontiguousarray(scale_ST)
    if kind not in _FOURS:
        return not _compiled(kind)(codes_RB, scale_ST, (begin, *block), out_RI)
    columns = out_RI.shape[1]
    if columns % CHUNK or block[1] % SHARE or columns > scale_ST.shape[1] * block[1]:
        return False
    _compiled(kind)(codes_RB, scale_ST, (begin, block[1]), out_RI)
    return True
