"""One decoder block whose quantized weights are tuned: modules put in place, the descent, and what they became.

Works on transformers' own layer module, whatever its attention: a linear layer is replaced by a `TunedLinear`, a fused
experts module by a `TunedExperts`. Weights are taken from the modules, not copied; other parameters stay as they are
and get no gradients.

Signed gradient descent moves rounding offsets and clips until the block's output resembles the original's. The same
inputs, seed and options give the same codes whatever the number of threads. It starts from plain rounding and never
ends with anything that is worse on the samples it is judged by, which it is not tuned on. Loads and writes nothing.
"""

# E: experts, J: intermediate size, H: hidden size, O: output rows, I: input columns, N: samples, B: samples of a
# batch, T: positions.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from shardxform.base.constants import CLIP_RANGE, CLIP_STEP, JUDGED_AT
from shardxform.errors import SchemeError
from shardxform.forward.weights import activation, stack_names
from shardxform.tuning.elementwise import ONE, UNITS_PER_STEP, Pace
from shardxform.tuning.modules import ExpertBiases, TunedExperts, TunedLinear
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
from shardxform.tuning.stacked import Codes, StackedWeight, Tunable, stacked_weight

if TYPE_CHECKING:
    from shardxform.formats.scheme import Grid
    from shardxform.tuning.elementwise import Pace
    from shardxform.tuning.workers import Workers

__all__ = ["BlockResult", "RoundedModule", "TuneOptions", "TunedBlock", "install", "tune_block"]

_KEEP_ROWS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundedModule:
    """One module as it will be stored.

    Attributes:
        module: name within the layer, such as "self_attn.q_proj" or "mlp.experts.3.up_proj".
        codes: codes [O, I] and scales [O, G].
    """

    module: str
    codes: Codes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TunedBlock:
    """A layer with tuned modules in it.

    Attributes:
        layer: the layer, its modules replaced.
        modules: by local name, in the order given.
        grid: what the weights are rounded to.
        workers: the threads that all modules share.
    """

    layer: torch.nn.Module
    modules: dict[str, TunedLinear | TunedExperts]
    grid: Grid
    workers: Workers

    @property
    def weights(self) -> Iterator[StackedWeight]:
        """All weights being tuned."""
        for module in self.modules.values():
            tuned = (module.tuned,) if isinstance(module, TunedLinear) else (module.gate_up, module.down)
            for weight in tuned:
                assert isinstance(weight, StackedWeight)
                yield weight

    @property
    def unreached(self) -> dict[str, list[int]]:
        """By local name, the experts that no token that was learned from has reached yet."""
        experts = {name: module for name, module in self.modules.items() if isinstance(module, TunedExperts)}
        return {name: [e for e, hit in enumerate(m.reached_E) if not hit] for name, m in experts.items()}

    def set_pace(self, pace: Pace) -> None:
        """Say how far every weight moves from now on."""
        for weight in self.weights:
            weight.pace = pace

    def keep(self) -> None:
        """Remember the present state as the best."""
        for weight in self.weights:
            rows = weight.shape[0] * weight.shape[1]
            runs = [(first, min(first + _KEEP_ROWS, rows)) for first in range(0, rows, _KEEP_ROWS)]
            self.workers.each(lambda run, weight=weight: weight.keep(*run), runs)  # type: ignore[misc]

    def restart(self) -> None:
        """Go back to the start: plain rounding, with the searched scales if the grid asks for them."""
        for weight in self.weights:
            weight.restart()

    def settle(self) -> None:
        """From now on multiply with what was kept, which is what `stored` gives."""
        for weight in self.weights:
            weight.settled = True

    def stored(self, projections: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Iterator[RoundedModule]:
        """What was kept, one module at a time: linear layers, and each expert's `projections`."""
        for name, module in self.modules.items():
            if isinstance(module, TunedLinear):
                yield _rounded(name, 0, module.tuned, slice(None))
                continue
            *inner, down = projections
            share = module.gate_up.shape[1] // len(inner)
            for expert in range(module.gate_up.shape[0]):
                for at, each in enumerate(inner):
                    rows = slice(at * share, (at + 1) * share)
                    yield _rounded(f"{name}.{expert}.{each}", expert, module.gate_up, rows)
                yield _rounded(f"{name}.{expert}.{down}", expert, module.down, slice(None))


def install(
    layer: torch.nn.Module, names: Sequence[str], grid: Grid, workers: Workers, *, recompute: bool = True
) -> TunedBlock:
    """Replace modules of a layer by tuned ones, in place.

    Args:
        layer: a decoder layer. Its other parameters no longer require gradients. Convert their type afterwards if you
            like: the weights taken here no longer belong to the layer.
        names: local names of linear layers, and of fused experts modules as a whole.
        grid: what to round to.
        workers: threads, for the search of scales now and for everything later.
        recompute: forget what is inside children without routed experts (the attention) until the backward pass.

    Raises:
        SchemeError: a name is no linear layer or experts module of the layer, or its shape cannot be packed.
        ExecutionError: a weight has no representation on the grid.

    """
    layer.requires_grad_(False)
    modules: dict[str, TunedLinear | TunedExperts] = {}
    for name in names:
        modules[name] = _tuned(_find(layer, name), name, grid, workers)
        parent, _, own = name.rpartition(".")
        setattr(layer.get_submodule(parent), own, modules[name])
    if recompute:
        for child in layer.children():
            inside = {type(module) for module in child.modules()}
            if TunedLinear in inside and TunedExperts not in inside:
                child.forward = partial(_recomputed, child.forward)
    return TunedBlock(layer=layer, modules=modules, grid=replace(grid), workers=workers)


def _find(layer: torch.nn.Module, name: str) -> torch.nn.Module:
    try:
        return layer.get_submodule(name)
    except AttributeError as e:
        raise SchemeError(f"module '{name}': expected one of the layer's modules, found none of that name") from e


def _tuned(module: torch.nn.Module, name: str, grid: Grid, workers: Workers) -> TunedLinear | TunedExperts:
    if isinstance(module, torch.nn.Linear):
        bias = None if module.bias is None else module.bias.detach()
        return TunedLinear(stacked_weight(module.weight[None], grid, workers, name), workers, bias)
    parameters = dict(module.named_parameters(recurse=False))
    if not _are_experts(module, parameters):
        found = f"{type(module).__name__} with {[f'{key} {list(p.shape)}' for key, p in parameters.items()]}"
        raise SchemeError(f"module '{name}': expected a linear layer or stacks of experts [E, O, I], found {found}")
    names = stack_names(module)
    gate_up, down = (stacked_weight(parameters[p], grid, workers, f"{name}.{p}") for p in names[:2])
    biases = [parameters[p].detach() for p in names[2:] if p in parameters]
    return TunedExperts(gate_up, down, activation(module), workers, ExpertBiases(*biases) if biases else None)


def _are_experts(module: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether it is an experts module whose stacks stand as `Skeleton.stacked` gives them."""
    if not hasattr(module, "has_gate"):
        return False
    names = stack_names(module)
    if parameters.keys() not in ({*names[:2]}, {*names}):
        return False
    gate_up, down = (parameters[p].shape for p in names[:2])
    parts = 2 if module.has_gate else 1
    return (gate_up[0], gate_up[1], gate_up[2]) == (down[0], parts * down[2], down[1])


def _recomputed(forward: Callable[..., object], *args: object, **kwargs: Any) -> object:  # noqa: ANN401
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _rounded(module: str, expert: int, weight: Tunable, rows: slice) -> RoundedModule:
    assert isinstance(weight, StackedWeight)  # as `install` makes them
    return RoundedModule(module=module, codes=weight.codes(expert, rows))


# -- the descent -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """What to do; everything here changes the result.

    Attributes:
        seed: of the choice of the samples that judge, and with the block's number of the order of the others.
        iters: steps.
        lr: first step of offsets, in scales, which falls to zero linearly; None for 1 / iters.
        minmax_lr: that of clips, likewise; None for a quarter of it.
        batch_size: samples of a step.
        dtype: type of the hidden states, and so of the products.
    """

    seed: int
    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    batch_size: int = 8
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("iters", "batch_size"):
            if getattr(self, name) < 1:
                raise SchemeError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("lr", "minmax_lr"):
            first = getattr(self, name)
            if first is not None and not 0 < first <= 1:
                raise SchemeError(f"{name}: expected more than 0 and at most 1, found {first}")


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
        unreached: by local name, experts that no token reached that was learned from: they stay as they began, also
            where a token of the judges did.
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
        judged=choose_judges(samples, options.seed).judged(samples),
        iteration=at,
        unreached=block.unreached,
    )


def _descend(block: TunedBlock, forward: Forward, samples: Samples, options: TuneOptions) -> tuple[Loss, Loss, int]:
    """Loss at the start, loss of the best, and the step after which it was kept."""
    random = np.random.Generator(np.random.PCG64([options.seed, samples.block]))
    apart = choose_judges(samples, options.seed)
    judged_at = {max(1, round(part * options.iters)) for part in JUDGED_AT}
    start = best = judge(forward, samples, apart.judges_N, options.batch_size, options.dtype)
    kept_at, rows = 0, learning_order(len(apart.learned_N), options.batch_size, random)
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
    """The step of every iteration: `lr` of a scale and `minmax_lr` of a clip at first, falling to zero linearly.

    Those of the offsets are rounded to their unit so that the sum is not.
    """
    rate = options.lr or 1 / options.iters
    clip_rate = options.minmax_lr or CLIP_STEP * rate
    unit, walked, steps = UNITS_PER_STEP / ONE, 0.0, 0
    for done in range(options.iters):
        left = 1 - done / options.iters
        walked += rate * left
        size = round(walked / unit) - steps
        steps += size
        yield Pace(float(size * UNITS_PER_STEP), float(np.float32(clip_rate * left)), *CLIP_RANGE)
