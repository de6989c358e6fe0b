"""Compiled passes of tuning and healing: weights as they would be stored, and signed steps, in one sweep over memory.

Bit-equal to `elementwise` and `heal`, which say what the numbers mean. The global interpreter lock is released while a
kernel runs; rows are independent. Importing this module needs numba; compiled code is cached as in `formats.kernels`.

BF16 is widened and narrowed inside the loops: to widen whole rows first took a quarter more time. What is done to a
group is compiled into the loop over groups: constants in registers, and an eighth less time than by calls. What numba
has no words for are operations of LLVM.
"""

# O: output rows, I: input columns, G: groups of a row; 32 lanes: every group is a multiple of 32 columns, R: any run
# of rows.

# ruff: noqa: ANN401, ARG001

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final, NamedTuple, cast

import numpy as np
from llvmlite import binding, ir
from numba import extending, njit, types
from numba.core.cpu import CPUContext
from numba.core.registry import cpu_target
from numba.core.typing.templates import Signature
from numba.extending import overload
from numpy.typing import NDArray

from shardxform.base.constants import LANES
from shardxform.formats.kernels import SMALLEST_SCALE, _decode, _half_value, _round_to_grid, jit
from shardxform.tuning import elementwise
from shardxform.tuning.elementwise import ONE, UNITS_PER_STEP, Pace

__all__ = [
    "HAS_BF16",
    "LANES",
    "GridSettings",
    "joiner",
    "keeper",
    "mover",
    "multiply_add",
    "narrow",
    "stepper",
    "sum_lanes",
    "valuer",
]


_Typed = tuple[Signature, Callable[..., ir.Value]]
"""The type of an operation, and what makes its instructions."""

Values = NDArray[np.uint16] | NDArray[np.int16] | NDArray[np.float32]
"""Weights: the bits of BF16, those of float16, or float32 itself."""
Floats = NDArray[np.float32]
Offsets = NDArray[np.int16]
Scales = tuple[Floats, Floats]
"""Scales to start from, and clips, of every group."""
Group = tuple[np.uint64, int, np.float32]
"""First column of a group, how many there are, and its scale."""


def _target_features() -> str:
    """Of the CPU that numba compiles for, which is the host's unless the environment says otherwise."""
    *_, features = cpu_target.target_context.codegen().magic_tuple()
    return str(features)


HAS_BF16: Final = "+avx512bf16" in _target_features() and binding.llvm_version_info >= (20,)
"""Whether `narrow` may be compiled: for other CPUs, LLVM calls a function of a library that numba does not link."""

# Whose own type asks for the first parameter.
_float_intrinsic: Final = cast(Callable[[object], Callable[..., np.float32]], extending.intrinsic)
_bits_intrinsic: Final = cast(Callable[[object], Callable[..., np.uint16]], extending.intrinsic)


class _BF16(ir.Type):  # type: ignore[misc]
    """BF16, which LLVM knows and llvmlite does not."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BF16)

    def __hash__(self) -> int:
        return hash(_BF16)


@_float_intrinsic
def multiply_add(_typing: object, x: types.Type, y: types.Type, z: types.Type) -> _Typed:
    """`x * y + z` in float32, rounded once or twice as is faster: for products that are exact."""

    def generate(
        _context: object, builder: ir.IRBuilder, _signature: object, arguments: Sequence[ir.Value]
    ) -> ir.Value:
        f32 = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.fmuladd", [f32], ir.FunctionType(f32, [f32] * 3))
        return builder.call(function, arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@_bits_intrinsic
def narrow(_typing: object, x: types.Type) -> _Typed:
    """The bits of the BF16 that is nearest to a float32, ties to even; subnormal ones may become 0."""

    def generate(
        _context: object, builder: ir.IRBuilder, _signature: object, arguments: Sequence[ir.Value]
    ) -> ir.Value:
        return builder.bitcast(builder.fptrunc(arguments[0], _BF16()), ir.IntType(16))

    return types.uint16(types.float32), generate


@_float_intrinsic
def sum_lanes(_typing: object, x_L: types.Type) -> _Typed:
    """The sum of the LANES elements of a contiguous float32 array: upper half to lower half, as often as there are any.

    That is the order of the additions; written as a loop, it is not made of vectors.
    """

    def generate(
        context: CPUContext, builder: ir.IRBuilder, signature: Signature, arguments: Sequence[ir.Value]
    ) -> ir.Value:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])  # type: ignore[no-untyped-call]
        pointer = builder.bitcast(array.data, ir.VectorType(ir.FloatType(), LANES).as_pointer())
        lanes = builder.load(pointer, align=4)
        half = LANES
        while half := half // 2:
            lower, upper = (_taken(builder, lanes, range(first, first + half)) for first in (0, half))
            lanes = builder.fadd(lower, upper)
        return builder.extract_element(lanes, ir.Constant(ir.IntType(32), 0))

    return types.float32(x_L), generate


def _taken(builder: ir.IRBuilder, lanes: ir.Value, chosen: range) -> ir.Value:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), list(chosen))
    return builder.shuffle_vector(lanes, ir.Constant(lanes.type, ir.Undefined), mask)


# -- rounding ----------------------------------------------------------------------------------------------------------


F32: Final = np.float32
I32: Final = np.int32
I16: Final = np.int16
U16: Final = np.uint16
U32: Final = np.uint32
U64: Final = np.uint64
UNIT: Final = np.float32(1 / ONE)
LIMIT: Final = np.int32(elementwise.LIMIT)
OFFSET_BITS: Final = np.int32(-UNITS_PER_STEP)  # the other two bits of v hold what was kept

_inlined: Final = njit(inline="always", error_model="numpy")


class GridSettings(NamedTuple):
    """What a kernel is told of the grid; plain integers.

    Attributes:
        zero: The code of 0.
        span: Columns of a full group.
        bf16: Scales on the bf16 grid.
        kept: Take the codes that were kept, rather than those of the present offsets.
    """

    zero: int
    span: int
    bf16: int
    kept: int


@jit
def _scale(start: np.float32, clip: np.float32, bf16: int) -> np.float32:
    """The stored scale: start * clip, rounded to the grid, with the sign of start."""
    largest = F32(65280.0) if bf16 else F32(65504.0)
    magnitude = _round_to_grid(F32(abs(start) * clip), bf16)
    magnitude = min(max(magnitude, SMALLEST_SCALE), largest)
    return -magnitude if start < F32(0) else magnitude


@jit
def _tag(held: np.int16) -> np.float32:
    """The two low bits, -1, 0 or 1."""
    return F32(I32(I32(I32(held) & I32(3)) ^ I32(2)) - I32(2))


@_inlined
def _round(ratio: np.float32, held: np.int16 | np.int32) -> np.float32:
    """Rounded weight in scales with the present offset, not yet clamped."""
    return np.rint(multiply_add(F32(I32(held) & OFFSET_BITS), UNIT, ratio))  # type: ignore[no-any-return]


# numba compares the annotations of an overload with those of what it gives, so these have none that say more.


def _wide(x: Any) -> Any:
    """-> float32: of the bits of BF16 (uint16), of those of float16 (int16), or of float32 itself."""
    raise NotImplementedError  # compiled below


@overload(_wide)
def _compiled_wide(x: Any) -> Any:
    def from_bf16(x: Any) -> Any:
        return U32(U32(x) << U32(16)).view(F32)

    def from_half(x: Any) -> Any:
        return _half_value(U32(U16(x)))

    def itself(x: Any) -> Any:
        return x

    return {types.uint16: from_bf16, types.int16: from_half, types.float32: itself}[x]


def _put(out_I: Any, i: Any, x: Any) -> None:
    """Store float32, as the nearest BF16, ties to even, where `out_I` is of BF16 bits; zero or normal, and finite."""
    raise NotImplementedError  # compiled below


@overload(_put)
def _compiled_put(out_I: Any, i: Any, x: Any) -> Any:
    def by_instruction(out_I: Any, i: Any, x: Any) -> None:
        out_I[i] = narrow(F32(x))

    def by_integers(out_I: Any, i: Any, x: Any) -> None:
        bits = F32(x).view(U32)
        out_I[i] = U16(U32(bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))

    def as_is(out_I: Any, i: Any, x: Any) -> None:
        out_I[i] = x

    def nowhere(out_I: Any, i: Any, x: Any) -> None:
        pass

    if isinstance(out_I, types.NoneType):
        return nowhere
    rounded = by_instruction if HAS_BF16 else by_integers
    return {types.uint16: rounded, types.float32: as_is}[out_I.dtype]


def _row(x_RI: Any, r: Any) -> Any:
    """Row r, or None of None."""
    raise NotImplementedError  # compiled below


@overload(_row)
def _compiled_row(x_RI: Any, r: Any) -> Any:
    def nothing(x_RI: Any, r: Any) -> Any:
        return None

    def row(x_RI: Any, r: Any) -> Any:
        return x_RI[r]

    return nothing if isinstance(x_RI, types.NoneType) else row


@_inlined
def _values_group(w_I: Values, v_I: Offsets, at: Group, p: GridSettings, out_I: Values) -> None:
    base, columns, scale = at
    low, high = F32(-p.zero), F32(p.zero - 1)
    if p.kept:
        for k in range(columns):
            i = base + U64(k)
            rounded = np.rint(F32(_wide(w_I[i]) / scale)) + _tag(v_I[i])
            _put(out_I, i, F32(scale * min(max(rounded, low), high)))
    else:
        for k in range(columns):
            i = base + U64(k)
            rounded = _round(F32(_wide(w_I[i]) / scale), v_I[i])
            _put(out_I, i, F32(scale * min(max(rounded, low), high)))


@_inlined
def _keep_group(w_I: Values, v_I: Offsets, at: Group) -> None:
    base, columns, scale = at
    for k in range(columns):
        i = base + U64(k)
        ratio = F32(_wide(w_I[i]) / scale)
        more = I32(_round(ratio, v_I[i]) - np.rint(ratio))
        v_I[i] = I16(I32(I32(v_I[i]) & OFFSET_BITS) | I32(more & I32(3)))


@_inlined
def _step_group(
    row: tuple[Values, Offsets, Values, Values | None],
    at: tuple[np.uint64, int, np.float32, int],
    acc_L: Floats,
    pace: Pace,
) -> np.float32:
    """Move the offsets of a group against the gradient, values as they were into `before_I`; gradient of its scale."""
    w_I, v_I, gradient_I, before_I = row
    base, columns, scale, zero = at
    low, high = F32(-zero), F32(zero - 1)
    toward = I32(-pace.offset) if scale < F32(0) else I32(pace.offset)
    for j in range(LANES):
        acc_L[j] = F32(0)
    for b in range(0, columns, LANES):
        for j in range(LANES):
            i = base + U64(b) + U64(j)
            held, g = I32(v_I[i]), _wide(gradient_I[i])
            offset = I32(held & OFFSET_BITS)
            ratio = F32(_wide(w_I[i]) / scale)
            rounded = _round(ratio, held)
            q = min(max(rounded, low), high)
            inside = q == rounded
            _put(before_I, i, F32(scale * q))
            acc_L[j] += F32(g * F32(q - (ratio if inside else F32(0))))
            move = toward if g > F32(0) else (I32(-toward) if g < F32(0) else I32(0))
            moved = min(max(I32(offset - (move if inside else I32(0))), I32(-LIMIT)), I32(LIMIT))
            v_I[i] = I16(moved | I32(held & I32(3)))
    return sum_lanes(acc_L)


@jit
def _move_clip(clip: np.float32, slope: np.float32, pace: Pace) -> np.float32:
    move = F32(pace.clip) if slope > F32(0) else (F32(-pace.clip) if slope < F32(0) else F32(0))
    return min(max(F32(clip - move), F32(pace.low)), F32(pace.high))


def _values(w_RI: Values, v_RI: Offsets, scales: Scales, p: GridSettings, out_RI: Values) -> None:
    start_RG, clip_RG = scales
    columns = w_RI.shape[1]
    for r in range(w_RI.shape[0]):
        w_I, v_I, out_I = w_RI[r], v_RI[r], out_RI[r]
        for g in range(start_RG.shape[1]):
            at = U64(g * p.span), min(p.span, columns - g * p.span), _scale(start_RG[r, g], clip_RG[r, g], p.bf16)
            _values_group(w_I, v_I, at, p, out_I)


def _keep(w_RI: Values, v_RI: Offsets, scales: Scales, p: GridSettings) -> None:
    start_RG, clip_RG = scales
    columns = w_RI.shape[1]
    for r in range(w_RI.shape[0]):
        w_I, v_I = w_RI[r], v_RI[r]
        for g in range(start_RG.shape[1]):
            at = U64(g * p.span), min(p.span, columns - g * p.span), _scale(start_RG[r, g], clip_RG[r, g], p.bf16)
            _keep_group(w_I, v_I, at)


def _step(
    w_RI: Values,
    v_RI: Offsets,
    scales: Scales,
    p: GridSettings,
    pace: Pace,
    gradient_RI: Values,
    before_RI: Values | None,
) -> None:
    start_RG, clip_RG = scales
    columns, acc_L = w_RI.shape[1], np.empty(LANES, F32)
    for r in range(w_RI.shape[0]):
        row = w_RI[r], v_RI[r], gradient_RI[r], _row(before_RI, r)
        for g in range(start_RG.shape[1]):
            start, clip = start_RG[r, g], clip_RG[r, g]
            scale = _scale(start, clip, p.bf16)
            at = U64(g * p.span), min(p.span, columns - g * p.span), scale, p.zero
            slope = _step_group(row, at, acc_L, pace)
            clip_RG[r, g] = _move_clip(clip, -slope if start < F32(0) else slope, pace)


_ELEMENTS: Final = {"BF16": types.uint16, "F16": types.int16, "F32": types.float32}
_SCALES: Final = types.UniTuple(types.float32[:, ::1], 2)  # type: ignore[no-untyped-call]
_SETTINGS: Final = types.NamedUniTuple(types.int64, len(GridSettings._fields), GridSettings)  # type: ignore[no-untyped-call]
_PACE: Final = types.NamedUniTuple(types.float64, len(Pace._fields), Pace)  # type: ignore[no-untyped-call]


def _read(dtype: str) -> Any:
    return types.Array(_ELEMENTS[dtype], 2, "C", readonly=True)


@cache
def valuer(dtype: str, out: str) -> Callable[..., None]:
    """Kernel `(w_RI, v_RI, (start_RG, clip_RG), settings, out_RI)` for weights and outputs of these types.

    BF16 is passed as uint16, F16 (weights only) as int16, F32 as float32.
    """
    return jit(_values, (_read(dtype), types.int16[:, ::1], _SCALES, _SETTINGS, _ELEMENTS[out][:, ::1]))


@cache
def keeper(dtype: str) -> Callable[..., None]:
    """Kernel `(w_RI, v_RI, (start_RG, clip_RG), settings)`; changes the tags in v."""
    return jit(_keep, (_read(dtype), types.int16[:, ::1], _SCALES, _SETTINGS))


@cache
def stepper(dtype: str, gradient: str, before: str | None = None) -> Callable[..., None]:
    """Kernel `(w_RI, v_RI, (start_RG, clip_RG), settings, pace, gradient_RI, before_RI)`; changes v and clip in place.

    `before_RI`, of type `before` or None, takes the values as they were.
    """
    out = types.none if before is None else _ELEMENTS[before][:, ::1]
    return jit(_step, (_read(dtype), types.int16[:, ::1], _SCALES, _SETTINGS, _PACE, _read(gradient), out))


# -- healing -----------------------------------------------------------------------------------------------------------


I8: Final = np.int8


@jit
def _join_row(high_I: Offsets, low_I: NDArray[np.int8], bits_I: NDArray[np.int32]) -> None:
    for i in range(bits_I.size):
        bits_I[i] = I32(I32(I32(high_I[i]) << I32(16)) + I32(I32(low_I[i]) * I32(256)))


@jit
def _move_row(value_I: Floats, gradient_I: Floats, step: np.float32) -> None:
    for i in range(value_I.size):
        g = gradient_I[i]
        value_I[i] -= step if g > F32(0) else (-step if g < F32(0) else F32(0))


@jit
def _part_row(bits_I: NDArray[np.int32], high_I: Offsets, low_I: NDArray[np.int8]) -> None:
    for i in range(bits_I.size):
        upper = I32(I32(bits_I[i] + I32(128)) >> I32(8))
        high = I32(I32(upper + I32(128)) >> I32(8))
        high_I[i] = I16(high)
        low_I[i] = I8(I32(upper - I32(high * I32(256))))


def _join(high_RI: Offsets, low_RI: NDArray[np.int8], out_RI: NDArray[np.int32]) -> None:
    for r in range(high_RI.shape[0]):
        _join_row(high_RI[r], low_RI[r], out_RI[r])


def _move(
    high_RI: Offsets, low_RI: NDArray[np.int8], step_R: Floats, gradient_RI: NDArray[np.uint16] | NDArray[np.uint32]
) -> None:
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
