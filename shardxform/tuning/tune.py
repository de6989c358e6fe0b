"""Tuning one block: signed gradient descent on rounding offsets and clips until its output resembles the original's.

The loop, the batches, the loss and the choice of the best; the numbers are made elsewhere. The same inputs, seed and
options give the same codes whatever the number of threads. Reads samples a batch at a time, so they may be mapped from
a file. Starts from plain rounding and never ends with anything that is worse on the samples it is judged by, which it
is not tuned on.
"""

# N: samples, B: samples of a batch, T: positions, H: hidden size.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from shardxform.base.constants import CLIP_RANGE, JUDGED_AT
from shardxform.errors import SchemeError
from shardxform.tuning.elementwise import ONE, UNITS_PER_STEP, Pace
from shardxform.tuning.samples import Forward, Judged, Loss, NonFiniteLoss, Samples, batches, descend, judge, split

if TYPE_CHECKING:
    from shardxform.tuning.block import TunedBlock

__all__ = ["BlockResult", "TuneOptions", "tune_block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """What to do; everything here changes the result.

    Attributes:
        seed: of the choice of the samples that judge, and with the block's number of the order of the others.
        iters: steps.
        batch_size: samples of a step.
        dtype: type of the hidden states, and so of the products.
    """

    seed: int
    iters: int = 200
    batch_size: int = 8
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("iters", "batch_size"):
            if getattr(self, name) < 1:
                raise SchemeError(f"{name}: expected at least 1, found {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """What became of a block.

    Attributes:
        start_loss: squared error of the block's output relative to the original's, the mean over the tokens of the
            judges, as it began.
        loss: of what was kept.
        judged: what the judges were.
        ratio_error: standard error of loss / start_loss over the judges; NaN for a single one.
        iteration: after how many steps that was; 0 if nothing was better than the start.
        unreached: by local name, experts that no token ever reached: they stay as they began.
    """

    start_loss: float
    loss: float
    judged: Judged
    ratio_error: float
    iteration: int
    unreached: dict[str, list[int]]


def tune_block(block: TunedBlock, forward: Forward, samples: Samples, options: TuneOptions) -> BlockResult:
    """Tune, keep the best, and leave the block settled on it.

    Args:
        block: as `install` made it.
        forward: runs its layer.
        samples: inputs and targets.
        options: what to do.

    Raises:
        NonFiniteLoss: the loss is NaN or infinite at any time; the block is left at its start.

    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is not tuned is torch's own, and its sums may depend on the number of threads
    block.restart()
    try:
        start, best, at = _descend(block, forward, samples, options)
    except NonFiniteLoss:
        block.restart()
        raise
    finally:
        torch.set_num_threads(threads)
        block.settle()
    return BlockResult(
        start_loss=start.mean,
        loss=best.mean,
        ratio_error=best.ratio_error(start),
        judged=split(samples, options.seed).judged(samples),
        iteration=at,
        unreached=block.unreached,
    )


def _descend(block: TunedBlock, forward: Forward, samples: Samples, options: TuneOptions) -> tuple[Loss, Loss, int]:
    """Loss at the start, loss of the best, and the step after which it was kept."""
    random = np.random.Generator(np.random.PCG64([options.seed, samples.block]))
    apart = split(samples, options.seed)
    judged_at = {max(1, round(part * options.iters)) for part in JUDGED_AT}
    start = best = judge(forward, samples, apart.judges_N, options.batch_size, options.dtype)
    kept_at, rows = 0, batches(len(apart.learned_N), options.batch_size, random)
    for done, pace in enumerate(_paces(options), start=1):
        block.set_pace(pace)
        descend(forward, samples, apart.learned_N[next(rows)], options.dtype)
        if done in judged_at:
            loss = judge(forward, samples, apart.judges_N, options.batch_size, options.dtype)
            if loss.mean < best.mean:
                block.keep()
                best, kept_at = loss, done
    return start, best, kept_at


def _paces(options: TuneOptions) -> Iterator[Pace]:
    """The step of every iteration: 1 / iters of a scale and of a clip at first, falling to zero linearly.

    Those of the offsets are rounded to their unit so that the sum is not.
    """
    rate = 1 / options.iters
    unit, walked, steps = UNITS_PER_STEP / ONE, 0.0, 0
    for done in range(options.iters):
        left = 1 - done / options.iters
        walked += rate * left
        size = round(walked / unit) - steps
        steps += size
        yield Pace(float(size * UNITS_PER_STEP), float(np.float32(rate * left)), *CLIP_RANGE)
