"""What numba has no words for: operations of LLVM that the kernels of tuning are faster with, to the same bits."""

# ruff: noqa: ANN401, ARG001

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import binding, ir
from numba import extending, types
from numba.core.registry import cpu_target

from shardxform.base.constants import LANES

__all__ = ["HAS_BF16", "LANES", "multiply_add", "narrow", "sum_lanes"]


def _target_features() -> str:
    """Of the CPU that numba compiles for, which is the host's unless the environment says otherwise."""
    *_, features = cpu_target.target_context.codegen().magic_tuple()
    return str(features)


HAS_BF16: Final = "+avx512bf16" in _target_features() and binding.llvm_version_info >= (20,)
"""Whether `narrow` may be compiled: for other CPUs, LLVM calls a function of a library that numba does not link."""

_intrinsic: Final[Callable[[Any], Any]] = extending.intrinsic  # whose own type asks for the first parameter


class _BF16(ir.Type):  # type: ignore[misc]
    """BF16, which LLVM knows and llvmlite does not."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BF16)

    def __hash__(self) -> int:
        return hash(_BF16)


@_intrinsic
def multiply_add(_typing: Any, x: Any, y: Any, z: Any) -> Any:
    """`x * y + z` in float32, rounded once or twice as is faster: for products that are exact."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        f32 = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.fmuladd", [f32], ir.FunctionType(f32, [f32] * 3))
        return builder.call(function, arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@_intrinsic
def narrow(_typing: Any, x: Any) -> Any:
    """The bits of the BF16 that is nearest to a float32, ties to even; subnormal ones may become 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], _BF16()), ir.IntType(16))

    return types.uint16(types.float32), generate


@_intrinsic
def sum_lanes(_typing: Any, x_L: Any) -> Any:
    """The sum of the LANES elements of a contiguous float32 array: upper half to lower half, as often as there are any.

    That is the order of the additions; written as a loop, it is not made of vectors.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(array.data, ir.VectorType(ir.FloatType(), LANES).as_pointer())
        lanes = builder.load(pointer, align=4)
        half = LANES
        while half := half // 2:
            lower, upper = (_taken(builder, lanes, range(first, first + half)) for first in (0, half))
            lanes = builder.fadd(lower, upper)
        return builder.extract_element(lanes, ir.Constant(ir.IntType(32), 0))

    return types.float32(x_L), generate


def _taken(builder: Any, lanes: Any, chosen: range) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), list(chosen))
    return builder.shuffle_vector(lanes, ir.Constant(lanes.type, ir.Undefined), mask)
