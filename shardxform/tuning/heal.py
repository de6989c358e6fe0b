"""Healing one block: its 16-bit weights moved until its output resembles that of the block before it was pruned.

The rule is that of the rounding offsets: the sign of the gradient, applied in place as it arrives, and a step that
falls to zero; for 16-bit weights the step is relative to the root mean square of their matrix. Held-out samples, never
tuned on, choose among trials and decide whether the block is changed at all. Reads samples a batch at a time; no files.
"""

# N: samples, B: samples of a batch, T: positions, H: hidden size.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardxform.base.constants import FULL_STEP, SMALLEST_STEP, TOKENS_PER_WEIGHT
from shardxform.tuning.healed import HealedStack, signs
from shardxform.tuning.samples import Forward, Judged, Loss, NonFiniteLoss, Samples, batches, descend, judge, split

if TYPE_CHECKING:
    from shardxform.ask.recipe import Heal, Trial

__all__ = ["HealResult", "Healing", "Load", "Wide", "heal_block", "suggested_lr"]


class Wide:
    """A parameter outside the experts that is healed: float32 here, and in the module in the type of its products."""

    def __init__(self, parameter: torch.nn.Parameter, stored: torch.Tensor) -> None:
        """Begin to move `parameter`, whose values are `stored`."""
        self.parameter = parameter
        self.lr = 0.0
        self.exact = stored.float().clone()
        self._rms = self.exact.square().mean().sqrt()
        self._dtype = stored.dtype
        parameter.requires_grad_(True)
        self._hook: Any = parameter.register_post_accumulate_grad_hook(self._step)  # type: ignore[no-untyped-call]

    @property
    def stored(self) -> torch.Tensor:
        """The values in the type that they are stored in."""
        return self.exact.to(self._dtype)

    def settle(self) -> None:
        """Stop moving, with the values that will be stored."""
        self._hook.remove()
        self.parameter.requires_grad_(False)
        self.parameter.copy_(self.stored)

    @torch.no_grad()
    def _step(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self.exact.sub_(signs(gradient) * (self.lr * self._rms))
        parameter.copy_(self.exact)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Healing:
    """A block whose weights are in place and can move.

    Attributes:
        forward: runs it.
        wide: by local name, what moves outside the experts.
        stacks: the experts' weights, whether they move or not.
    """

    forward: Forward
    wide: Mapping[str, Wide]
    stacks: tuple[HealedStack, ...]

    @property
    def weights(self) -> int:
        """Number of weights that move."""
        inside = sum(math.prod(stack.shape) for stack in self.stacks if stack.moves)
        return inside + sum(wide.exact.numel() for wide in self.wide.values())

    def set_lr(self, lr: float) -> None:
        """Say how far a step moves from now on."""
        for wide in self.wide.values():
            wide.lr = lr
        for stack in self.stacks:
            stack.lr = lr

    @torch.no_grad()
    def settle(self) -> None:
        """Stop moving; from now on the block computes with what will be stored."""
        for wide in self.wide.values():
            wide.settle()
        for stack in self.stacks:
            stack.settle()


Load = Callable[[str | None], Healing]
"""Loads the block anew as it was pruned, with its weights of `recipe.HEALED[...]` ready to move, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealResult:
    """What became of a block.

    Attributes:
        start_loss: squared error of the pruned block's output relative to the original's, the mean over the tokens of
            the held-out samples.
        loss: of what was kept; the same when nothing was better.
        judged: what the held-out samples were.
        ratio_error: standard error of loss / start_loss over them; NaN for a single one.
        what, lr: how it was healed; None and 0 when it stays as it was pruned.
        tried: the trials, each with its step size and its loss; empty when there was one.
        diverged: whether the loss was no number at any time.
    """

    start_loss: float
    loss: float
    judged: Judged
    ratio_error: float
    what: str | None
    lr: float
    tried: tuple[tuple[str, float, float], ...]
    diverged: bool


def heal_block(
    load: Load, samples: Samples, heal: Heal, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[HealResult, Healing]:
    """Heal a block, unless nothing is better on the held-out samples than leaving it as it was pruned.

    Args:
        load: makes the block ready; called for every trial.
        samples: inputs in the pruned chain, targets of the block before pruning in the original chain.
        heal: what to do.
        seed: of the choice of held-out samples, and with the block's number of the order of the others.
        dtype: of the hidden states, and so of the products.

    Returns:
        what became of it, and the block, settled.

    Raises:
        NonFiniteLoss: the pruned block itself puts out no numbers.

    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of torch's own may depend on the number of threads
    try:
        return _Run(load, samples, heal, seed, dtype).execute()
    finally:
        torch.set_num_threads(threads)


class _Run:
    """One block being healed."""

    def __init__(self, load: Load, samples: Samples, heal: Heal, seed: int, dtype: torch.dtype) -> None:
        self._load, self._samples, self._heal, self._seed, self._dtype = load, samples, heal, seed, dtype
        self._split = split(samples, seed)
        self._diverged = False
        self._ratio_error = math.nan  # of the last descent

    def execute(self) -> tuple[HealResult, Healing]:
        trials, tried = self._heal.trials, []
        start = math.nan
        for trial in trials if len(trials) > 1 else ():
            start, loss, lr = self._descend(trial, self._heal.probe_iters)[:3]  # the block is let go of: it is large
            tried.append((trial.what, lr, loss))
        best = min(range(len(tried)), key=lambda i: tried[i][2], default=0)
        healing, loss, lr = None, math.inf, 0.0
        if not tried or tried[best][2] < start:
            start, loss, lr, healing = self._descend(trials[best], self._heal.iters)
        healed = loss < start
        if not healed or healing is None:
            healing = None  # let go of before the block is loaded again
            healing = self._load(None)
            healing.settle()
        result = HealResult(
            start_loss=start,
            loss=loss if healed else start,
            judged=self._split.judged(self._samples),
            ratio_error=self._ratio_error if healed else 0.0,
            what=trials[best].what if healed else None,
            lr=lr if healed else 0.0,
            tried=tuple((what, rate, loss if math.isfinite(loss) else -1.0) for what, rate, loss in tried),
            diverged=self._diverged,
        )
        return result, healing

    def _descend(self, trial: Trial, iters: int) -> tuple[float, float, float, Healing]:
        """Loss before and after, the step size, and the block; infinite when the loss was no number on the way."""
        healing = self._load(trial.what)
        start = self._judge(healing)
        learned_N = self._split.learned_N
        tokens = len(learned_N) * self._samples.hidden_NTH.shape[1]
        lr = trial.lr or trial.factor * suggested_lr(tokens, healing.weights)
        random = np.random.Generator(np.random.PCG64([self._seed, self._samples.block]))
        rows = batches(len(learned_N), self._heal.batch_size, random)
        try:
            for done in range(iters):
                healing.set_lr(lr * (1 - done / iters))
                descend(healing.forward, self._samples, learned_N[next(rows)], self._dtype)
            healing.settle()
            loss = self._judge(healing)
            self._ratio_error = loss.ratio_error(start)
            return start.mean, loss.mean, lr, healing
        except NonFiniteLoss:
            self._diverged = True
            healing.settle()
            return start.mean, math.inf, lr, healing

    def _judge(self, healing: Healing) -> Loss:
        return judge(healing.forward, self._samples, self._split.judges_N, self._heal.batch_size, self._dtype)


def suggested_lr(tokens: int, weights: int) -> float:
    """A first step size that fits the amount of data: the fewer tokens a weight has, the less it should move.

    Measured on examples/small-moe, as docs/healing.md tells: 0.02 at 0.04 tokens a weight, 0.005 at 0.0026.
    """
    return max(SMALLEST_STEP, FULL_STEP * min(1.0, math.sqrt(tokens / weights / TOKENS_PER_WEIGHT)))
