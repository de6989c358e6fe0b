"""Compiled passes of tuning: weights as they would be stored, and one signed step, each in a single sweep over memory.

Bit-equal to `elementwise`, which says what the numbers mean. The global interpreter lock is released while a kernel
runs; rows are independent. Importing this module needs numba; compiled code is cached as in `quantize.kernels`.
"""

# O: output rows, I: input columns, G: groups of a row; 32 lanes: every group is a multiple of 32 columns.

# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from numba import types

from shardxform.quantize.kernels import SMALLEST_SCALE, _decode, _round_to_grid, jit
from shardxform.tuning import elementwise
from shardxform.tuning.elementwise import ONE, UNITS_PER_STEP, Pace

__all__ = ["Settings", "keeper", "stepper", "valuer"]

F32: Final = np.float32
I32: Final = np.int32
I16: Final = np.int16
U16: Final = np.uint16
U32: Final = np.uint32
U64: Final = np.uint64
LANES: Final = 32
UNIT: Final = np.float32(1 / ONE)
LIMIT: Final = np.float32(elementwise.LIMIT)
OFFSET_BITS: Final = np.int32(-UNITS_PER_STEP)  # the other two bits of v hold what was kept


class Settings(NamedTuple):
    """What a kernel is told of the grid; plain integers.

    Attributes:
        kind: Type of the weights: 0 BF16, 1 F16, 2 F32.
        zero: The code of 0.
        span: Columns of a full group.
        bf16: Scales on the bf16 grid.
        kept: Take the codes that were kept, rather than those of the present offsets.
    """

    kind: int
    zero: int
    span: int
    bf16: int
    kept: int


@jit
def _scale(start: Any, clip: Any, bf16: Any) -> Any:
    """The stored scale: start * clip, rounded to the grid, with the sign of start."""
    largest = F32(65280.0) if bf16 else F32(65504.0)
    magnitude = _round_to_grid(F32(abs(start) * clip), bf16)
    magnitude = min(max(magnitude, SMALLEST_SCALE), largest)
    return -magnitude if start < F32(0) else magnitude


@jit
def _tag(held: Any) -> Any:
    """The two low bits, -1, 0 or 1."""
    return F32(I32(I32(I32(held) & I32(3)) ^ I32(2)) - I32(2))


@jit
def _round(ratio: Any, held: Any, kept: Any) -> Any:
    """Rounded weight in scales, not yet clamped."""
    if kept:
        return np.rint(ratio) + _tag(held)
    return np.rint(ratio + F32(I32(held) & OFFSET_BITS) * UNIT)


@jit
def _values_group(w_I: Any, v_I: Any, at: Any, p: Any, out_I: Any) -> None:
    base, columns, scale = at
    low, high = F32(-p.zero), F32(p.zero - 1)
    for k in range(columns):
        i = base + U64(k)
        out_I[i] = scale * min(max(_round(F32(w_I[i] / scale), v_I[i], p.kept), low), high)


@jit
def _narrow(value_I: Any, out_I: Any) -> None:
    """float32 bits -> bits of the nearest BF16, ties to even."""
    for k in range(out_I.size):
        bits = value_I[k]
        out_I[k] = U16(U32(bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))


@jit
def _keep_group(w_I: Any, v_I: Any, at: Any) -> None:
    base, columns, scale = at
    for k in range(columns):
        i = base + U64(k)
        ratio = F32(w_I[i] / scale)
        more = I32(_round(ratio, v_I[i], 0) - np.rint(ratio))
        v_I[i] = I16(I32(I32(v_I[i]) & OFFSET_BITS) | I32(more & I32(3)))


@jit
def _sum_lanes(acc_L: Any) -> Any:
    half = LANES // 2
    while half:
        for j in range(half):
            acc_L[j] += acc_L[j + half]
        half //= 2
    return acc_L[0]


@jit
def _step_group(row: Any, at: Any, acc_L: Any, pace: Any) -> Any:
    """Move the offsets of a group against the gradient; return the gradient of its scale."""
    w_I, v_I, gradient_I = row
    base, columns, scale, zero = at
    low, high = F32(-zero), F32(zero - 1)
    toward = F32(-pace.offset) if scale < F32(0) else F32(pace.offset)
    for j in range(LANES):
        acc_L[j] = F32(0)
    for b in range(0, columns, LANES):
        for j in range(LANES):
            i = base + U64(b) + U64(j)
            held = I32(v_I[i])
            offset = F32(I32(held & OFFSET_BITS))
            ratio = F32(w_I[i] / scale)
            rounded = np.rint(ratio + offset * UNIT)
            q = min(max(rounded, low), high)
            inside = q == rounded
            g = gradient_I[i]
            acc_L[j] += F32(g * F32(q - (ratio if inside else F32(0))))
            move = toward if g > F32(0) else (-toward if g < F32(0) else F32(0))
            moved = min(max(F32(offset - (move if inside else F32(0))), -LIMIT), LIMIT)
            v_I[i] = I16(I32(moved) | I32(held & I32(3)))
    return _sum_lanes(acc_L)


@jit
def _move_clip(clip: Any, slope: Any, pace: Any) -> Any:
    move = F32(pace.clip) if slope > F32(0) else (F32(-pace.clip) if slope < F32(0) else F32(0))
    return min(max(F32(clip - move), F32(pace.low)), F32(pace.high))


def _values(w_RI: Any, v_RI: Any, scales: Any, p: Any, out_RI: Any) -> None:
    start_RG, clip_RG = scales
    columns = w_RI.shape[1]
    bits_I = np.empty(columns, U32)
    w_I = bits_I.view(F32)
    for r in range(w_RI.shape[0]):
        _decode(w_RI[r], p.kind, bits_I)
        v_I, out_I = v_RI[r], out_RI[r]
        for g in range(start_RG.shape[1]):
            at = U64(g * p.span), min(p.span, columns - g * p.span), _scale(start_RG[r, g], clip_RG[r, g], p.bf16)
            _values_group(w_I, v_I, at, p, out_I)


def _values_16(w_RI: Any, v_RI: Any, scales: Any, p: Any, out_RI: Any) -> None:
    start_RG, clip_RG = scales
    columns = w_RI.shape[1]
    bits_I, value_I = np.empty(columns, U32), np.empty(columns, U32)
    w_I, wide_I = bits_I.view(F32), value_I.view(F32)
    for r in range(w_RI.shape[0]):
        _decode(w_RI[r], p.kind, bits_I)
        v_I = v_RI[r]
        for g in range(start_RG.shape[1]):
            at = U64(g * p.span), min(p.span, columns - g * p.span), _scale(start_RG[r, g], clip_RG[r, g], p.bf16)
            _values_group(w_I, v_I, at, p, wide_I)
        _narrow(value_I, out_RI[r])


def _keep(w_RI: Any, v_RI: Any, scales: Any, p: Any) -> None:
    start_RG, clip_RG = scales
    columns = w_RI.shape[1]
    bits_I = np.empty(columns, U32)
    w_I = bits_I.view(F32)
    for r in range(w_RI.shape[0]):
        _decode(w_RI[r], p.kind, bits_I)
        v_I = v_RI[r]
        for g in range(start_RG.shape[1]):
            at = U64(g * p.span), min(p.span, columns - g * p.span), _scale(start_RG[r, g], clip_RG[r, g], p.bf16)
            _keep_group(w_I, v_I, at)


def _step(w_RI: Any, v_RI: Any, scales: Any, p: Any, pace: Any, gradient_RI: Any) -> None:
    start_RG, clip_RG = scales
    columns = w_RI.shape[1]
    bits_I, gradient_bits_I, acc_L = np.empty(columns, U32), np.empty(columns, U32), np.empty(LANES, F32)
    row_of = bits_I.view(F32), gradient_bits_I.view(F32)
    gradient_kind = 0 if gradient_RI.itemsize == 2 else 2
    for r in range(w_RI.shape[0]):
        _decode(w_RI[r], p.kind, bits_I)
        _decode(gradient_RI[r], gradient_kind, gradient_bits_I)
        row = row_of[0], v_RI[r], row_of[1]
        for g in range(start_RG.shape[1]):
            start, clip = start_RG[r, g], clip_RG[r, g]
            scale = _scale(start, clip, p.bf16)
            at = U64(g * p.span), min(p.span, columns - g * p.span), scale, p.zero
            slope = _step_group(row, at, acc_L, pace)
            clip_RG[r, g] = _move_clip(clip, -slope if start < F32(0) else slope, pace)


def _bits(wide: bool) -> Any:
    return types.Array(types.uint32 if wide else types.uint16, 2, "C", readonly=True)


_SCALES: Final = types.UniTuple(types.float32[:, ::1], 2)  # type: ignore[no-untyped-call]
_SETTINGS: Final = types.NamedUniTuple(types.int64, len(Settings._fields), Settings)  # type: ignore[no-untyped-call]
_PACE: Final = types.NamedUniTuple(types.float64, len(Pace._fields), Pace)  # type: ignore[no-untyped-call]


@cache
def valuer(wide: bool, wide_out: bool) -> Callable[..., None]:
    """Kernel `(w_RI, v_RI, (start_RG, clip_RG), settings, out_RI)`; out is float32, or BF16 bits unless `wide_out`."""
    out = types.float32[:, ::1] if wide_out else types.uint16[:, ::1]
    return jit(_values if wide_out else _values_16, (_bits(wide), types.int16[:, ::1], _SCALES, _SETTINGS, out))


@cache
def keeper(wide: bool) -> Callable[..., None]:
    """Kernel `(w_RI, v_RI, (start_RG, clip_RG), settings)`; changes the tags in v."""
    return jit(_keep, (_bits(wide), types.int16[:, ::1], _SCALES, _SETTINGS))


@cache
def stepper(wide: bool, wide_gradient: bool) -> Callable[..., None]:
    """Kernel `(w_RI, v_RI, (start_RG, clip_RG), settings, pace, gradient bits)`; changes v and clip in place."""
    return jit(_step, (_bits(wide), types.int16[:, ::1], _SCALES, _SETTINGS, _PACE, _bits(wide_gradient)))
