"""The dtypes of safetensors: their names, their widths in bits, and the order the reference writer gives them.

Source: the `Dtype` enum of huggingface/safetensors, whose declaration order is the on-disk order, widest last.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BITS", "FLOATS", "RANK"]

BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Width of one element in bits, by dtype name."""

RANK: Final[dict[str, int]] = {name: rank for rank, name in enumerate(BITS)}
"""Position in the reference writer's order; tensors of the highest rank come first in a shard."""

FLOATS: Final[frozenset[str]] = frozenset({"F16", "BF16", "F32", "F64"})
"""Plain floating-point dtypes: what a weight that is not quantized is stored in."""
