"""The bytes of ggml's blocks, in numpy: from codes and scales, from floats by ggml's own rules, and back to floats.

The rules are those of `quantize_row_*_ref` in ggml-quants.c of llama.cpp, in float32, each operation rounded by itself,
as ggml's library computes it where its compiler does not fuse a product with a sum: on x86-64, whatever the machine.
"""

# R: a run of rows, I: input channels, G: groups of a row, N: blocks, S: columns of a block, B: bytes.

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from shardxform.base.tensors import BLOCKS
from shardxform.formats.scheme import Grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]

__all__ = ["decoded", "of_codes", "overflowing", "rounded"]

_HALF: Final = 2  # bytes of a float16


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
    codes_RBS = codes_RI.reshape(rows, -1, 32)
    out = np.empty((rows, columns // 32, _HALF + (16 if type_name == "Q4_0" else 32)), np.uint8)
    out[..., :_HALF] = half_RG[:, group_of_block, None].astype("<u2").view(np.uint8)
    if type_name == "Q4_0":
        out[..., _HALF:] = _nibbles(codes_RBS)
    else:
        np.subtract(codes_RBS, np.uint8(grid.zero_code), out=out[..., _HALF:])  # two's complement
    return out.reshape(rows, -1)


def overflowing(blocks_RB: Bytes, type_name: str) -> tuple[int, ...]:
    """Row and block of the first scale that is infinite in float16; empty when none is."""
    blocks_RNB = blocks_RB.reshape(len(blocks_RB), -1, BLOCKS[type_name][1])
    for at in _SCALES[type_name]:
        magnitude = blocks_RNB[..., at + 1] & 0x7F
        if (magnitude >= 0x7C).any():
            row, block = np.argwhere(magnitude >= 0x7C)[0]
            return int(row), int(block)
    return ()


def rounded(values_RI: Floats, type_name: str) -> Bytes:
    """Blocks of values, which are finite, by ggml's rule: uint8 [R, bytes of a row]."""
    rows = len(values_RI)
    columns = BLOCKS[type_name][0]
    with np.errstate(all="ignore"):  # scales may be zero, or overflow, as in C
        blocks_NB = _RULES[type_name](values_RI.reshape(-1, columns))
    return blocks_NB.reshape(rows, -1)


def decoded(blocks_RB: Bytes, type_name: str) -> Floats:
    """Values of blocks, float32 [R, I]."""
    rows = len(blocks_RB)
    blocks_NB = blocks_RB.reshape(-1, BLOCKS[type_name][1])
    with np.errstate(all="ignore"):  # scales may be no numbers
        return _DECODED[type_name](blocks_NB).reshape(rows, -1)


# N: blocks of all rows. What follows takes values [N, S] to bytes [N, B], or these to values.


def _half(values: Floats) -> Bytes:
    """float16 bytes [N, 2] of numbers [N]."""
    return values.astype("<f2")[:, None].view(np.uint8)


def _halves(blocks_NB: Bytes, at: int = 0) -> Floats:
    """Numbers [N, 1] of float16 bytes."""
    return np.ascontiguousarray(blocks_NB[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(codes: Bytes) -> Bytes:
    """[..., 32] codes of 4 bits -> [..., 16]: those of the first half below those of the second."""
    return codes[..., :16] | (codes[..., 16:] << np.uint8(4))


def _inverse(d: Floats) -> Floats:
    """1 / d, and 0 of 0."""
    return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _truncated(x: Floats) -> Bytes:
    """(int8_t) of floats, as x86 has it for those that are no such integer."""
    return np.where(np.abs(x) < 2.0**31, x, np.float32(0)).astype(np.int32).astype(np.int8).view(np.uint8)


def _at_most(codes: Bytes, most: int) -> Bytes:
    """Signed bytes, but `most` for larger ones."""
    return np.minimum(codes.view(np.int8), np.int8(most)).view(np.uint8)


def _extreme(values_NS: Floats) -> Floats:
    """Value of the largest magnitude in each block, the first of equals."""
    at = np.abs(values_NS).argmax(axis=1)
    return np.take_along_axis(values_NS, at[:, None], axis=1)[:, 0] + np.float32(0)  # of zeros, the positive one


def _to_q4_0(values_NS: Floats) -> Bytes:
    d = _extreme(values_NS) / np.float32(-8)
    codes = _truncated(values_NS * _inverse(d)[:, None] + np.float32(8.5))
    return np.concatenate((_half(d), _nibbles(_at_most(codes, 15))), axis=1)


def _to_q8_0(values_NS: Floats) -> Bytes:
    d = np.abs(values_NS).max(axis=1) / np.float32(127)
    return np.concatenate((_half(d), _truncated(_away(values_NS * _inverse(d)[:, None]))), axis=1)


def _away(x: Floats) -> Floats:
    """C's roundf: to nearest, halves away from zero."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= np.float32(0.5), np.copysign(np.float32(1), x), np.float32(0))


def _of_q4_0(blocks_NB: Bytes) -> Floats:
    codes = blocks_NB[:, _HALF:]
    return (np.concatenate((codes & 15, codes >> 4), axis=1).astype(np.float32) - np.float32(8)) * _halves(blocks_NB)


def _of_q8_0(blocks_NB: Bytes) -> Floats:
    return blocks_NB[:, _HALF:].view(np.int8).astype(np.float32) * _halves(blocks_NB)


_RULES: Final[dict[str, Callable[[Floats], Bytes]]] = {"Q4_0": _to_q4_0, "Q8_0": _to_q8_0}
_DECODED: Final[dict[str, Callable[[Bytes], Floats]]] = {"Q4_0": _of_q4_0, "Q8_0": _of_q8_0}
_SCALES: Final[dict[str, tuple[int, ...]]] = {"Q4_0": (0,), "Q8_0": (0,)}
"""Where in a block its float16 scales are."""
