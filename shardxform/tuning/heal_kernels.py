"""Compiled passes of healing: split weights joined, and one signed step, each in a single sweep over memory.

Bit-equal to `healed`, which says what the numbers mean. The global interpreter lock is released while a kernel runs;
rows are independent. Importing this module needs numba; compiled code is cached as in `formats.kernels`.
"""

# I: input columns, R: any run of rows.

# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numba import types

from shardxform.formats.kernels import _decode, jit

__all__ = ["joiner", "mover"]

F32: Final = np.float32
I32: Final = np.int32
I16: Final = np.int16
I8: Final = np.int8
U32: Final = np.uint32


@jit
def _join_row(high_I: Any, low_I: Any, bits_I: Any) -> None:
    for i in range(bits_I.size):
        bits_I[i] = I32(I32(I32(high_I[i]) << I32(16)) + I32(I32(low_I[i]) * I32(256)))


@jit
def _move_row(value_I: Any, gradient_I: Any, step: Any) -> None:
    for i in range(value_I.size):
        g = gradient_I[i]
        value_I[i] -= step if g > F32(0) else (-step if g < F32(0) else F32(0))


@jit
def _part_row(bits_I: Any, high_I: Any, low_I: Any) -> None:
    for i in range(bits_I.size):
        upper = I32(I32(bits_I[i] + I32(128)) >> I32(8))
        high = I32(I32(upper + I32(128)) >> I32(8))
        high_I[i] = I16(high)
        low_I[i] = I8(I32(upper - I32(high * I32(256))))


def _join(high_RI: Any, low_RI: Any, out_RI: Any) -> None:
    for r in range(high_RI.shape[0]):
        _join_row(high_RI[r], low_RI[r], out_RI[r])


def _move(high_RI: Any, low_RI: Any, step_R: Any, gradient_RI: Any) -> None:
    columns = high_RI.shape[1]
    bits_I, gradient_bits_I = np.empty(columns, I32), np.empty(columns, U32)
    value_I, gradient_I = bits_I.view(F32), gradient_bits_I.view(F32)
    kind = 0 if gradient_RI.itemsize == 2 else 2
    for r in range(high_RI.shape[0]):
        _join_row(high_RI[r], low_RI[r], bits_I)
        _decode(gradient_RI[r], kind, gradient_bits_I)
        _move_row(value_I, gradient_I, step_R[r])
        _part_row(bits_I, high_RI[r], low_RI[r])


_HIGH: Final = types.int16[:, ::1]
_LOW: Final = types.int8[:, ::1]


@cache
def joiner() -> Callable[..., None]:
    """Kernel `(high_RI, low_RI, out_RI)`; out is the bits of float32 as int32."""
    return jit(_join, (_HIGH, _LOW, types.int32[:, ::1]))


@cache
def mover(wide_gradient: bool) -> Callable[..., None]:
    """Kernel `(high_RI, low_RI, step_R, gradient bits)`; changes high and low in place."""
    bits = types.Array(types.uint32 if wide_gradient else types.uint16, 2, "C", readonly=True)
    return jit(_move, (_HIGH, _LOW, types.float32[::1], bits))
