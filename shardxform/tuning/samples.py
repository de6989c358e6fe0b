"""What a block is tuned on, and how far its output is from what it should be.

Reads samples a batch at a time, so they may lie in a file. The loss is relative to each token; one definition for
rounding and healing. Holds no weight and changes none, but for the backward pass that `descend` starts.
"""

# N: samples, B: samples of a batch, T: positions, H: hidden size.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from shardxform.ask.recipe import split_windows
from shardxform.base.constants import LEAST_SQUARE
from shardxform.base.standard_errors import Sampling, standard_error
from shardxform.errors import ExecutionError, SchemeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Forward",
    "Judged",
    "Loss",
    "NonFiniteLoss",
    "Samples",
    "Split",
    "choose_judges",
    "descend",
    "judge",
    "learning_order",
    "rows_as_float",
]

Forward = Callable[[torch.Tensor], torch.Tensor]
"""hidden_BTH -> hidden_BTH: the tuned layer."""


class NonFiniteLoss(ExecutionError):
    """The loss of a block is NaN or infinite: its activations overflow, or its inputs were not finite."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """What a block is tuned on; the last position of each sample predicts nothing and is left out of every loss.

    Attributes:
        block: number of the block.
        hidden_NTH: its inputs in the quantized chain: float32, or uint16 bits of BF16; may be mapped from a file.
        target_NTH: outputs of the 16-bit block in the 16-bit chain, likewise.
        extra: how many of them, the last ones, are not of the text: healing learns from them, and none judges.
    """

    block: int
    hidden_NTH: NDArray[np.generic]
    target_NTH: NDArray[np.generic]
    extra: int = 0

    def __post_init__(self) -> None:
        shape = self.hidden_NTH.shape
        if len(shape) != 3 or self.target_NTH.shape != shape or not shape[0] or shape[1] < 2:
            found = f"{list(shape)} and {list(self.target_NTH.shape)}"
            raise SchemeError(f"samples: expected hidden and target [N, T, H] of at least 2 positions, found {found}")

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.hidden_NTH.shape[0])

    @property
    def counted(self) -> int:
        """Positions of each sample that a loss is taken over."""
        return int(self.hidden_NTH.shape[1]) - 1


@dataclass(frozen=True, slots=True)
class Judged:
    """What a block was judged on.

    Attributes:
        windows, tokens: how many; the last token of a window does not count.
        held_out: whether none of it was learned from: only a single window is both.
    """

    windows: int
    tokens: int
    held_out: bool


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Numbers of the samples that a block learns from, and of those that judge it, each in order."""

    learned_N: NDArray[np.int64]
    judges_N: NDArray[np.int64]

    def judged(self, samples: Samples) -> Judged:
        """What the judges are."""
        held_out = np.intersect1d(self.learned_N, self.judges_N).size == 0
        return Judged(len(self.judges_N), len(self.judges_N) * samples.counted, held_out)


def choose_judges(samples: Samples, seed: int) -> Split:
    """Choose the judges: `recipe.held_out` of the samples, the same for every block, healed or tuned.

    What enters a block comes from the blocks before it, which were fitted to the samples that they learned from: judges
    that differed from block to block would have been seen. A single sample is learned from and judges. Samples that are
    not of the text are in neither.
    """
    return Split(*(np.array(rows, np.int64) for rows in split_windows(samples.count - samples.extra, seed)))


def learning_order(samples: int, size: int, random: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Sample numbers of one batch after the other; no sample twice before (almost) all came once."""
    size = min(size, samples)
    while True:
        order_N = random.permutation(samples)
        for first in range(0, samples - size + 1, size):
            yield np.sort(order_N[first : first + size])


@torch.enable_grad()
def descend(forward: Forward, samples: Samples, rows_B: NDArray[np.int64], dtype: torch.dtype) -> None:
    """One forward and one backward pass; the weights move during the latter.

    Raises:
        NonFiniteLoss: before anything moved.

    """
    out_BTH = forward(rows_as_float(samples.hidden_NTH, rows_B).to(dtype))
    error_BTH, weight_BT1 = _errors(out_BTH.detach(), samples, rows_B)
    _finite(_sum(error_BTH, weight_BT1), samples)
    # The derivative of the loss but for a factor, which signs do not see.
    gradient_BTH = error_BTH.mul_(weight_BT1).to(out_BTH.dtype)
    del error_BTH, weight_BT1
    out_BTH.backward(gradient_BTH)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Loss:
    """Relative squared errors of some samples, summed for each, and the number of values that they are of."""

    sums: tuple[float, ...]
    values: int

    @property
    def mean(self) -> float:
        """Over all values."""
        return math.fsum(self.sums) / self.values

    def ratio_error(self, start: Loss) -> float:
        """Standard error of this loss relative to `start`, on the same samples; NaN for a single one."""
        every = Sampling((range(len(self.sums)),), joined=True)
        return standard_error(self.sums, start.sums, every) if start.mean else math.nan


@torch.no_grad()
def judge(forward: Forward, samples: Samples, rows_N: NDArray[np.int64], batch_size: int, dtype: torch.dtype) -> Loss:
    """Relative squared errors of some samples.

    Raises:
        NonFiniteLoss: it is no number.

    """
    sums, values = list[float](), 0
    for first in range(0, len(rows_N), batch_size):
        rows_B = rows_N[first : first + batch_size]
        out_BTH = forward(rows_as_float(samples.hidden_NTH, rows_B).to(dtype))
        sums += _sums(*_errors(out_BTH, samples, rows_B)).tolist()
        values += len(rows_B) * samples.counted * out_BTH.shape[-1]
    loss = Loss(tuple(sums), values)
    _finite(loss.mean, samples)
    return loss


def _sum(error_BTH: torch.Tensor, weight_BT1: torch.Tensor) -> float:
    return float(_sums(error_BTH, weight_BT1).sum())


def _sums(error_BTH: torch.Tensor, weight_BT1: torch.Tensor) -> torch.Tensor:
    """[B], float64."""
    return (error_BTH.square().sum(-1, dtype=torch.float64) * weight_BT1[..., 0]).sum(-1)


def _errors(out_BTH: torch.Tensor, samples: Samples, rows_B: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences to the target, zero at each sample's last position; what their squares count for.

    A token's error is relative to the size of its target: what reads a block's output normalises it first, and a plain
    mean square would care for the few tokens of huge activations alone.
    """
    target_BTH = rows_as_float(samples.target_NTH, rows_B).to(out_BTH.device)
    error_BTH = out_BTH.float() - target_BTH
    weight_BT1 = 1 / target_BTH.square().mean(-1, keepdim=True).clamp(min=LEAST_SQUARE)
    error_BTH[:, -1] = weight_BT1[:, -1] = 0
    return error_BTH, weight_BT1


def rows_as_float(values_NTH: NDArray[np.generic], rows_B: NDArray[np.int64]) -> torch.Tensor:
    """Give some samples [B, T, H] as float32."""
    rows = torch.from_numpy(np.ascontiguousarray(values_NTH[rows_B]))
    return rows.view(torch.bfloat16).float() if rows.dtype == torch.uint16 else rows


def _finite(loss: float, samples: Samples) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"block {samples.block}: expected a finite loss, found {loss}")
