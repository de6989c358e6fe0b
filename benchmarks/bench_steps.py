"""How large the first step of healing should be, on one block of each model, judged on held-out windows.

    python benchmarks/bench_steps.py MODEL [MODEL ...] [--layer 1] [--windows 16 64] [--iters 32]
        [--rates 0.01 0.02 0.04 0.08 0.16]
    python benchmarks/bench_steps.py MODEL --rules sign cosine orthogonal ... [--rates ...] [--orders 2] [--json]
    python benchmarks/bench_steps.py command RULE prune SRC OUT --heal ...

MODEL is examples/small-moe, or a checkpoint of `small_moes.py`. Half the experts are kept by REAP sum of 64 x 512
tokens of the calibration text of examples/small-moe. The block takes what the pruned blocks before it put out, learns
from the first `--windows` of these windows in steps of four, and is judged on 12 x 512 held-out tokens: squared error
relative to each token's size, in parts of that of the block as it was pruned. `chosen` is the step that healing takes
by itself. A whole model takes minutes: see `bench_heal.py steps`.

With `--rules`, other updates than the sign of the gradient, all in float32, each scaled so that a step of 0.04 moves a
weight by about 0.04 of the root mean square of its matrix; and other ways for the step to fall than linearly:

    sign         of the gradient, as healing does it
    cosine       sign; the step falls as a cosine
    late         sign; the step is constant for half of the steps, and falls linearly from there
    scaled       the gradient over the root mean square of its matrix
    factored     over the square root of the mean squares of its row and its column, as Adafactor without its averages
    sinkhorn     rows and columns scaled to one size, in turns, five times
    orthogonal   the nearest matrix with orthogonal rows or columns, by Newton-Schulz, as Muon without its momentum
    orthogonal-N the same of each run of N rows by itself (8, 16, 32, 64)
    bounded      orthogonal-64, scaled by the shape alone so that few directions move less, no value beyond three
    momentum     sign of an average over steps, of which the last has a tenth (an average for every weight)
    adam         Adam, 0.9 and 0.95 (two averages for every weight)

What is no matrix takes the sign where rows or columns matter. With `--orders`, windows come in as many orders.
`command` is `shardxform` healing by a rule; the cases of `bench_heal.py --rule RULE` are done by it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from shardxform.__main__ import entry
from shardxform.ask.recipe import Heal, Trial
from shardxform.calibration import load_windows
from shardxform.calibration.options import DataOptions
from shardxform.checkpoint.table import Checkpoint, scan
from shardxform.experts.choosing import choose
from shardxform.experts.scoring import ScoreOptions, score
from shardxform.forward.skeleton import Skeleton
from shardxform.forward.weights import Precision, Weights
from shardxform.model.layout import layout_of
from shardxform.plan.view import pruned_view
from shardxform.tuning.heal import HealedStack, Moving, MovingBlock, Wide, _Run, signs
from shardxform.tuning.healer import BlockHealer
from shardxform.tuning.linear_attention import frugal_linear_attention
from shardxform.tuning.samples import Samples, Split, descend, judge, learning_order
from shardxform.tuning.workers import Workers

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
LEARNED: Final = 64  # windows of the calibration text, of which experts are scored too
JUDGES: Final = 12
LENGTH: Final = 512
BATCH: Final = 4
SEED: Final = 42
PRECISION: Final = Precision(device=torch.device("cpu"), dtype=torch.float32)


def windows_of(model: Path, name: str, count: int) -> Any:  # noqa: ANN401
    """Windows of a text of examples/small-moe."""
    text = SMALL_MOE / "text" / f"{name}.jsonl"
    return load_windows(model, DataOptions(data=str(text), samples=count, seqlen=LENGTH))


def pruned(model: Path, source: Checkpoint) -> Checkpoint:
    """Half the experts, by REAP sum."""
    with tempfile.TemporaryDirectory() as folder:
        options = ScoreOptions(precision=PRECISION, work=Path(folder) / "work")
        scored = score(source, windows_of(model, "calib", LEARNED), options)
    manifest = choose(scored, layout_of(source.config, source.tensors).num_experts // 2)
    return pruned_view(source, manifest, text_only=False, mtp="auto").checkpoint


@torch.no_grad()
def states(skeleton: Skeleton, ids_NT: np.ndarray[Any, Any], blocks: int) -> np.ndarray[Any, Any]:
    """What leaves the first blocks."""
    hidden_NTH = skeleton.embed(torch.from_numpy(ids_NT.astype(np.int64)))
    for layer in range(blocks):
        with skeleton.block(layer) as block:
            hidden_NTH = torch.cat([block(part) for part in torch.split(hidden_NTH, BATCH)])
    found: np.ndarray[Any, Any] = hidden_NTH.numpy()
    return found


def heal(model: Path, args: argparse.Namespace) -> Iterator[str]:
    """Heal one block again and again, each from the start."""
    source = scan(model)[0]
    assert source is not None
    before, after = Skeleton(Weights(source, PRECISION)), Skeleton(Weights(pruned(model, source), PRECISION))
    ids_NT = np.concatenate([windows_of(model, "calib", LEARNED).ids_NT, windows_of(model, "heldout", JUDGES).ids_NT])
    samples = Samples(
        block=args.layer,
        hidden_NTH=states(after, ids_NT, args.layer),
        target_NTH=states(before, ids_NT, args.layer + 1),
    )
    with (
        Workers(1) as workers,
        after.tunable(args.layer, ()) as block,
        frugal_linear_attention(block.module, workers),
    ):
        healer = BlockHealer(after, block, args.layer, block, workers)
        lines = by_rules if args.rules else by_steps
        for windows in args.windows:
            for iters in args.iters:
                yield from lines(model, healer, samples, windows, iters, args)


def by_steps(
    model: Path, healer: BlockHealer, samples: Samples, windows: int, iters: int, args: argparse.Namespace
) -> Iterator[str]:
    """Heal as `shardxform` does, by steps that are given and by its own."""
    for rate in (*args.rates, None):
        began = time.process_time()
        run = _Run(healer._load, samples, Heal(what="all", iters=iters, batch_size=BATCH), SEED, torch.float32)
        run._split = Split(np.arange(windows), np.arange(LEARNED, LEARNED + JUDGES))
        run._learned_N = np.arange(windows)
        line = f"{model.name:10} {windows:3} windows {iters:4} steps {told(run, rate, iters)}"
        yield f"{line}  {time.process_time() - began:.1f} s"


def told(run: _Run, rate: float | None, iters: int) -> str:
    """Heal, and say by which step and how far."""
    if rate is not None:
        done = run._descend(Trial("all", rate), iters)
        return f"{done.block.weights:10,} weights  {rate:<8g}{done.mean / done.start.mean:7.4f}"
    result, _ = run.execute()
    return f"chosen  {result.lr:<8.3g}{result.loss / result.start_loss:7.4f}"


# -- other rules -------------------------------------------------------------------------------------------------------

State = dict[str, torch.Tensor]
Rule = Callable[[torch.Tensor, State], torch.Tensor]
SQUARE: Final = 1e-30  # less than the mean square of any gradient that is not zero
NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Scale to a root mean square of 1."""
    return x / x.square().mean().clamp(min=SQUARE).sqrt()


def scaled(gradient: torch.Tensor, _: State) -> torch.Tensor:
    """As the module says, as all of these."""
    return unit(gradient)


def factored(gradient: torch.Tensor, _: State) -> torch.Tensor:
    """By rows and columns."""
    if gradient.ndim != 2:
        return signs(gradient)
    square_OI = gradient.square()
    row_O1, column_1I = square_OI.mean(1, keepdim=True), square_OI.mean(0, keepdim=True)
    return unit(gradient / (row_O1.sqrt() * column_1I.sqrt()).clamp(min=SQUARE))


def orthogonal(gradient: torch.Tensor, _: State) -> torch.Tensor:
    """Five iterations; singular values are between about 0.7 and 1.2 then."""
    if gradient.ndim != 2:
        return signs(gradient)
    x_OI = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
    x_OI = x_OI / x_OI.norm().clamp(min=SQUARE)
    a, b, c = NEWTON_SCHULZ
    for _step in range(5):
        square_OO = x_OI @ x_OI.T
        x_OI = a * x_OI + (b * square_OO + c * square_OO @ square_OO) @ x_OI
    return unit(x_OI.T if gradient.shape[0] > gradient.shape[1] else x_OI)


def orthogonal_tiles(rows: int) -> Rule:
    """Each run of so many rows by itself, as gradients arrive."""

    def rule(gradient: torch.Tensor, state: State) -> torch.Tensor:
        if gradient.ndim != 2:
            return signs(gradient)
        return torch.cat([orthogonal(part, state) for part in torch.split(gradient, rows)])

    return rule


def bounded(gradient: torch.Tensor, _: State) -> torch.Tensor:
    """What could be built in: cheap, and with a bound of how far it moves a weight."""
    if gradient.ndim != 2:
        return signs(gradient)
    ways = [by_gram(part) * max(part.shape) ** 0.5 for part in torch.split(gradient, 64)]
    return torch.cat(ways).clamp_(-3, 3)


def by_gram(gradient_OI: torch.Tensor) -> torch.Tensor:
    """As `orthogonal`, with all but two products those of small matrices."""
    x_OI = gradient_OI / gradient_OI.norm().clamp(min=SQUARE)
    wide = x_OI.shape[0] <= x_OI.shape[1]
    gram = x_OI @ x_OI.T if wide else x_OI.T @ x_OI
    a, b, c = NEWTON_SCHULZ
    one, way = torch.eye(len(gram)), torch.eye(len(gram))
    for _step in range(5):
        factor = a * one + b * gram + c * gram @ gram
        way, gram = factor @ way, factor @ gram @ factor
    found: torch.Tensor = way @ x_OI if wide else x_OI @ way
    return found


def sinkhorn(gradient: torch.Tensor, _: State) -> torch.Tensor:
    """Rows and columns of one size, in turns."""
    if gradient.ndim != 2:
        return signs(gradient)
    x_OI = gradient
    for dim in (1, 0) * 5:
        size: torch.Tensor = x_OI.square().mean(dim, keepdim=True).clamp(min=SQUARE).sqrt()
        x_OI = x_OI / size
    return unit(x_OI)


def momentum(gradient: torch.Tensor, state: State) -> torch.Tensor:
    """Sign of an average."""
    mean = state.setdefault("mean", torch.zeros_like(gradient))
    return signs(mean.lerp_(gradient, 0.1))


def adam(gradient: torch.Tensor, state: State) -> torch.Tensor:
    """Adam, without a decay of weights."""
    count = state.setdefault("count", torch.zeros(())).add_(1)
    mean = state.setdefault("mean", torch.zeros_like(gradient)).lerp_(gradient, 0.1)
    square = state.setdefault("square", torch.zeros_like(gradient)).lerp_(gradient.square(), 0.05)
    return mean / (1 - 0.9**count) / (square / (1 - 0.95**count)).clamp(min=SQUARE).sqrt()


def linear(done: float) -> float:
    """What is left of the step after a part of the steps."""
    return 1 - done


def cosine(done: float) -> float:
    """Half a period."""
    return (1 + math.cos(math.pi * done)) / 2


def late(done: float) -> float:
    """All of it for half of the steps."""
    return min(1.0, 2 * (1 - done))


RULES: Final[dict[str, tuple[Rule, Callable[[float], float]]]] = {
    "sign": (lambda gradient, _: signs(gradient), linear),
    "cosine": (lambda gradient, _: signs(gradient), cosine),
    "late": (lambda gradient, _: signs(gradient), late),
    "scaled": (scaled, linear),
    "factored": (factored, linear),
    "orthogonal": (orthogonal, linear),
    "orthogonal-8": (orthogonal_tiles(8), linear),
    "orthogonal-16": (orthogonal_tiles(16), linear),
    "orthogonal-32": (orthogonal_tiles(32), linear),
    "orthogonal-64": (orthogonal_tiles(64), linear),
    "bounded": (bounded, linear),
    "sinkhorn": (sinkhorn, linear),
    "momentum": (momentum, linear),
    "adam": (adam, linear),
}


def by_rules(
    model: Path, healer: BlockHealer, samples: Samples, windows: int, iters: int, args: argparse.Namespace
) -> Iterator[str]:
    """Heal by other rules."""
    for rule in args.rules:
        for rate in args.rates:
            for seed in range(SEED, SEED + args.orders):
                began = time.process_time()
                left = healed_by(rule, rate, healer, samples, windows, iters, seed)
                seconds = time.process_time() - began
                row = {"model": model.name, "block": samples.block, "windows": windows, "steps": iters, "rule": rule}
                row |= {"rate": rate, "seed": seed, "left": round(left, 5), "seconds": round(seconds, 1)}
                yield json.dumps(row) if args.json else "  ".join(f"{value!s:>6}" for value in row.values())


def healed_by(
    name: str, rate: float, healer: BlockHealer, samples: Samples, windows: int, iters: int, seed: int
) -> float:
    """Heal the block by a rule; what is left of the error of the pruned one."""
    rule, falls = RULES[name]
    moving = moved_by(rule, healer._load("all"))
    start = judged(moving, samples)
    rows = learning_order(windows, BATCH, np.random.Generator(np.random.PCG64([seed, samples.block])))
    for done in range(iters):
        moving.set_lr(rate * falls(done / iters))
        descend(moving.forward, samples, next(rows), torch.float32)
    moving.settle()
    return judged(moving, samples) / start


def moved_by(rule: Rule, moving: MovingBlock) -> MovingBlock:
    """Have the rule move a block that was loaded."""
    for wide in moving.wide.values():
        move_wide(wide, rule)
    for stack, parts in zip(moving.stacks, (2, 1), strict=True):  # gate and up are two matrices
        if stack.moves:
            move_stack(stack, parts, rule)
    return moving


def run_command(name: str, arguments: list[str]) -> None:
    """Do as `shardxform` with these arguments, healing by a rule whose steps fall linearly."""
    rule, real = RULES[name][0], BlockHealer._load

    def load(healer: BlockHealer, what: str | None) -> MovingBlock:
        return moved_by(rule, real(healer, what))

    setattr(BlockHealer, "_load", load)  # noqa: B010
    sys.argv = ["shardxform", *arguments]
    entry()


def judged(moving: MovingBlock, samples: Samples) -> float:
    """Error on the held-out windows."""
    return judge(moving.forward, samples, np.arange(LEARNED, LEARNED + JUDGES), BATCH, torch.float32).mean


def move_wide(wide: Wide, rule: Rule) -> None:
    """Have the rule move a parameter outside the experts."""
    state: State = {}

    @torch.no_grad()
    def step(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        wide.exact.sub_(rule(gradient, state) * (wide.lr * wide._rms))
        parameter.copy_(wide.exact)

    wide._hook.remove()
    wide._hook = wide.parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]


def move_stack(stack: HealedStack, parts: int, rule: Rule) -> None:
    """Have the rule move experts, which come one at a time: these are small."""
    stack._values = Moving(stack._w_RI.float())
    stack._w_RI = w_RI = stack._values.nearest
    rms_E = stack._rms_E
    assert rms_E is not None
    states: dict[tuple[int, int], State] = {}

    @torch.no_grad()
    def update(first: int, gradient_RI: torch.Tensor, before_RI: torch.Tensor | None = None) -> None:
        if before_RI is not None:
            stack.values_into(first, before_RI)
        expert, row = divmod(first, stack.shape[1])
        if row or gradient_RI.shape[0] != stack.shape[1]:
            raise SystemExit("expected an expert's whole matrix at a time")
        ways = [
            rule(part, states.setdefault((expert, number), {}))
            for number, part in enumerate(gradient_RI.float().chunk(parts))
        ]
        w_RI[first : first + stack.shape[1]].sub_(torch.cat(ways) * (stack.lr * rms_E[expert]))

    setattr(stack, "update", update)  # noqa: B010


def main() -> None:
    """Print a line as it comes."""
    if sys.argv[1:2] == ["command"]:
        run_command(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--windows", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--iters", nargs="+", type=int, default=[32])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.01, 0.02, 0.04, 0.08, 0.16])
    parser.add_argument("--rules", nargs="+", default=[], choices=RULES, help="other rules, see above")
    parser.add_argument("--orders", type=int, default=1, help="of the windows, for each rule (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, of the rules")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models:
        for line in heal(model, args):
            print(line, flush=True)


if __name__ == "__main__":
    main()
