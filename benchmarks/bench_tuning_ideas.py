"""Ideas for better tuned rounding, tried on examples/small-moe: divergence with and without each, same steps and data.

    python benchmarks/bench_tuning_ideas.py [--block 1] [--steps 60] [--batch-size 4] [--seed 42] [--only NAME]
                                            [--model DIR] [--healed DIR] [--json]

With `--block N` that block alone is rounded and tuned, on 16-bit inputs, and the others stay in 16 bits: a tenth of the
time of `--block all`, which tunes one after the other as `quantize --method auto-round` does. Divergence is of float32
on held-out windows; the blocks are judged on windows of the calibration text that they do not learn from. A variant's
own difference from the first is given with the standard error over windows, which both were measured on.

The first, `tuned`, moves scales as far as offsets at a step, as auto-round does.

Compensation (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022)
rounds one column after the other and moves those to come against the error, by the inputs' covariance; what it adds to
a weight, in steps of its scale, is where its offset starts. Inputs of experts are weighted as the router weights them.

With `--healed DIR`, a pruned and healed checkpoint of the model, that one is rounded, too: to put out what the model
before pruning does, as `quantize --heal` has it, or what the healed blocks do. Divergence is from the model before
pruning, and these rows are compared with one another.
"""

# E: experts, O: output rows, I: input columns, G: groups of a row, N: windows, B: windows of a batch, T: positions, H:
# hidden size, n: tokens.

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tuning_ideas import IDEAS, Idea

from shardxform.ask.recipe import split_windows
from shardxform.base.constants import JUDGED_AT, LEAST_SQUARE
from shardxform.calibration import DataOptions, load_windows
from shardxform.calibration.windows import _pieced
from shardxform.checkpoint.table import Checkpoint
from shardxform.formats.rounding import search_factors
from shardxform.formats.scheme import Grid
from shardxform.forward.runtime import fixed_order
from shardxform.forward.skeleton import Block, Skeleton
from shardxform.forward.weights import Precision, Weights
from shardxform.tuning.block import TunedBlock, install
from shardxform.tuning.elementwise import ONE, UNITS_PER_STEP, Pace
from shardxform.tuning.linear_attention import frugal_linear_attention
from shardxform.tuning.modules import TunedExperts, TunedLinear, route
from shardxform.tuning.samples import learning_order
from shardxform.tuning.stacked import StackedWeight
from shardxform.tuning.workers import Workers

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
CPU: Final = torch.device("cpu")
BATCH: Final = 8
KEPT_16_BIT: Final = ("gate", "shared_expert_gate", "in_proj_a", "in_proj_b", "kv_b_proj")
SMALLEST: Final = 1.1e-5
HALF: Final = 0.4998
EXTENSION: Final = 1 / (1 - 0.0075 * np.arange(-100, 101))
"""Factors of the plain scale that auto-round's `enable_alg_ext` tries."""


@dataclass(slots=True)
class Row:
    """What came of an idea; divergences by held-out window, errors by block."""

    name: str
    kl_N: list[float]
    judged: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


# -- the model ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Reference:
    """The 16-bit model's states at every block: in bfloat16 on calibration windows, in float32 on held-out ones.

    Calibration windows are those of the text first, then those beside them, of which `beside` says where they are.
    """

    model: Path
    skeleton: Skeleton
    exact: Skeleton
    calibration: list[torch.Tensor]
    held_out: list[torch.Tensor]
    ids_NT: torch.Tensor
    beside: dict[str, range]
    healed: Reference | None = None

    def rows(self, beside: str, samples: int) -> list[int]:
        """Numbers of the windows that an idea has."""
        return [*range(samples), *self.beside.get(beside, ())]

    @torch.no_grad()
    def divergence(self, leaving_NTH: torch.Tensor) -> list[float]:
        """Mean divergence of every held-out window when these states leave the last block."""
        found = []
        with self.exact.head() as head:
            for wanted_TH, found_TH in zip(self.held_out[-1], leaving_NTH, strict=True):
                p, q = (head.logits(each).log_softmax(-1) for each in (wanted_TH, found_TH))
                found.append(float((p.exp() * (p - q)).sum(-1).mean()))
        return found


@torch.no_grad()
def through(block: Block, entering_NTH: torch.Tensor) -> torch.Tensor:
    """States that leave a block."""
    return torch.cat([block(part) for part in entering_NTH.split(BATCH)])  # type: ignore[no-untyped-call]


def reference(model: Path, args: argparse.Namespace, stack: contextlib.ExitStack) -> Reference:
    """Run a 16-bit model."""
    source, ids = Checkpoint.open(model), []
    for name, count, length in (("calib", args.samples, args.seqlen), ("heldout", args.sequences, 256)):
        data = DataOptions(data=str(SMALL_MOE / "text" / f"{name}.jsonl"), samples=count, seqlen=length)
        ids.append(torch.as_tensor(load_windows(SMALL_MOE, data).ids_NT).long())
    ids[0], places = _with_beside(ids[0], args)
    chains, skeletons = [], []
    for dtype, ids_NT in zip((torch.bfloat16, torch.float32), ids, strict=True):
        skeleton = Skeleton(stack.enter_context(Weights(source, Precision(CPU, dtype))))
        states = [skeleton.embed(ids_NT)]
        for layer in range(skeleton.num_blocks):
            with skeleton.block(layer) as block:
                states.append(through(block, states[-1]))
        chains.append(states)
        skeletons.append(skeleton)
    return Reference(
        model=model,
        skeleton=skeletons[0],
        exact=skeletons[1],
        calibration=chains[0],
        held_out=chains[1],
        ids_NT=ids[0],
        beside=places,
    )


def _with_beside(ids_NT: torch.Tensor, args: argparse.Namespace) -> tuple[torch.Tensor, dict[str, range]]:
    """Windows, and after them what the ideas that are asked for learn from beside them."""
    places: dict[str, range] = {}
    for kind in dict.fromkeys(IDEAS[name].beside for name in args.only):
        if kind:
            more_NT = BESIDE[kind](ids_NT[: args.samples].numpy(), args)
            places[kind] = range(len(ids_NT), len(ids_NT) + len(more_NT))
            ids_NT = torch.cat([ids_NT, torch.from_numpy(more_NT).long()])
    return ids_NT, places


def _more_text(ids_NT: np.ndarray[Any, Any], args: argparse.Namespace) -> np.ndarray[Any, Any]:
    data = DataOptions(data=str(SMALL_MOE / "text" / "calib.jsonl"), samples=4 * len(ids_NT), seqlen=args.seqlen)
    more_NT = load_windows(SMALL_MOE, data).ids_NT
    assert (more_NT[: len(ids_NT)] == ids_NT).all()
    return more_NT[len(ids_NT) :]


def _pieces(ids_NT: np.ndarray[Any, Any], args: argparse.Namespace, replaced: float) -> np.ndarray[Any, Any]:
    """Three times as many windows of pieces of those that are learned from, some tokens replaced by any others."""
    random, (learned, _) = np.random.default_rng(args.seed), split_windows(len(ids_NT), args.seed)
    out_NT = np.stack([_pieced(ids_NT[learned], random) for _ in range(3 * len(ids_NT))])
    replaced_NT = random.random(out_NT.shape) < replaced
    out_NT[replaced_NT] = random.integers(1, 2048, size=int(replaced_NT.sum()))
    return out_NT


BESIDE: Final[dict[str, Callable[[np.ndarray[Any, Any], argparse.Namespace], np.ndarray[Any, Any]]]] = {
    "text": _more_text,
    "pieces": partial(_pieces, replaced=0.0),
    "drawn": partial(_pieces, replaced=0.5),
}


def sensitivities(ref: Reference, share: float, windows: int = 64) -> list[torch.Tensor]:
    """Of every block [H, H]: second moments of the gradients of sampled tokens' log-probabilities, of mean 1."""
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(ref.model, dtype=torch.float32).eval().requires_grad_(False)
    generator, size = torch.Generator().manual_seed(0), ref.skeleton.hidden_size
    sums = [torch.zeros(size, size, dtype=torch.float64) for _ in model.model.layers]
    for ids_BT in ref.ids_NT[:windows].split(BATCH):  # type: ignore[no-untyped-call]
        left: list[torch.Tensor] = []
        keep = partial(_keep_output, left)
        hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
        entering = model.model.embed_tokens(ids_BT).detach().requires_grad_()
        logp = model(inputs_embeds=entering, use_cache=False).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        drawn = torch.multinomial(logp.detach().exp().flatten(0, 1), 1, generator=generator).view(ids_BT.shape)
        slopes = torch.autograd.grad(logp.gather(-1, drawn[..., None]).sum(), left)
        for total, slope, state in zip(sums, slopes, left, strict=True):
            g_nH = (slope * state.detach().square().mean(-1, keepdim=True).sqrt())[:, :-1].flatten(0, 1).double()
            total += g_nH.T @ g_nH
    plain = torch.eye(size)
    return [(share * total / total.trace() * size).float() + (1 - share) * plain for total in sums]


def _keep_output(left: list[torch.Tensor], _module: object, _inputs: object, out: Any) -> None:  # noqa: ANN401
    left.append(out if torch.is_tensor(out) else out[0])


# -- one block ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A block to tune: what enters it, what enters it in 16 bits, what should leave it, and what errors count for."""

    layer: int
    entering_NTH: torch.Tensor
    plain_NTH: torch.Tensor
    wanted_NTH: torch.Tensor
    counts_HH: torch.Tensor | None
    left_out: float = 0.0


def run_idea(name: str, ref: Reference, args: argparse.Namespace) -> Row:
    """Round and tune the blocks that are asked for, and measure what leaves the last."""
    idea, began = IDEAS[name], time.process_time()
    model = ref.healed if idea.healed and ref.healed else ref
    counts = sensitivities(ref, idea.sensitivity) if idea.sensitivity else [None] * ref.skeleton.num_blocks
    chosen = range(ref.skeleton.num_blocks) if args.block == "all" else [int(args.block)]
    rows = ref.rows(idea.beside, args.samples)
    answered = model if idea.healed == "healed" else ref
    states, wanted = ([each[rows] for each in chain.calibration] for chain in (model, answered))
    tuned, held_out, row = states[0], model.held_out[0], Row(name, [])
    for layer in range(ref.skeleton.num_blocks):
        if layer not in chosen or not idea.rounded:
            tuned = states[layer + 1]
            with model.exact.block(layer) as block:
                held_out = through(block, held_out)
            continue
        task = Task(
            layer=layer,
            entering_NTH=tuned,
            plain_NTH=states[layer],
            wanted_NTH=wanted[layer + 1].float(),
            counts_HH=_energies(wanted[layer + 1]) if idea.by_channel else counts[layer],
            left_out=idea.left_out,
        )
        with Workers(1) as workers, _block(model.skeleton, layer, idea, workers) as (block, weights):
            row.judged.append(tune(weights, block, task, idea, args))
            weights.settle()
            tuned = through(block, tuned)
            block.module.float()
            held_out = through(block, held_out)
    row.kl_N, row.cpu_seconds = ref.divergence(held_out), time.process_time() - began
    return row


def _energies(state_NTH: torch.Tensor) -> torch.Tensor:
    """The channels' energies [H, H], of mean 1, every token of the same size."""
    wanted_NTH = state_NTH.float()
    energy_H = (wanted_NTH.square() / wanted_NTH.square().mean(-1, keepdim=True).clamp(min=LEAST_SQUARE)).sum((0, 1))
    return (energy_H / energy_H.mean()).diag()


@contextlib.contextmanager
def _block(skeleton: Skeleton, layer: int, idea: Idea, workers: Workers) -> Iterator[tuple[Block, TunedBlock]]:
    grid, experts = Grid(bits=4, group_size=128, scale_grid="bf16", search=idea.search), skeleton.experts_name(layer)
    linear = [
        name
        for name, module in skeleton.module(layer).named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] not in KEPT_16_BIT
    ]
    names = [*(name for name in linear if not name.startswith(f"{experts}.")), experts]
    with (
        skeleton.tunable(layer, names) as block,
        fixed_order(CPU),
        frugal_linear_attention(block.module, workers),
    ):
        weights = install(block.module, names, grid, workers, recompute=False)
        weights.restart()
        yield block, weights


def tune(weights: TunedBlock, block: Block, task: Task, idea: Idea, args: argparse.Namespace) -> float:
    """Start and descend; the loss on the judges of what was kept, relative to how the block began."""
    learned_N, judges_N = (np.array(rows) for rows in split_windows(args.samples, args.seed))
    loss = partial(_judge, block, task, judges_N)
    began = best = loss()
    if idea.by_energy or idea.compensated:
        start(weights, block, task.entering_NTH[torch.from_numpy(learned_N[: idea.windows])], idea)
        best = loss()
    if not idea.tuned:
        return best / began
    random = np.random.Generator(np.random.PCG64([args.seed, task.layer]))
    learned_N = np.concatenate([learned_N, np.arange(args.samples, len(task.entering_NTH))])
    learned_N = np.arange(args.samples) if idea.learn_all else learned_N
    order, before = learning_order(len(learned_N), args.batch_size, random), math.inf
    with _leaving_out(idea.damped_gradient), _smoothed(idea.momentum):
        for phase in phases(idea, args.steps):
            if phase.if_falling and best > 0.99 * before:
                break
            before = best
            judged_at = {round(p * phase.steps) for p in JUDGED_AT}
            with phase.alone(weights) as moving:
                for done, pace in enumerate(paces(phase.steps, phase.rate, idea.clip_rate), start=1):
                    for weight in moving:
                        weight.pace = pace._replace(offset=phase.offsets * pace.offset, high=idea.clip)
                    rows_B = torch.from_numpy(learned_N[next(order)])
                    plain_B = torch.from_numpy(random.random(len(rows_B)) < idea.mixed)[:, None, None]
                    entering = torch.where(plain_B, task.plain_NTH[rows_B], task.entering_NTH[rows_B])
                    with torch.enable_grad():
                        out_BTH = block(entering)
                        error_BTH, _ = errors(out_BTH.detach(), task, rows_B)
                        out_BTH.backward(error_BTH.to(out_BTH.dtype))  # type: ignore[no-untyped-call]
                    if done in judged_at and ((now := loss()) < best or idea.learn_all):
                        weights.keep()
                        best = now
            if phase.first:  # its losses were those of other weights
                weights.keep()
                best = loss()
    left = 1.0
    for share in (0.75, 0.5, 0.25) if idea.shrunk else ():
        shrink(weights, share / left)
        left = share
        if (now := loss()) < best:
            weights.keep()
            best = now
    return best / began


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Some steps.

    Attributes:
        steps: how many.
        rate: the first one's size, times their number.
        offsets: 1, or 0 where scales move alone.
        first: the down projections are in 16 bits, and its last state goes on.
        down: they move alone.
        if_falling: only if the loss fell in the steps before.
    """

    steps: int
    rate: float
    offsets: int = 1
    first: bool = False
    down: bool = False
    if_falling: bool = False

    @contextlib.contextmanager
    def alone(self, weights: TunedBlock) -> Iterator[list[StackedWeight]]:
        """The weights that move; the others rest."""
        downs = [
            module.tuned if isinstance(module, TunedLinear) else module.down
            for name, module in weights.modules.items()
            if isinstance(module, TunedExperts) or name.endswith("down_proj")
        ]
        weights.set_pace(Pace(0.0, 0.0, 0.0, 1.2))
        for weight in downs if self.first else ():
            _leave(weight)  # type: ignore[arg-type]
        yield [w for w in weights.weights if not (self.first or self.down) or (w in downs) == self.down]
        for weight in downs if self.first else ():
            del weight.values_into, weight.update


def _leave(weight: StackedWeight) -> None:
    """Have a weight be what it is in 16 bits."""

    def values_into(first: int, out_RI: torch.Tensor) -> None:
        out_RI.copy_(weight._w_RI[first : first + len(out_RI)])

    def update(first: int, _: torch.Tensor, before_RI: torch.Tensor | None = None) -> None:
        if before_RI is not None:
            values_into(first, before_RI)

    weight.values_into, weight.update = values_into, update  # type: ignore[method-assign,assignment]


def phases(idea: Idea, steps: int) -> list[Phase]:
    """The steps of an idea."""
    if idea.in_turn:
        turn = Phase(steps=round(idea.in_turn * steps), rate=idea.rate)
        return [replace(turn, first=True), replace(turn, down=True)]
    first = round(idea.scales_first * steps)
    before = [Phase(steps=first, rate=idea.rate, offsets=0)] if first else []
    after = idea.more * [Phase(steps=steps // 2, rate=idea.rate / 4, if_falling=True)]
    return [*before, Phase(steps=steps, rate=idea.rate), *after]


def shrink(weights: TunedBlock, share: float) -> None:
    """Leave so much of what offsets and clips are from the start."""
    for weight in weights.weights:
        steps_RI = (weight._v_RI & -UNITS_PER_STEP).float() * (share / UNITS_PER_STEP)
        weight._v_RI.copy_(steps_RI.round().to(torch.int16) * UNITS_PER_STEP | weight._v_RI & 3)
        weight._clip_RG.sub_(1).mul_(share).add_(1)


def paces(steps: int, rate: float, clip_rate: float) -> Iterator[Pace]:
    """As the tuner's own, times `rate`, and clips' times `clip_rate`, too."""
    unit, walked, units = UNITS_PER_STEP / ONE, 0.0, 0
    for done in range(steps):
        first = rate / steps * (1 - done / steps)
        walked += first
        size = round(walked / unit) - units
        units += size
        yield Pace(float(size * UNITS_PER_STEP), float(np.float32(first * clip_rate)), 0.0, 1.2)


def errors(out_BTH: torch.Tensor, task: Task, rows_B: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The derivative of the loss by the output, and the loss: errors relative to each token's size."""
    wanted_BTH = task.wanted_NTH[rows_B]
    error_BTH = out_BTH.float() - wanted_BTH
    error_BTH[:, -1] = 0
    if task.left_out:
        size_m = (error_BTH / wanted_BTH.square().mean(-1, keepdim=True).clamp(min=LEAST_SQUARE).sqrt()).abs().flatten()
        error_BTH.view(-1)[size_m.topk(int(task.left_out * len(size_m))).indices] = 0
    counted_BTH = error_BTH if task.counts_HH is None else error_BTH @ task.counts_HH
    slope_BTH = counted_BTH / wanted_BTH.square().mean(-1, keepdim=True).clamp(min=LEAST_SQUARE)
    return slope_BTH, float((slope_BTH * error_BTH).double().sum())


@torch.no_grad()
def _judge(block: Block, task: Task, judges_N: np.ndarray[Any, Any]) -> float:
    parts = torch.from_numpy(judges_N).split(BATCH)  # type: ignore[no-untyped-call]
    return sum(errors(block(task.entering_NTH[rows_B]), task, rows_B)[1] for rows_B in parts)


@contextlib.contextmanager
def _leaving_out(share: float) -> Iterator[None]:
    """Take no step where a gradient is below a share of its row's root mean square."""
    update = StackedWeight.update

    def larger(
        self: StackedWeight, first: int, gradient_RI: torch.Tensor, before_RI: torch.Tensor | None = None
    ) -> None:
        least_R1 = share * gradient_RI.float().square().mean(-1, keepdim=True).sqrt()
        update(self, first, torch.where(gradient_RI.abs() < least_R1, 0, gradient_RI), before_RI)

    if share:
        StackedWeight.update = larger  # type: ignore[method-assign]
    try:
        yield
    finally:
        StackedWeight.update = update  # type: ignore[method-assign]


@contextlib.contextmanager
def _smoothed(share: float) -> Iterator[None]:
    """Take the signs of running means of gradients."""
    update, means = StackedWeight.update, dict[tuple[int, int], torch.Tensor]()

    def smoothed(
        self: StackedWeight, first: int, gradient_RI: torch.Tensor, before_RI: torch.Tensor | None = None
    ) -> None:
        key = id(self), first
        means[key] = means.get(key, torch.zeros(gradient_RI.shape)).lerp(gradient_RI.float(), 1 - share)
        update(self, first, means[key].to(gradient_RI.dtype), before_RI)

    if share:
        StackedWeight.update = smoothed  # type: ignore[method-assign]
    try:
        yield
    finally:
        StackedWeight.update = update  # type: ignore[method-assign]


# -- where tuning starts -----------------------------------------------------------------------------------------------


def start(weights: TunedBlock, block: Block, entering_NTH: torch.Tensor, idea: Idea) -> None:
    """Choose scales, or offsets, by the inputs that the block's weights see."""
    seen = covariances(weights, block, entering_NTH, weighted=not idea.extension)
    for weight, covariance_EII in seen:
        if idea.by_energy:
            _search(weight, covariance_EII, EXTENSION if idea.extension else search_factors(weight.grid.bits))
        if idea.compensated:
            _compensate(weight, covariance_EII, idea)
    weights.keep()


def covariances(
    weights: TunedBlock, block: Block, entering_NTH: torch.Tensor, *, weighted: bool = True
) -> list[tuple[StackedWeight, torch.Tensor]]:
    """Every weight of a block, and the sums of its inputs' products [E, I, I]."""
    found: list[tuple[StackedWeight, torch.Tensor]] = []
    for module in weights.modules.values():
        module.forward = _watched(module, found, weighted)  # type: ignore[method-assign]
    through(block, entering_NTH)
    for module in weights.modules.values():
        del module.forward
    return found


def _watched(
    module: TunedLinear | TunedExperts, found: list[tuple[StackedWeight, torch.Tensor]], weighted: bool
) -> Callable[..., torch.Tensor]:
    """Its forward pass, which adds to covariances; these are in `found`."""
    tuned = (module.tuned,) if isinstance(module, TunedLinear) else (module.gate_up, module.down)
    sums = [torch.zeros(weight.shape[0], weight.shape[2], weight.shape[2]) for weight in tuned]
    found += zip(tuned, sums, strict=True)  # type: ignore[arg-type]
    forward = module.forward

    def linear(x: torch.Tensor) -> torch.Tensor:
        x_nI = x.reshape(-1, x.shape[-1]).float()
        sums[0][0] += x_nI.T @ x_nI
        return forward(x)  # type: ignore[call-arg]

    def experts(hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, TunedExperts)
        routing = route(index_TK, len(sums[0]))
        for expert in routing.reached:
            at = routing.of(expert)
            x_nH, weight_n1 = hidden_TH[routing.token_S[at]], weight_TK.reshape(-1)[routing.slot_S[at], None].float()
            weight_n1 = weight_n1 if weighted else torch.ones_like(weight_n1)
            inner_nI = module.gate(module._between(expert, x_nH)).float() * weight_n1
            sums[0][expert] += (x_nH.float() * weight_n1).T @ (x_nH.float() * weight_n1)
            sums[1][expert] += inner_nI.T @ inner_nI
        return forward(hidden_TH, index_TK, weight_TK)  # type: ignore[call-arg]

    return linear if isinstance(module, TunedLinear) else experts


def _search(weight: StackedWeight, covariance_EII: torch.Tensor, factors_F: np.ndarray[Any, Any]) -> None:
    """Take the scale of least error when each column's counts as much as its input is large."""
    experts, rows, columns = weight.shape
    groups, span = weight.grid.groups(columns), weight.grid.span(columns)
    energy_EI = covariance_EII.diagonal(dim1=1, dim2=2).clone()
    energy_EI[energy_EI.sum(-1) == 0] = 1
    w_EOGS = weight._w_RI.float().view(experts, rows, groups, span)
    plain_EOG = w_EOGS.abs().amax(-1) / weight.grid.zero_code
    chosen_EOG, least_EOG = torch.empty_like(plain_EOG), torch.full_like(plain_EOG, math.inf)
    factors = [sign * factor for factor in factors_F.tolist() for sign in (1, -1)]
    for scale_EOG in (weight._start_RG.view_as(plain_EOG), *(plain_EOG * factor for factor in factors)):
        stored_EOG = scale_EOG.to(torch.bfloat16).float()
        stored_EOG = torch.where(stored_EOG.abs() < SMALLEST, SMALLEST, stored_EOG)[..., None]
        far_EOGS = w_EOGS - stored_EOG * _codes(w_EOGS / stored_EOG, weight.grid)
        error_EOG = (far_EOGS.square() * energy_EI.view(experts, 1, groups, span)).sum(-1)
        chosen_EOG = torch.where(error_EOG < least_EOG, stored_EOG[..., 0], chosen_EOG)
        least_EOG = torch.minimum(error_EOG, least_EOG)
    weight._start_RG.copy_(chosen_EOG.view_as(weight._start_RG))


def _codes(ratio: torch.Tensor, grid: Grid) -> torch.Tensor:
    return ratio.round().clamp(-grid.zero_code, grid.zero_code - 1)


def _compensate(weight: StackedWeight, covariance_EII: torch.Tensor, idea: Idea) -> None:
    """Start the offsets of every expert that was reached from what compensation adds."""
    experts, rows, columns = weight.shape
    w_EOI = weight._w_RI.float().view(experts, rows, columns)
    scale_EOI = weight._start_RG.repeat_interleave(weight.grid.span(columns), dim=1)[:, :columns].view_as(w_EOI)
    offset_EOI = torch.zeros_like(w_EOI)
    for expert, covariance_II in enumerate(covariance_EII):
        if covariance_II.any():
            offset_EOI[expert] = added(w_EOI[expert], scale_EOI[expert], covariance_II, idea, weight.grid)
    units_RI = (offset_EOI.view_as(weight._v_RI) * (ONE / UNITS_PER_STEP)).round() * UNITS_PER_STEP
    weight._v_RI.copy_(units_RI.to(torch.int16))


def added(
    w_OI: torch.Tensor, scale_OI: torch.Tensor, covariance_II: torch.Tensor, idea: Idea, grid: Grid
) -> torch.Tensor:
    """What compensation adds to each weight before it is rounded, in steps of its scale."""
    damped_II = covariance_II.double()
    damped_II = damped_II + idea.damping * damped_II.diagonal().mean() * torch.eye(len(damped_II), dtype=torch.float64)
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True).float()
    moved_OI, out_OI = w_OI.clone(), torch.empty_like(w_OI)
    most = HALF if idea.neighbours else 1 - UNITS_PER_STEP / ONE
    for i in range(w_OI.shape[1]):
        scale_O, plain_O = scale_OI[:, i], w_OI[:, i] / scale_OI[:, i]
        out_OI[:, i] = (moved_OI[:, i] / scale_O - plain_O).clamp(-most, most)
        code_O = _codes(plain_O + out_OI[:, i], grid)
        error_O = (moved_OI[:, i] - code_O * scale_O) / upper_II[i, i]
        moved_OI[:, i + 1 :] -= error_O[:, None] * upper_II[i, i + 1 :]
    return out_OI


# -- showing -----------------------------------------------------------------------------------------------------------


def line(row: Row, first: Row) -> str:
    """One idea's row; its difference is in percent of the first's divergence."""
    kl_N, base_N = np.array(row.kl_N), np.array(first.kl_N)
    each_N = (kl_N - base_N) / base_N.mean()
    error = each_N.std(ddof=1) / math.sqrt(len(each_N))
    judged = " ".join(f"{each:.3f}" for each in row.judged)
    change = f"{100 * each_N.mean():+6.1f} +- {100 * error:3.1f} %"
    return f"{row.name:<44} {kl_N.mean():.6f} {change}  {judged}  {row.cpu_seconds:5.0f} s"


def main() -> None:
    """Print a row an idea, the first of which all others are compared with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SMALL_MOE, help="one of the same texts: see small_moes.py")
    parser.add_argument("--block", choices=["0", "1", "2", "3", "all"], default="1", help="%(default)s")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows, %(default)s")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of one, %(default)s")
    parser.add_argument("--sequences", type=int, default=32, help="held-out windows of 256 tokens, %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a step, %(default)s")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only", choices=list(IDEAS), action="append", help="beside `tuned`; default: all")
    parser.add_argument("--healed", type=Path, help="a pruned and healed checkpoint of the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object an idea")
    args = parser.parse_args()
    args.only = [name for name in args.only or IDEAS if args.healed or not IDEAS[name].healed]
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        ref, rows = reference(args.model, args, stack), dict[str, Row]()
        if args.healed:
            ref = replace(ref, healed=reference(args.healed, args, stack))
        for name in dict.fromkeys(["tuned", *args.only]):
            row = rows[name] = run_idea(name, ref, args)
            first = rows.get(IDEAS[name].against, row)
            print(json.dumps(asdict(row)) if args.json else line(row, first), flush=True)


if __name__ == "__main__":
    main()
