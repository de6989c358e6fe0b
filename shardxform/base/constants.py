"""Constants that decide bytes: of what is healed and tuned, and of scores. In one place, for a record to name them.

No setting asks for them and no input shows them, so work of a version that has others must not be gone on with. Some
say what is computed. Others say how much goes through one product at a time, and a product of another shape may differ
in its last bits. Imports nothing.
"""

from __future__ import annotations

from typing import Final

__all__ = ["constants"]

# -- what is computed -------------------------------------------------------------------------------------------------

HELD_OUT: Final = 8
"""One of so many windows judges a block and is not learned from."""

JUDGES: Final = 7
"""Tells the choice of the windows that judge, which the seed makes, from the order of the others."""

JUDGED_AT: Final = (0.8, 0.9, 1.0)
"""Shares of the steps of tuning after which the state is judged."""

CLIP_RANGE: Final = (0.0, 1.2)
"""Smallest and largest clip of a tuned scale."""

CLIP_STEP: Final = 0.25
"""The first step of a clip is so much of that of an offset, where none is asked for."""

LEAST_SQUARE: Final = 1e-12
"""Smallest mean square that a token's error is relative to."""

OFFSET_UNITS: Final = 1 << 15
"""A tuned offset is a multiple of one part in so many of a scale."""

OFFSET_STEP: Final = 4
"""Units that an offset moves by."""

SEARCH_MARGIN: Final = 1.0 - 2.0**-15
"""How much better a searched scale must be. Float32 sums of 128 squares err by at most 128 * 2^-24 = 2^-17 each way."""

EXTRA: Final = 11
"""Tells the windows that healing has made up, which the seed makes, from every other choice."""

PIECE: Final = (4, 16)
"""Tokens of a piece of text in a window that is made up: at least, and below."""

REPLACED: Final = 0.5
"""Share of the tokens of such a window that are drawn from the whole vocabulary."""

STEP: Final = 3.0
SMALLEST_STEP: Final = 1e-3
LARGEST_STEP: Final = 0.16
"""The first step of healing is so much times the square root of the tokens that come to the expert of a token, on the
mean, for each weight of the block and each step; between the smallest and the largest."""

WORSE_ERRORS: Final = 2.0
WORSE_PART: Final = 0.05
"""A healed block is dropped where the windows that judge are worse for it by so many standard errors, or by such a
part. What they say of less is chance, and healing is the better guess."""

SHORTER: Final = 4
"""A block that a step which was not given leaves worse is healed once more with one of so many parts of it."""

PACE_STEPS: Final = 10
"""Steps that show what healing a block takes and gives, where a time is given to all of them."""

MOST_WEIGHT: Final = 4.0
"""A block gets at most so many times the time of a usual one, and at least the inverse."""

MERGE_TOKENS: Final = 2048
"""Tokens by which pruned experts are merged into those that stay."""

MERGED_SHARES: Final = (1.0, 0.5, 0.25, 0.125)
"""How far an expert goes to the mean of its group: as far as held-out windows say, of these, or not at all."""

LARGEST_GROUP: Final = 16
"""Experts that become one, at most, as REAM has it."""

# -- how much at a time -----------------------------------------------------------------------------------------------

BATCH_TOKENS: Final = 2048
"""Tokens that go through a block at once where nothing is learned; whole windows, at least one."""

MERGE_TILE: Final = 1 << 28
"""Bytes of the outputs of experts that stay which pruned ones are held against."""

MERGED_AT_ONCE: Final = 16
"""Pruned experts whose outputs are held against these in one product."""

STORED_TOKENS: Final = 4096
"""Of a step whose attention is kept until the backward pass, rather than made again: with blocks of Qwen3.5-35B-A3B, in
bfloat16, a sixth less time and no more memory at 8 x 512; at 8 x 2,048 a tenth less, for half a gigabyte more."""

KEPT_BYTES: Final = 1 << 25
"""What the first products of all experts may take until the backward pass, which makes larger ones again: at the shape
of Qwen3.5-35B-A3B those of 2,048 tokens in 16 bits."""

LINEAR_ROWS: Final = 256
"""Rows of a linear layer's weight, or of its gradient, that exist at a time in one thread: what a core's own cache
holds."""

LINEAR_TOKENS: Final = 256
"""Tokens whose gradient a thread makes at a time."""

EXPERT_ROWS: Final = 1024
"""Rows of the gradient of an expert's weight that exist at a time in one thread: few products of many rows take less
time than many of few, and an expert's are too few tokens for a tile to stay in a core's own cache."""

GROUPED_WEIGHTS: Final = 1 << 26
"""Weights of experts that a device multiplies in one call."""

DELTA_CHUNK: Final = 64
"""Positions of a chunk of the gated delta rule."""

HEADS_BYTES: Final = 1 << 19
"""Of a linear attention's values as they are computed with, at a time. From 32 MB on, glibc asks the system for each
tensor anew, and every page of it costs: at 2,048 positions of Qwen3.5-35B-A3B that was a third of the time. Smaller
windows take less memory, which every thread needs; a single key head is the smallest."""

DEVICE_HEADS_BYTES: Final = 1 << 26
"""The same on other devices, which are asked for each operation and want more work at a time."""

LANES: Final = 32
"""Sums that compiled kernels keep side by side."""


def constants() -> dict[str, int | float | list[float]]:
    """Return all of them by name, as JSON can hold them."""
    return {
        name.lower(): list(value) if isinstance(value, tuple) else value
        for name, value in globals().items()
        if name.isupper()
    }
