"""Healing one block: its 16-bit weights moved until its output resembles that of the block before it was pruned.

The rule is that of the rounding offsets: the sign of the gradient, applied in place as it arrives, and a step that
falls to zero; for 16-bit weights the step is relative to the root mean square of their matrix. Held-out samples, never
tuned on, decide whether the block is changed at all, or is healed in another way. Where the block comes from is for
`healer` to say.
"""

# E: experts, O: output rows of one, I: input columns, R: any run of the E * O rows, N: samples, B: samples of a batch,
# T: positions, H: hidden size.

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardxform.ask.recipe import Heal, Trial
from shardxform.base.constants import LARGEST_STEP, PACE_STEPS, SMALLEST_STEP, STEP, WORSE_ERRORS, WORSE_PART
from shardxform.tuning.samples import (
    Forward,
    Judged,
    Loss,
    NonFiniteLoss,
    Samples,
    choose_judges,
    descend,
    judge,
    learning_order,
)
from shardxform.tuning.schedule import BlockPace
from shardxform.tuning.workers import one_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "HealResult",
    "HealedStack",
    "Load",
    "Moving",
    "MovingBlock",
    "Wide",
    "heal_block",
    "judge_start",
    "pace_of_block",
    "signs",
    "suggested_lr",
]


class Moving:
    """Values [R, I] that can be read and moved; bfloat16 ones stay in the tensor they came in."""

    def __init__(self, w_RI: torch.Tensor) -> None:
        self._split = w_RI.dtype == torch.bfloat16
        self._w_RI = w_RI if self._split else w_RI.float()
        self._low_RI = torch.zeros(w_RI.shape, dtype=torch.int8, device=w_RI.device) if self._split else None
        self._compiled = w_RI.device.type == "cpu" and find_spec("numba") is not None

    @property
    def nearest(self) -> torch.Tensor:
        """The values [R, I]; for bfloat16, rounded to it."""
        return self._w_RI

    def exact_into(self, rows: slice, out_RI: torch.Tensor) -> None:
        """Write the values of some rows, float32."""
        if self._low_RI is None:
            out_RI.copy_(self._w_RI[rows])
        elif self._compiled:
            from shardxform.tuning.kernels import joiner

            joiner()(self._high(rows), self._low_RI[rows].numpy(), out_RI.view(torch.int32).numpy())
        else:
            out_RI.copy_(self._joined(rows, self._low_RI))

    def step(self, rows: slice, step_R: torch.Tensor, gradient_RI: torch.Tensor) -> None:
        """Move every weight of a row by that row's step, float32, against the sign of its gradient; NaN moves none."""
        if self._low_RI is not None and self._compiled:
            from shardxform.tuning.kernels import mover

            wide = gradient_RI.dtype == torch.float32
            gradient = gradient_RI.view(torch.uint32 if wide else torch.uint16).numpy()
            mover(wide)(self._high(rows), self._low_RI[rows].numpy(), step_R.numpy(), gradient)
            return
        change_RI = signs(gradient_RI) * step_R[:, None]
        if self._low_RI is None:
            self._w_RI[rows].sub_(change_RI)
            return
        bits_RI = self._joined(rows, self._low_RI).sub_(change_RI).view(torch.int32)
        bits_RI.add_(128).bitwise_right_shift_(8)  # the upper 24 bits, rounded
        high_RI = (bits_RI + 128).bitwise_right_shift_(8)
        self._low_RI[rows] = bits_RI.sub_(high_RI, alpha=256).to(torch.int8)
        self._w_RI[rows] = high_RI.to(torch.int16).view(torch.bfloat16)

    def _joined(self, rows: slice, low_RI: torch.Tensor) -> torch.Tensor:
        bits_RI = self._w_RI[rows].view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
        return bits_RI.add_(low_RI[rows].to(torch.int32), alpha=256).view(torch.float32)

    def _high(self, rows: slice) -> NDArray[np.int16]:
        return self._w_RI[rows].view(torch.int16).numpy()


class HealedStack:
    """Weights [E, O, I] of routed experts, as `stacked.Tunable`.

    Attributes:
        lr: what part of an expert's root mean square a step moves its weights by; 0 for no step.
        moves: whether they are changed at all; one that is not wants no gradients.
    """

    def __init__(self, w_EOI: torch.Tensor, *, moves: bool) -> None:
        self.lr, self.moves = 0.0, moves
        self._shape = (w_EOI.shape[0], w_EOI.shape[1], w_EOI.shape[2])
        self._stored = w_EOI.dtype
        w_RI = w_EOI.reshape(-1, w_EOI.shape[2])
        self._rms_E = torch.stack([_rms(w_OI) for w_OI in w_EOI]) if moves else None
        self._values = Moving(w_RI) if moves else None
        self._w_RI = self._values.nearest if self._values else w_RI

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, O, I]."""
        return self._shape

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._w_RI.device

    def stored(self, experts: int | slice) -> torch.Tensor:
        """The weights of some experts in the type that they are stored in, [E, O, I] or [O, I]."""
        return self._w_RI.view(self._shape)[experts].to(self._stored)

    def values_into(self, first: int, out_RI: torch.Tensor) -> None:
        """Write the rows from `first` on."""
        rows = slice(first, first + out_RI.shape[0])
        if self._values is None or out_RI.dtype == torch.bfloat16:
            out_RI.copy_(self._w_RI[rows])
            return
        self._values.exact_into(rows, out_RI)

    def values(self, rows: slice) -> torch.Tensor:
        """Values of a run of the E * O rows [R, I], float32."""
        out_RI = torch.empty(rows.stop - rows.start, self._shape[2], dtype=torch.float32, device=self.device)
        self.values_into(rows.start, out_RI)
        return out_RI

    def put(self, rows: slice, w_RI: torch.Tensor) -> None:
        """Replace the values of a run of rows; it must settle before it moves again."""
        self._w_RI[rows] = w_RI.to(self._w_RI.device, self._w_RI.dtype)

    def settle(self) -> None:
        """Stop moving; from now on the values are those that will be stored."""
        self.lr = 0.0
        if self._values is not None:
            self._w_RI.copy_(self._w_RI.to(self._stored))
            self._values = None

    def update(self, first: int, gradient_RI: torch.Tensor, before_RI: torch.Tensor | None = None) -> None:
        """Take one signed step in the rows from `first` on; their values as they were into `before_RI`."""
        if before_RI is not None:
            self.values_into(first, before_RI)
        if self._values is None or self._rms_E is None:
            return
        count, rows = gradient_RI.shape[0], self._shape[1]
        expert_R = torch.arange(first, first + count, device=self.device) // rows
        self._values.step(slice(first, first + count), self._rms_E[expert_R] * self.lr, gradient_RI)


def signs(x: torch.Tensor) -> torch.Tensor:
    """-1, 0 or 1 in float32; 0 for NaN."""
    return torch.sign(torch.nan_to_num(x.float(), nan=0.0))


def _rms(w_OI: torch.Tensor) -> torch.Tensor:
    """Root mean square, float32, summed in an order of its own on each kind of device."""
    return w_OI.float().square().mean().sqrt()


# -- a block -----------------------------------------------------------------------------------------------------------


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

    def values(self, rows: slice) -> torch.Tensor:
        """Values of a run of rows, float32."""
        return self.exact[rows]

    def put(self, rows: slice, w_RI: torch.Tensor) -> None:
        """Replace the values of a run of rows."""
        self.exact[rows] = w_RI.to(self.exact.device)

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
class MovingBlock:
    """A block whose weights are in place and can move.

    Attributes:
        forward: runs it.
        wide: by local name, what moves outside the experts.
        stacks: the experts' weights, whether they move or not.
        reach: share of the tokens that it was run on that came to the expert of a token, on the mean, where routed
            experts move; 1 elsewhere.
        rounded: rounds what moved to what it is written in, where that is not what it moves in.
    """

    forward: Forward
    wide: Mapping[str, Wide]
    stacks: tuple[HealedStack, ...]
    reach: Callable[[], float] = lambda: 1.0
    rounded: Callable[[MovingBlock], None] | None = None

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
        if self.rounded:
            self.rounded(self)
        for wide in self.wide.values():
            wide.settle()
        for stack in self.stacks:
            stack.settle()


Load = Callable[[str | None], MovingBlock]
"""Loads the block anew as it was pruned, with its weights of `recipe.HEALED[...]` ready to move, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealResult:
    """What became of a block.

    Attributes:
        start_loss: squared error of the pruned block's output relative to the original's, the mean over the tokens of
            the held-out samples; of nothing merged.
        loss: of what was kept; the same when all else was worse.
        judged: what the held-out samples were.
        ratio_error: standard error of loss / start_loss over them; NaN for a single one.
        what, lr: how it was healed; None and 0 when it stays as it was pruned. What is healed may have a loss that is
            larger by what may be chance.
        tried: all that was done, each with its step size and its loss; empty where that is one thing.
        diverged: whether the loss was no number at any time.
        merged_loss: the least of the block on the way to experts that pruned ones are merged into; None where none are.
        merged: how far on that way it began; 0 as it was pruned, 1 with these.
    """

    start_loss: float
    loss: float
    judged: Judged
    ratio_error: float
    what: str | None
    lr: float
    tried: tuple[tuple[str, float, float], ...]
    diverged: bool
    merged_loss: float | None = None
    merged: float = 0.0


def judge_start(load: Load, samples: Samples, heal: Heal, seed: int, dtype: torch.dtype = torch.float32) -> Loss:
    """Judge a block as it is loaded, with no step taken; as `heal_block`."""
    with one_thread():
        return _Run(load, samples, heal, seed, dtype).judged_start()


def heal_block(
    load: Load,
    samples: Samples,
    heal: Heal,
    seed: int,
    dtype: torch.dtype = torch.float32,
    pruned: Loss | None = None,
) -> tuple[HealResult, MovingBlock]:
    """Heal a block, unless held-out samples tell that all that was tried is worse than leaving it as it is loaded.

    Args:
        load: makes the block ready; called for each thing that is done.
        samples: inputs in the pruned chain, targets of the block before pruning in the original chain.
        heal: what to do.
        seed: of the choice of held-out samples, and with the block's number of the order of the others.
        dtype: of the hidden states, and so of the products.
        pruned: of the block as it was pruned, where it is loaded otherwise: what the result is told against.

    Returns:
        what became of it, and the block, settled.

    Raises:
        NonFiniteLoss: the pruned block itself puts out no numbers.

    """
    with one_thread():
        return _Run(load, samples, heal, seed, dtype, pruned).execute()


def pace_of_block(load: Load, samples: Samples, heal: Heal, seed: int, dtype: torch.dtype = torch.float32) -> BlockPace:
    """Heal a block by a few steps, of which nothing is kept, to see what they take and give; as `heal_block`."""
    began, ticks = time.monotonic(), list[float]()

    def timed(what: str | None) -> MovingBlock:
        moving = load(what)

        def forward(hidden_BTH: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                ticks.append(time.monotonic())
            return moving.forward(hidden_BTH)

        return replace(moving, forward=forward)

    with one_thread():
        start, loss = _Run(timed, samples, heal, seed, dtype).descend(heal.trials[0], PACE_STEPS)
    whole = time.monotonic() - began
    step = (ticks[-1] - ticks[1]) / (len(ticks) - 2) if len(ticks) > 2 else whole  # the first may compile kernels
    return BlockPace(
        fall=start - loss if math.isfinite(loss) else 0.0,
        step_seconds=step,
        descent_seconds=max(0.0, whole - len(ticks) * step),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Descent:
    """What steps did: loss before and after, None where it was no number, the first step, and the block."""

    start: Loss
    loss: Loss | None
    lr: float
    block: MovingBlock

    @property
    def mean(self) -> float:
        """The loss after; infinite where it was no number."""
        return self.loss.mean if self.loss else math.inf

    @property
    def worse(self) -> bool:
        """Whether it is the same, or has grown by what the samples tell from chance; a single one is believed."""
        if self.loss is None:
            return True
        grown_N = np.subtract(self.loss.sums, self.start.sums)
        error = grown_N.std(ddof=1) / math.sqrt(len(grown_N)) if len(grown_N) > 1 else 0.0
        return bool(grown_N.mean() >= min(WORSE_ERRORS * error, WORSE_PART * np.mean(self.start.sums)))


class _Run:
    """One block being healed."""

    def __init__(
        self, load: Load, samples: Samples, heal: Heal, seed: int, dtype: torch.dtype, pruned: Loss | None = None
    ) -> None:
        self._load, self._samples, self._heal, self._seed, self._dtype = load, samples, heal, seed, dtype
        self._pruned = pruned
        self._split = choose_judges(samples, seed)
        extra_N = np.arange(samples.count - samples.extra, samples.count)
        self._learned_N = np.concatenate([self._split.learned_N, extra_N])
        self._diverged = False
        self._tried: list[tuple[str, float, float]] = []
        self._start: Loss | None = None

    def execute(self) -> tuple[HealResult, MovingBlock]:
        done = self._healed() if self._heal.iters else None
        if done is None:
            healing, kept = self._load(None), None
            healing.settle()
            if self._start is None or self._pruned:  # what is written, be it rounded
                self._start = self._judge(healing)
        else:
            kept, loss, healing = done
        assert self._start is not None
        found, before = (loss if done else self._start), self._pruned or self._start
        result = HealResult(
            start_loss=before.mean,
            loss=found.mean,
            judged=self._split.judged(self._samples),
            ratio_error=0.0 if found is before else found.ratio_error(before),
            what=kept.what if kept else None,
            lr=kept.lr or 0.0 if kept else 0.0,
            tried=tuple((what, lr, loss if math.isfinite(loss) else -1.0) for what, lr, loss in self._tried)
            if len(self._tried) > 1
            else (),
            diverged=self._diverged,
        )
        return result, healing

    def judged_start(self) -> Loss:
        """Judge the block as it is loaded."""
        healing = self._load(None)
        healing.settle()
        return self._judge(healing)

    def _healed(self) -> tuple[Trial, Loss, MovingBlock] | None:
        """How the block was healed, its loss and the block; None where all that is tried makes it worse."""
        for trial in self._heal.trials:
            done = self._descend(trial, self._heal.iters)
            self._tried.append((trial.what, done.lr, done.mean))
            if done.loss and not done.worse:
                return Trial(trial.what, done.lr), done.loss, done.block
            del done  # lets go of the block before it is loaded again
        return None

    def descend(self, trial: Trial, iters: int) -> tuple[float, float]:
        """Loss before and after healing as a trial says, infinite where it was no number; nothing is kept."""
        done = self._descend(trial, iters)
        return done.start.mean, done.mean

    def _descend(self, trial: Trial, iters: int) -> _Descent:
        healing = self._load(trial.what)
        start = self._start = self._judge(healing)
        learned_N = self._learned_N
        tokens = len(learned_N) * self._samples.hidden_NTH.shape[1]
        lr = trial.lr or trial.part * suggested_lr(tokens, healing.weights, healing.reach(), iters)
        random = np.random.Generator(np.random.PCG64([self._seed, self._samples.block]))
        rows = learning_order(len(learned_N), self._heal.batch_size, random)
        try:
            for done in range(iters):
                healing.set_lr(lr * (1 - done / iters))
                descend(healing.forward, self._samples, learned_N[next(rows)], self._dtype)
            healing.settle()
            return _Descent(start, self._judge(healing), lr, healing)
        except NonFiniteLoss:
            self._diverged = True
            healing.settle()
            return _Descent(start, None, lr, healing)

    def _judge(self, healing: MovingBlock) -> Loss:
        return judge(healing.forward, self._samples, self._split.judges_N, self._heal.batch_size, self._dtype)


def suggested_lr(tokens: int, weights: int, reach: float, steps: int) -> float:
    """The first step size unless one is given: the less a weight has to learn from, the less it should move.

    Fitted on the models of docs/healing.md, "The first step".

    Args:
        tokens: that teach.
        weights: that move.
        reach: share of these that come to the expert of a token, as of `MovingBlock`.
        steps: that are taken.

    """
    return min(LARGEST_STEP, max(SMALLEST_STEP, STEP * math.sqrt(tokens * reach / (weights * steps))))
