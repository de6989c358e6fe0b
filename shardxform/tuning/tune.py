"""Tuning one block: signed gradient descent on rounding offsets and clips until its output resembles the original's.

The loop, the batches, the loss and the choice of the best; the numbers are made elsewhere. The same inputs, seed and
options give the same codes whatever the number of threads. Reads samples a batch at a time, so they may be mapped from
a file. Starts from plain rounding and never ends with anything that is worse on the samples it is judged by.
"""

# N: samples, B: samples of a batch, T: positions, H: hidden size.

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from shardxform.errors import ExecutionError, SchemeError
from shardxform.tuning.elementwise import ONE, UNITS_PER_STEP, Pace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardxform.tuning.block import TunedBlock

__all__ = ["BlockResult", "NonFiniteLoss", "Samples", "TuneOptions", "tune_block"]

Forward = Callable[[torch.Tensor, "NDArray[np.int64]"], torch.Tensor]
"""(hidden_BTD, sample numbers) -> hidden_BTD: the tuned layer, with the masks and rotary inputs of those samples."""

_JUDGED_AT: Final = (0.8, 0.9, 1.0)
_LEAST_SQUARE: Final = 1e-12


class NonFiniteLoss(ExecutionError):
    """The loss of a block is NaN or infinite: its activations overflow, or its inputs were not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """What to do; everything here changes the result.

    Attributes:
        seed: of the order of samples, together with the block's number.
        iters: steps.
        batch_size: samples of a step.
        judges: samples, fixed at the start, on which states are compared.
        offset_rate: first step of the offsets in scales; 1 / iters if None. Falls to zero linearly.
        clip_rate: first step of the clips as a factor; 1 / iters if None. Likewise.
        clip_range: smallest and largest clip.
        dtype: type of the hidden states, and so of the products.
    """

    seed: int
    iters: int = 200
    batch_size: int = 8
    judges: int = 8
    offset_rate: float | None = None
    clip_rate: float | None = None
    clip_range: tuple[float, float] = (0.0, 1.2)
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("iters", "batch_size", "judges"):
            if getattr(self, name) < 1:
                raise SchemeError(f"{name}: expected at least 1, found {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """What a block is tuned on.

    Attributes:
        block: number of the block.
        hidden_NTH: its inputs in the quantized chain: float32, or uint16 bits of BF16; may be mapped from a file.
        target_NTH: outputs of the 16-bit block in the 16-bit chain, likewise.
        length_N: valid positions of each sample; the last valid one predicts nothing and is left out with the padding.
    """

    block: int
    hidden_NTH: NDArray[Any]
    target_NTH: NDArray[Any]
    length_N: NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = self.hidden_NTH.shape
        if len(shape) != 3 or self.target_NTH.shape != shape or self.length_N.shape != shape[:1] or not shape[0]:
            found = f"{list(shape)}, {list(self.target_NTH.shape)} and {list(self.length_N.shape)}"
            raise SchemeError(f"samples: expected hidden and target [N, T, H] and length [N], found {found}")
        if self.length_N.min() < 2 or self.length_N.max() > shape[1]:
            found = f"{self.length_N.min()} to {self.length_N.max()}"
            raise SchemeError(f"samples: expected lengths of 2 to {shape[1]} positions, found {found}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """What became of a block.

    Attributes:
        start_loss: squared error of the block's output relative to the original's, the mean over the tokens of the
            judges, as it began.
        loss: of what was kept.
        iteration: after how many steps that was; 0 if nothing was better than the start.
        iterations: steps done.
        unreached: by local name, experts that no token ever reached: they stay as they began.
        seconds: time it took.
    """

    start_loss: float
    loss: float
    iteration: int
    iterations: int
    unreached: dict[str, list[int]]
    seconds: float


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
    began = time.monotonic()
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
    seconds = time.monotonic() - began
    return BlockResult(
        start_loss=start,
        loss=best,
        iteration=at,
        iterations=options.iters,
        unreached=block.unreached,
        seconds=seconds,
    )


def _descend(block: TunedBlock, forward: Forward, samples: Samples, options: TuneOptions) -> tuple[float, float, int]:
    """Loss at the start, loss of the best, and the step after which it was kept."""
    random = np.random.Generator(np.random.PCG64([options.seed, samples.block]))
    judges_N = np.sort(random.permutation(len(samples.length_N))[: options.judges])
    judged_at = {max(1, round(part * options.iters)) for part in _JUDGED_AT}
    start = best = _judge(forward, samples, options, judges_N)
    kept_at, batches = 0, _batches(len(samples.length_N), options.batch_size, random)
    for done, pace in enumerate(_paces(options), start=1):
        block.set_pace(pace)
        _step(forward, samples, options, next(batches))
        if done in judged_at:
            loss = _judge(forward, samples, options, judges_N)
            if loss < best:
                block.keep()
                best, kept_at = loss, done
    return start, best, kept_at


def _paces(options: TuneOptions) -> Iterator[Pace]:
    """The step of every iteration; those of the offsets are rounded to their unit so that the sum is not."""
    rate = 1 / options.iters
    offset_rate = rate if options.offset_rate is None else options.offset_rate
    clip_rate = rate if options.clip_rate is None else options.clip_rate
    unit, walked, steps = UNITS_PER_STEP / ONE, 0.0, 0
    for done in range(options.iters):
        left = 1 - done / options.iters
        walked += offset_rate * left
        size = round(walked / unit) - steps
        steps += size
        yield Pace(float(size * UNITS_PER_STEP), float(np.float32(clip_rate * left)), *options.clip_range)


def _batches(samples: int, size: int, random: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Sample numbers of one batch after the other; no sample twice before (almost) all came once."""
    size = min(size, samples)
    while True:
        order_N = random.permutation(samples)
        for first in range(0, samples - size + 1, size):
            yield np.sort(order_N[first : first + size])


@torch.enable_grad()
def _step(forward: Forward, samples: Samples, options: TuneOptions, rows_B: NDArray[np.int64]) -> None:
    """One forward and one backward pass; the weights move during the latter."""
    out_BTH = forward(_tensor(samples.hidden_NTH, rows_B).to(options.dtype), rows_B)
    error_BTH, weight_BT1 = _errors(out_BTH.detach(), samples, rows_B)
    _finite(_sum(error_BTH, weight_BT1), samples)
    # The derivative of the loss but for a factor, which signs do not see.
    out_BTH.backward((error_BTH * weight_BT1).to(out_BTH.dtype))  # type: ignore[no-untyped-call]


@torch.no_grad()
def _judge(forward: Forward, samples: Samples, options: TuneOptions, judges_N: NDArray[np.int64]) -> float:
    """Mean relative squared error over the valid positions of the judges."""
    total, values = 0.0, 0
    for first in range(0, len(judges_N), options.batch_size):
        rows_B = judges_N[first : first + options.batch_size]
        out_BTH = forward(_tensor(samples.hidden_NTH, rows_B).to(options.dtype), rows_B)
        total += _sum(*_errors(out_BTH, samples, rows_B))
        values += int((samples.length_N[rows_B] - 1).sum()) * out_BTH.shape[-1]
    return _finite(total / values, samples)


def _sum(error_BTH: torch.Tensor, weight_BT1: torch.Tensor) -> float:
    return float((error_BTH.square().sum(-1, dtype=torch.float64) * weight_BT1[..., 0]).sum())


def _errors(out_BTH: torch.Tensor, samples: Samples, rows_B: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences to the target, zero at padding and at each sample's last position; what their squares count for.

    A token's error is relative to the size of its target: what reads a block's output normalises it first, and a plain
    mean square would care for the few tokens of huge activations alone.
    """
    target_BTH = _tensor(samples.target_NTH, rows_B).to(out_BTH.device)
    length_B1 = torch.from_numpy(samples.length_N[rows_B]).to(out_BTH.device)[:, None]
    counts_BT = torch.arange(out_BTH.shape[1], device=out_BTH.device) < length_B1 - 1
    error_BTH = torch.where(counts_BT[..., None], out_BTH.float() - target_BTH, 0.0)
    square_BT1 = target_BTH.square().mean(-1, keepdim=True).clamp(min=_LEAST_SQUARE)
    return error_BTH, torch.where(counts_BT[..., None], 1 / square_BT1, 0.0)


def _tensor(values_NTH: NDArray[Any], rows_B: NDArray[np.int64]) -> torch.Tensor:
    """Some samples as float32."""
    rows = torch.from_numpy(np.ascontiguousarray(values_NTH[rows_B]))
    return rows.view(torch.bfloat16).float() if rows.dtype == torch.uint16 else rows


def _finite(loss: float, samples: Samples) -> float:
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"block {samples.block}: expected a finite loss, found {loss}")
    return loss
