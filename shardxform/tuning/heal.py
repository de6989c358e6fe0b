"""Healing one block: its 16-bit weights moved until its output resembles that of the block before it was pruned.

The rule is that of the rounding offsets: the sign of the gradient, applied in place as it arrives, and a step that
falls to zero; for 16-bit weights the step is relative to the root mean square of their matrix. Held-out samples, never
tuned on, choose among trials and decide whether the block is changed at all. The block is loaded from the pruned view
anew for every trial; weights that healing leaves alone keep the source's bytes. What is written in small floats is
rounded to them when the block stops moving, so that the samples judge what is written.
"""

# E: experts, O: output rows of one, I: input columns, R: any run of the E * O rows, N: samples, B: samples of a batch,
# T: positions, H: hidden size, J: intermediate size.

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np
import torch

from shardxform.ask.recipe import Heal, Trial
from shardxform.base.constants import (
    LARGEST_MOVE,
    LARGEST_STEP,
    MOST_TRIES,
    ORTHOGONAL_FROM,
    PACE_STEPS,
    PAYS,
    SHORTER,
    SMALLEST_STEP,
    STEP,
)
from shardxform.errors import ExecutionError
from shardxform.formats.encoding import Encoded, Nearest, Role, Storage, round_to
from shardxform.formats.packing import bf16_bits_of, float32_of
from shardxform.formats.plain import Plain
from shardxform.forward.weights import activation, stack_names
from shardxform.plan.steps import KeptItem, healed_names
from shardxform.tuning.directions import direction, directions, signs
from shardxform.tuning.modules import ExpertBiases, TunedExperts
from shardxform.tuning.moving import Moving
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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardxform.forward.skeleton import Block, Skeleton
    from shardxform.tuning.samples import Forward, Samples
    from shardxform.tuning.workers import Workers

__all__ = [
    "BlockHealer",
    "HealResult",
    "HealedStack",
    "Load",
    "MovingBlock",
    "Wide",
    "heal_block",
    "pace_of_block",
    "suggested_lr",
]

_FINITE_TILE: Final = 1 << 20


class HealedStack:
    """Weights [E, O, I] of routed experts, as `stacked.Tunable`.

    Attributes:
        lr: what part of an expert's root mean square a step moves its weights by; 0 for no step.
        orthogonal: whether they follow `directions`, and not the signs of their gradients.
        moves: whether they are changed at all; one that is not wants no gradients.
    """

    def __init__(self, w_EOI: torch.Tensor, *, moves: bool) -> None:
        self.lr, self.orthogonal, self.moves = 0.0, False, moves
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
        """Take one step in the rows from `first` on; their values as they were into `before_RI`.

        With `orthogonal` they are a run of one expert, from a multiple of `ORTHOGONAL_ROWS` on, or whole experts.
        """
        if before_RI is not None:
            self.values_into(first, before_RI)
        if self._values is None or self._rms_E is None:
            return
        count, rows = gradient_RI.shape[0], self._shape[1]
        expert_R = torch.arange(first, first + count, device=self.device) // rows
        moved, step_R = slice(first, first + count), self._rms_E[expert_R] * self.lr
        if self.orthogonal:
            gradient_MRI = gradient_RI.reshape(-1, min(count, rows), gradient_RI.shape[1])
            self._values.follow(moved, step_R, directions(gradient_MRI).view(count, -1))
        else:
            self._values.step(moved, step_R, gradient_RI)


def _rms(w_OI: torch.Tensor) -> torch.Tensor:
    """Root mean square, float32, summed in an order of its own on each kind of device."""
    return w_OI.float().square().mean().sqrt()


# -- a block -----------------------------------------------------------------------------------------------------------


class Wide:
    """A parameter outside the experts that is healed: float32 here, and in the module in the type of its products."""

    def __init__(self, parameter: torch.nn.Parameter, stored: torch.Tensor) -> None:
        """Begin to move `parameter`, whose values are `stored`."""
        self.parameter = parameter
        self.lr, self.orthogonal = 0.0, False
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
        way = direction(gradient) if self.orthogonal else signs(gradient)
        self.exact.sub_(way * (self.lr * self._rms))
        parameter.copy_(self.exact)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MovingBlock:
    """A block whose weights are in place and can move.

    Attributes:
        forward: runs it.
        wide: by local name, what moves outside the experts.
        stacks: the experts' weights, whether they move or not.
        rounded: rounds what moved to what it is written in, where that is not what it moves in.
    """

    forward: Forward
    wide: Mapping[str, Wide]
    stacks: tuple[HealedStack, ...]
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

    @property
    def largest_move(self) -> float:
        """The most that a step moves a weight by, in step sizes."""
        return LARGEST_MOVE if self.stacks[0].orthogonal else 1.0

    def choose(self, tokens: int) -> None:
        """Choose the rule by how many tokens there are to learn from."""
        orthogonal = tokens >= ORTHOGONAL_FROM * self.weights
        for wide in self.wide.values():
            wide.orthogonal = orthogonal
        for stack in self.stacks:
            stack.orthogonal = orthogonal

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
            the held-out samples.
        loss: of what was kept; the same when nothing was better.
        judged: what the held-out samples were.
        ratio_error: standard error of loss / start_loss over them; NaN for a single one.
        what, lr: how it was healed; None and 0 when it stays as it was pruned.
        largest_move: the most that a step moved a weight by, in step sizes.
        tried: the trials, each with its step size and its loss; empty when there was one.
        diverged: whether the loss was no number at any time.
    """

    start_loss: float
    loss: float
    judged: Judged
    ratio_error: float
    what: str | None
    lr: float
    largest_move: float
    tried: tuple[tuple[str, float, float], ...]
    diverged: bool


def heal_block(
    load: Load, samples: Samples, heal: Heal, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[HealResult, MovingBlock]:
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
    with _one_thread():
        return _Run(load, samples, heal, seed, dtype).execute()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch's own sums in one order: it may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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

    with _one_thread():
        start, loss = _Run(timed, samples, heal, seed, dtype).descend(heal.trials[0], PACE_STEPS)
    whole = time.monotonic() - began
    step = (ticks[-1] - ticks[1]) / (len(ticks) - 2) if len(ticks) > 2 else whole  # the first may compile kernels
    return BlockPace(
        fall=start - loss if math.isfinite(loss) else 0.0,
        step_seconds=step,
        descent_seconds=max(0.0, whole - len(ticks) * step),
    )


class _Tried(NamedTuple):
    """A trial: what moved and by which first step; loss before and after, which is infinite where it was no number."""

    what: str
    lr: float
    start: float
    loss: float

    @property
    def gain(self) -> float:
        """How far the loss fell; below 0 where it rose."""
        return self.start - self.loss


class _Run:
    """One block being healed."""

    def __init__(self, load: Load, samples: Samples, heal: Heal, seed: int, dtype: torch.dtype) -> None:
        self._load, self._samples, self._heal, self._seed, self._dtype = load, samples, heal, seed, dtype
        self._split = choose_judges(samples, seed)
        extra_N = np.arange(samples.count - samples.extra, samples.count)
        self._learned_N = np.concatenate([self._split.learned_N, extra_N])
        self._diverged = False
        self._tried: list[_Tried] = []
        self._ratio_error = math.nan  # of the last descent

    def execute(self) -> tuple[HealResult, MovingBlock]:
        start, chosen = math.nan, self._heal.trials[0]
        if self._heal.descents:
            best = min(self._candidates(), key=lambda tried: tried.loss)
            start, chosen = best.start, Trial(best.what, best.lr)
        healing, loss, lr = None, math.inf, 0.0
        if not self._tried or min(tried.loss for tried in self._tried) < start:
            start, loss, lr, healing = self._descend(chosen, self._heal.iters)
            if loss >= start and self._heal.lr is None:  # a short trial does not see what many steps learn by heart
                healing, chosen = None, Trial(chosen.what, lr / SHORTER)
                start, loss, lr, healing = self._descend(chosen, self._heal.iters)
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
            what=chosen.what if healed else None,
            lr=lr if healed else 0.0,
            largest_move=healing.largest_move,
            tried=tuple((each.what, each.lr, each.loss if math.isfinite(each.loss) else -1.0) for each in self._tried),
            diverged=self._diverged,
        )
        return result, healing

    def _candidates(self) -> list[_Tried]:
        """Do trials: the first with several steps, of which one is a candidate, unless it was asked for; the others."""
        first, *others = self._heal.trials
        tried = self._try(first)
        searched = self._searched(tried) if first.lr is None else tried
        return [searched, *map(self._try, others)]

    def _searched(self, first: _Tried) -> _Tried:
        """Double the step as long as that pays, else halve it as long as that does.

        A short trial has a bias: where much can be undone a double step does in it what more steps would, which a whole
        run has; where little can, it ends before the noise of its steps has. So another step must be better by more
        than a little. A single window that judges is like those that teach more often than not, and would have the step
        too large.
        """
        best = first
        for factor in (2.0, 0.5) if len(self._split.judges_N) > 1 else (0.5,):
            while len(self._tried) < MOST_TRIES and SMALLEST_STEP <= best.lr * factor <= LARGEST_STEP:
                other = self._try(Trial(first.what, best.lr * factor))
                if other.loss >= best.loss or other.gain < PAYS * best.gain:
                    break
                best = other
            if best is not first:
                break
        return best

    def _try(self, trial: Trial) -> _Tried:
        """Heal by a few steps, and note what came of it; the block is let go of: it is large."""
        start, loss, lr = self._descend(trial, self._heal.probe_iters)[:3]
        self._tried.append(_Tried(trial.what, lr, start, loss))
        return self._tried[-1]

    def descend(self, trial: Trial, iters: int) -> tuple[float, float]:
        """Heal as a trial says; loss before and after. Nothing is kept."""
        return self._descend(trial, iters)[:2]

    def _descend(self, trial: Trial, iters: int) -> tuple[float, float, float, MovingBlock]:
        """Loss before and after, the step size, and the block; infinite when the loss was no number on the way."""
        healing = self._load(trial.what)
        start = self._judge(healing)
        learned_N = self._learned_N
        tokens = len(learned_N) * self._samples.hidden_NTH.shape[1]
        healing.choose(tokens)
        lr = trial.lr or suggested_lr(tokens, healing.weights)
        random = np.random.Generator(np.random.PCG64([self._seed, self._samples.block]))
        rows = learning_order(len(learned_N), self._heal.batch_size, random)
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

    def _judge(self, healing: MovingBlock) -> Loss:
        return judge(healing.forward, self._samples, self._split.judges_N, self._heal.batch_size, self._dtype)


def suggested_lr(tokens: int, weights: int) -> float:
    """A first step size to search from: the fewer tokens a weight has, the less it should move.

    Fitted on the models of docs/healing.md, "How far".
    """
    return min(LARGEST_STEP, max(SMALLEST_STEP, STEP * math.sqrt(tokens / weights)))


@dataclass(frozen=True, slots=True, eq=False)
class _Spot:
    """Where a matrix that is stored by itself is in a block, `turned` there."""

    holder: Wide | HealedStack
    rows: slice
    turned: bool

    def read(self) -> NDArray[np.float32]:
        """The values [O, I] in memory of their own."""
        value = self.holder.values(self.rows)
        return np.array((value.T if self.turned else value).cpu().numpy(), order="C")

    def write(self, values_OI: NDArray[np.float32]) -> None:
        """Put other values there."""
        value = torch.from_numpy(values_OI)
        self.holder.put(self.rows, value.T if self.turned else value)


def _finite(value: torch.Tensor) -> bool:
    """Whether all is; a few megabytes at a time, since stacked experts are a gigabyte."""
    return all(bool(torch.isfinite(part).all()) for part in torch.split(value.flatten(), _FINITE_TILE))


# -- a block of a checkpoint -------------------------------------------------------------------------------------------


class BlockHealer:
    """Heals one block that `Skeleton.tunable` loaded without its experts."""

    def __init__(
        self,
        skeleton: Skeleton,
        block: Block,
        layer: int,
        forward: Forward,
        workers: Workers,
        kept: Sequence[KeptItem] = (),
    ) -> None:
        """Look at the block; `kept` is what is to be written of it as it is healed."""
        self._skeleton, self._layer, self._forward, self._workers = skeleton, layer, forward, workers
        self._weights, self._prefix = skeleton.weights, skeleton.prefix(layer)
        self._module: Any = block.module
        self._experts_name = skeleton.experts_name(layer)
        self._experts: Any = self._module.get_submodule(self._experts_name)
        inside = {id(parameter) for parameter in self._experts.parameters()}
        named = self._module.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if id(parameter) not in inside}
        self._moved: set[str] = set()
        self._healing: MovingBlock | None = None
        self._biases: ExpertBiases | None = None
        small = [item for item in kept if not isinstance(item.target, Plain)]
        self._small = {item.tensor.name.removeprefix(self._prefix): item for item in small}
        self._coded: dict[str, list[dict[Role, NDArray[Any]]]] = {}

    def heal(self, samples: Samples, heal: Heal, seed: int) -> HealResult:
        """Heal the block, or leave it as it was pruned if that is better on held-out samples."""
        result, self._healing = heal_block(self._load, samples, heal, seed, self._weights.precision.dtype)
        return result

    def pace(self, samples: Samples, heal: Heal, seed: int) -> BlockPace:
        """What a few steps take and give; the block is loaded anew for what comes next."""
        return pace_of_block(self._load, samples, heal, seed, self._weights.precision.dtype)

    def stored(self, local: str) -> torch.Tensor:
        """A tensor of the block as it will be stored, by its name in the checkpoint less the block's prefix."""
        assert self._healing is not None
        name = self._skeleton.module_name(local)
        if name in self._healing.wide:
            return self._healing.wide[name].stored
        if not name.startswith(f"{self._experts_name}."):
            return self._weights.at_rest(self._prefix + local)
        return self._of_experts(name.removeprefix(f"{self._experts_name}."), self._healing.stacks)

    def values_of(self, name: str) -> NDArray[np.uint8]:
        """Bytes of a tensor after healing, in the type that it moves in.

        Raises:
            ExecutionError: a value is not finite.

        """
        value = self.stored(name.removeprefix(self._prefix))
        if not _finite(value):
            raise ExecutionError(f"tensor '{name}': not finite after healing")
        return value.cpu().contiguous().view(torch.uint8).reshape(-1).numpy()

    def parts(self, item: KeptItem) -> Iterator[NDArray[np.uint8]]:
        """Bytes of each part of what is healed, as it will be stored.

        Raises:
            ExecutionError: values that are not finite.

        """
        local = item.tensor.name.removeprefix(self._prefix)
        if local not in self._small:
            yield self.values_of(item.tensor.name)
            return
        assert isinstance(item.tensor, Encoded)
        coded = self._coded.get(local) or [self._weights.stored(source)[0] for source in item.tensor.sources]
        for role, _ in item.parts:
            yield np.concatenate([part[role].reshape(-1).view(np.uint8) for part in coded])

    def _round(self, moving: MovingBlock) -> None:
        """Round what moved to what it is written in; what no token came to keeps its codes."""
        for local, item in self._small.items():
            coded = []
            for spot, source in self._spots(item, local, moving):
                stored, before_OI = self._weights.stored(source)
                values_OI = spot.read()
                if not np.isfinite(values_OI).all():
                    return  # the trial has failed, and nothing of it is written
                if not np.array_equal(values_OI, float32_of(bf16_bits_of(before_OI), "BF16")):
                    whole = stored["whole"].view(np.float32).reshape(()) if "whole" in stored else None
                    stored = round_to(cast(Nearest, item.target), values_OI, whole)
                    spot.write(values_OI)
                coded.append(stored)
            self._coded[local] = coded

    def _spots(self, item: KeptItem, local: str, moving: MovingBlock) -> Iterator[tuple[_Spot, Storage]]:
        """Where the stored matrices of a tensor are in the block; none for one that does not move."""
        assert isinstance(item.tensor, Encoded)
        name, sources = self._skeleton.module_name(local), item.tensor.sources
        turned = bool(sources[0].cut and sources[0].cut.transposed)
        if name in moving.wide:
            yield _Spot(moving.wide[name], slice(None), turned), sources[0]
        if not name.startswith(f"{self._experts_name}.") or not all(stack.moves for stack in moving.stacks):
            return
        layout = self._skeleton.layout.family.experts
        stack, expert, rows = self._held(name.removeprefix(f"{self._experts_name}."), moving.stacks)
        for number, source in enumerate(sources):
            first = stack.shape[1] * (number if expert is None else expert)
            run = slice(first + rows.start, first + rows.stop)
            yield _Spot(stack, run, turned != (layout.transposed and expert is None)), source

    def _of_experts(self, name: str, healed: tuple[HealedStack, ...]) -> torch.Tensor:
        """A stack or one expert's matrix, as the family's checkpoints have it."""
        stack, expert, rows = self._held(name, healed)
        if expert is not None:
            return stack.stored(expert)[rows]
        whole = stack.stored(slice(None))
        return whole.mT if self._skeleton.layout.family.experts.transposed else whole

    def _held(self, name: str, healed: tuple[HealedStack, ...]) -> tuple[HealedStack, int | None, slice]:
        """The stack that holds what checkpoints call `name`, the expert whose it is or None for all, and its rows."""
        (gate_up, down), layout = healed, self._skeleton.layout.family.experts
        stacks = dict(zip(stack_names(self._experts), healed, strict=False))
        if name in stacks:
            return stacks[name], None, slice(0, stacks[name].shape[1])
        expert, projection = name.removesuffix(".weight").split(".")
        if projection == layout.projections[-1]:
            return down, int(expert), slice(0, down.shape[1])
        share = gate_up.shape[1] // len(layout.inner)
        first = layout.inner.index(projection) * share
        return gate_up, int(expert), slice(first, first + share)

    def make_ready(self, names: Sequence[str]) -> None:
        """Put the weights of modules in place as they will be stored, for what is to be done with them next."""
        assert self._healing is not None
        for name in names:
            if name == self._experts_name:
                ready = [stack.stored(slice(None)) for stack in self._healing.stacks]
                ready += [*astuple(self._biases)] if self._biases else []
                for key, value in zip(stack_names(self._experts), ready, strict=False):
                    self._experts._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
                self._put_experts(self._experts)
            else:
                linear: Any = self._module.get_submodule(name)
                linear.weight.data = self.stored(self._skeleton.stored_name(f"{name}.weight", self._prefix))

    def _load(self, what: str | None) -> MovingBlock:
        """The block as it was pruned, with some of its weights ready to move."""
        self._healing = None
        self._coded = {}
        self._put_experts(self._experts)  # lets go of the stacks of the trial before
        names = self._names(what)
        wide: dict[str, Wide] = {}
        for local in sorted(self._moved | (names & self._parameters.keys())):
            name = self._prefix + self._skeleton.stored_name(local, self._prefix)
            parameter, stored = self._parameters[local], self._weights.at_rest(name)
            parameter.requires_grad_(False).copy_(stored)
            if local in names:
                wide[local] = Wide(parameter, stored)
                self._moved.add(local)
        moves = any(name.startswith(f"{self._experts_name}.") for name in names)
        tensors = self._skeleton.stacked(self._layer)
        gate_up, down = (HealedStack(tensors.pop(key), moves=moves) for key in stack_names(self._experts)[:2])
        stacks = (gate_up, down)
        self._biases = ExpertBiases(*tensors.values()) if tensors else None
        self._put_experts(TunedExperts(*stacks, activation(self._experts), self._workers, self._biases))
        rounded = self._round if self._small else None
        return MovingBlock(forward=self._forward, wide=wide, stacks=stacks, rounded=rounded)

    def _names(self, what: str | None) -> set[str]:
        """Local names of the tensors that move."""
        if what is None:
            return set()
        layout = self._skeleton.layout
        found = healed_names(layout, layout.places, what)
        local = (name.removeprefix(self._prefix) for name in found if layout.places[name].layer == self._layer)
        return {self._skeleton.module_name(name) for name in local}

    def _put_experts(self, experts: torch.nn.Module) -> None:
        parent, _, own = self._experts_name.rpartition(".")
        setattr(self._module.get_submodule(parent), own, experts)
