"""A compiled pass that holds codes against weights; `rounding` has the same in numpy, with the same verdicts.

Importing this module needs numba. The global interpreter lock is released while the kernel runs. Sums are kept per
column, so that the inner loop vectorises; squares are float32 within a tile.
"""

# O: output rows, I: input columns, G: groups of a row.

# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numba import types

from shardxform.formats.kernels import jit

__all__ = ["Settings", "checker"]

F = TypeVar("F", bound=Callable[..., Any])

F32: Final = np.float32
I32: Final = np.int32
I64: Final = np.int64
U64: Final = np.uint64
U32: Final = np.uint32
HALF: Final = np.float32(0.5)
LARGEST: Final = np.float32(3.4028235e38)
MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
STEP: Final = np.float32(1 + 2.0**-10)  # systematic.STEP


class Settings(NamedTuple):
    """What the kernel is told besides its arrays; see `rounding.Limits`."""

    zero: int
    span: int
    strict: int
    near: float
    far: float


@jit
def _row(weights: Any, codes: Any, scale_I: Any, p: Any, squares: Any) -> Any:
    square_I, energy_I, beyond_I = squares
    zero, low, high = F32(p.zero), F32(-p.zero), F32(p.zero - 1)
    near, far = F32(p.near), F32(p.far)
    bad, moved, clipped, beyond, above = I32(0), I32(0), I32(0), I32(0), I32(0)
    for k in range(codes.size):
        finite = abs(weights[k]) <= LARGEST
        w = weights[k] if finite else F32(0)
        q = F32(I32(codes[k])) - zero
        ratio = w / scale_I[k]
        inside = min(max(ratio, low), high)
        more = q - inside
        off = abs(q - np.rint(inside)) if p.strict else abs(more)
        wrong = (off > far) | (not finite)
        bad += I32(wrong)
        moved += I32((off > near) & (not wrong))
        clipped += I32(abs(ratio - inside) > F32(0.5))
        beyond += I32(abs(more) > STEP)
        above += I32(more > HALF)
        error = w - F32(scale_I[k] * q)
        over = F32(0) if ratio == inside else F32(w - F32(scale_I[k] * inside))
        square_I[k] += F32(error * error)
        beyond_I[k] += F32(over * over)
        energy_I[k] += F32(w * w)
    return bad, moved, clipped, beyond, above


@jit
def _peak(weights: Any, begin: Any, size: Any) -> Any:
    """The largest magnitude of so many weights; a reduction of integers, which vectorises."""
    peak = U32(0)
    for k in range(size):
        peak = max(peak, F32(weights[begin + U64(k)]).view(U32) & MAGNITUDE)
    return U32(peak).view(F32)


def _check(w_OI: Any, codes_OI: Any, scale_OG: Any, p: Any, counts: Any, sums_2O: Any, peak_OG: Any) -> Any:
    """Hold codes against weights.

    Fills `counts` with weights that are wrong, moved and clipped; `sums_2O` and `peak_OG` as `rounding._rows` has
    them. Returns squared error, sum of squares, and squares of what lies beyond the range.
    """
    columns = w_OI.shape[1]
    scale_I = np.empty(columns, F32)
    squares = np.zeros(columns, F32), np.zeros(columns, F32), np.zeros(columns, F32)
    for r in range(w_OI.shape[0]):
        weights = w_OI[r]
        for g in range(scale_OG.shape[1]):
            scale, base, size = scale_OG[r, g], U64(g * p.span), min(p.span, columns - g * p.span)
            for k in range(size):
                scale_I[base + U64(k)] = scale
            peak_OG[r, g] = _peak(weights, base, size)
        bad, moved, clipped, beyond, above = _row(weights, codes_OI[r], scale_I, p, squares)
        counts[0] += I64(bad)
        counts[1] += I64(moved)
        counts[2] += I64(clipped)
        sums_2O[0, r] = I64(beyond)
        sums_2O[1, r] = I64(above + above - moved - bad)  # the others lie below
    square, energy, outside = 0.0, 0.0, 0.0
    for k in range(columns):
        square += squares[0][k]
        energy += squares[1][k]
        outside += squares[2][k]
    return square, energy, outside


@cache
def checker() -> Callable[..., tuple[float, float, float]]:
    """The compiled kernel; compiles or loads from disk on first use."""
    fields = [types.int64, types.int64, types.int64, types.float64, types.float64]
    signature = (
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.uint8, 2, "C", readonly=True),
        types.Array(types.float32, 2, "C", readonly=True),
        types.NamedTuple(fields, Settings),  # type: ignore[no-untyped-call]
        types.int64[::1],
        types.int64[:, ::1],
        types.float32[:, ::1],
    )
    return jit(_check, signature)
