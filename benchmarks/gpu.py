"""What a GPU does with shardxform: its numbers against the CPU's, then how fast it is at the shapes of a real model.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--json FILE]
    python benchmarks/gpu.py --device cpu --small          # the same code in seconds, to see that it runs

Needs torch that sees the device, transformers, and this repository; nothing is installed, and nothing written but a
temporary folder. First `score`, `evaluate`, rounding, tuning and healing of examples/small-moe on both, each OK or FAIL
against the tolerance that its row states, and tuning twice: the bytes must be the same. Then blocks of the shape of
Qwen3.5-35B-A3B on random weights: an iteration of tuning and of healing, scoring, rounding, memory. Last, what those
make of a whole run. What no longer fits in the minutes is left out, and said. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SMALL_MOE: Final = ROOT / "examples" / "small-moe"
TEXT: Final = str(SMALL_MOE / "text" / "calib.jsonl")
BLOCKS: Final = 40  # of Qwen3.5-35B-A3B: three of linear attention to one of full attention
KEPT: Final = ("gate", "shared_expert_gate", "in_proj_a", "in_proj_b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is measured: a block, and how much goes through it."""

    hidden: int = 2048
    inner: int = 512
    experts: int = 128
    scored_experts: int = 256
    heads: int = 16
    batch: int = 8
    length: int = 512
    steps: int = 5
    rounded_rows: int = 32768


SMALL: Final = Shape(
    hidden=64, inner=32, experts=4, scored_experts=8, heads=2, batch=2, length=24, steps=1, rounded_rows=64
)


@dataclass(slots=True, kw_only=True)
class Run:
    """One run of this script, and what it found."""

    device: str
    shape: Shape
    ends: float
    scratch: Path
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def do(self, what: str, seconds: float, work: Callable[[], None]) -> None:
        """Do `work` unless it would take longer than is left; an error of it is a row, not the end."""
        if self.left < seconds:
            self.skipped[what] = f"wants about {seconds:.0f} s, {max(self.left, 0):.0f} s are left"
            return
        began = time.monotonic()
        try:
            work()
        except Exception as e:  # of any library: the others are still to be done
            traceback.print_exc()
            self.checks[what] = {
                "ok": False,
                "found": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}",
            }
        say(f"{what}: {time.monotonic() - began:.1f} s, {max(self.left, 0):.0f} s left")


def say(text: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(text + "\n")


# -- checks on the small checkpoint -----------------------------------------------------------------------------------


def call(*arguments: str) -> None:
    """Run a command of shardxform in this process."""
    from shardxform.cli import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main([*arguments, "-q"], standalone_mode=False)


def both(run: Run, command: str, *more: str) -> tuple[Path, Path]:
    """Outputs of a command on the CPU and on the device."""
    outs = []
    for name, device in (("cpu", "cpu"), ("device", run.device)):
        outs.append(run.scratch / f"{command}-{name}-{len(list(run.scratch.iterdir()))}")
        call(command, str(SMALL_MOE), str(outs[-1]), *more, "--device", device)
    return outs[0], outs[1]


def note(run: Run, name: str, difference: float, tolerance: float) -> None:
    """Have a check as a row."""
    ok = math.isfinite(difference) and difference <= tolerance
    run.checks[name] = {"ok": ok, "found": difference, "tolerance": tolerance}


def worst(found: Any, wanted: Any) -> float:  # noqa: ANN401
    """The largest relative difference of two arrays."""
    import numpy as np

    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.max(np.abs(found - wanted) / np.maximum(np.abs(wanted), 1e-12)))


def check_score(run: Run) -> None:
    """REAP's and the router's sums, float32."""
    from shardxform.experts import Saliency

    stats = []
    for device in ("cpu", run.device):
        out = run.scratch / f"{device.replace(':', '')}.sal"
        data = ("--data", TEXT, "--samples", "8", "--seqlen", "128", "--dtype", "float32")
        call("score", str(SMALL_MOE), "-o", str(out), *data, "--device", device)
        stats.append(Saliency.load(out).layers)
        out.unlink()
    wanted, found = stats
    sums = max(
        worst(getattr(found[n], name), getattr(wanted[n], name)) for n in wanted for name in ("reap_E", "gate_E")
    )
    note(run, "score: sums of experts, relative", sums, 1e-3)


def check_evaluate(run: Run) -> None:
    """Half of the experts against all of them: in float32 on both, and in bfloat16 on the device."""
    import torch

    from shardxform.ask.manifest import Manifest
    from shardxform.calibration import DataOptions, load_windows
    from shardxform.checkpoint.table import Checkpoint
    from shardxform.evaluation.evaluate import EvaluateOptions, evaluate
    from shardxform.forward.weights import Precision
    from shardxform.plan.view import pruned_view

    source = Checkpoint.open(SMALL_MOE)
    view = pruned_view(source, Manifest(keep={layer: tuple(range(0, 16, 2)) for layer in range(4)})).checkpoint
    windows = load_windows(SMALL_MOE, DataOptions(data=TEXT, samples=8, seqlen=128))
    results = []
    for device, dtype in (("cpu", torch.float32), (run.device, torch.float32), (run.device, torch.bfloat16)):
        options = EvaluateOptions(precision=Precision(torch.device(device), dtype), work=run.scratch / "evaluate")
        results.append(evaluate(view, windows, options, source))
    wanted, found, rough = results
    note(run, "evaluate: perplexity, relative", worst(found.perplexity, wanted.perplexity), 1e-3)
    assert wanted.against is not None
    assert found.against is not None
    assert rough.against is not None
    note(run, "evaluate: KL, relative", worst(found.against.kl, wanted.against.kl), 1e-2)
    note(run, "evaluate: KL in bfloat16, relative", worst(rough.against.kl, wanted.against.kl), 5e-2)


def bytes_of(root: Path) -> dict[str, bytes]:
    """All shards."""
    return {path.name: path.read_bytes() for path in root.glob("*.safetensors")}


def blocks_of(root: Path) -> list[dict[str, Any]]:
    """What the record says of blocks."""
    found: list[dict[str, Any]] = json.loads((root / "shardxform.json").read_text())["facts"]["blocks"]
    return found


def check_rounding(run: Run) -> None:
    """Rounding to nearest gives the same bytes everywhere."""
    wanted, found = (bytes_of(out) for out in both(run, "quantize"))
    note(run, "round to nearest: files that differ", sum(wanted[name] != found[name] for name in wanted), 0)


def check_tuning(run: Run) -> None:
    """The errors of tuned blocks, and twice the same bytes."""
    size = ("--data", TEXT, "--samples", "8", "--seqlen", "128", "--batch-size", "4", "--dtype", "float32")
    more = ("--method", "auto-round", "--iters", "20", *size)
    wanted, found = both(run, "quantize", *more)
    sides = blocks_of(found), blocks_of(wanted)
    first = worst(sides[0][0]["rtn_error"], sides[1][0]["rtn_error"])
    note(run, "tuning: error of block 0 before, relative", first, 1e-3)
    ratios = [statistics.mean(each["tuned_error"] / each["rtn_error"] for each in side) for side in sides]
    note(run, "tuning: part of the error that stays, difference", abs(ratios[0] - ratios[1]), 0.1)
    again = run.scratch / "again"
    call("quantize", str(SMALL_MOE), str(again), *more, "--device", run.device)
    differing = sum(data != bytes_of(again)[name] for name, data in bytes_of(found).items())
    note(run, "tuning twice: files that differ", differing, 0)


def check_long(run: Run) -> None:
    """More than 4,096 tokens a step, whose attention is made again for the backward pass; in bfloat16."""
    size = ("--data", TEXT, "--samples", "3", "--seqlen", "1408", "--batch-size", "3", "--dtype", "bfloat16")
    wanted, found = both(run, "quantize", "--method", "auto-round", "--iters", "2", *size)
    first = worst(blocks_of(found)[0]["rtn_error"], blocks_of(wanted)[0]["rtn_error"])
    note(run, "tuning 3 x 1,408 in bfloat16: error of block 0 before, relative", first, 0.05)


def check_healing(run: Run) -> None:
    """The errors of healed blocks."""
    keep = run.scratch / "keep.json"
    kept = {str(layer): list(range(0, 16, 2)) for layer in range(4)}
    keep.write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": kept}))
    size = ("--data", TEXT, "--samples", "8", "--seqlen", "128", "--batch-size", "2", "--dtype", "float32")
    heal = ("-m", str(keep), "--heal", "all", "--heal-iters", "12", "--heal-lr", "0.01")
    outs = both(run, "prune", *heal, *size)
    wanted, found = ([block["healed"] for block in blocks_of(out)] for out in outs)
    first = worst(found[0]["pruned_error"], wanted[0]["pruned_error"])
    note(run, "healing: error of block 0 as pruned, relative", first, 1e-3)
    ratios = [statistics.mean(each["healed_error"] / each["pruned_error"] for each in side) for side in (found, wanted)]
    note(run, "healing: part of the error that stays, difference", abs(ratios[0] - ratios[1]), 0.05)


# -- measures at the shapes of a real model ---------------------------------------------------------------------------


def block(run: Run, kind: str, experts: int, implementation: str) -> tuple[Any, Callable[[Any], Any]]:
    """A decoder block of random bfloat16 weights on the device, and a function that runs it on hidden states."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe

    shape = run.shape
    build: Any = configuration_qwen3_5_moe.Qwen3_5MoeTextConfig
    config = build(
        vocab_size=64,
        hidden_size=shape.hidden,
        num_hidden_layers=1,
        layer_types=[kind],
        num_experts=experts,
        num_experts_per_tok=min(8, experts // 2),
        moe_intermediate_size=shape.inner,
        shared_expert_intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=2,
        head_dim=shape.hidden // shape.heads * 2,
        linear_num_key_heads=shape.heads,
        linear_num_value_heads=2 * shape.heads,
        linear_key_head_dim=shape.hidden // shape.heads,
        linear_value_head_dim=shape.hidden // shape.heads,
        tie_word_embeddings=False,
    )
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16, experts_implementation=implementation)
    layer = model.model.layers[0].eval()
    if implementation == "shardxform":  # its weights come from elsewhere
        layer.mlp.experts._parameters.clear()
    layer.to_empty(device=run.device).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.zero_()
    rotary = type(model.model.rotary_emb)(config=config).to(run.device)

    def forward(hidden_BTH: Any) -> Any:  # noqa: ANN401
        at_BT = torch.arange(hidden_BTH.shape[1], device=run.device)[None].expand(len(hidden_BTH), -1)
        return layer(hidden_BTH, position_embeddings=rotary(hidden_BTH, at_BT[None].expand(3, -1, -1)))

    return layer, forward


@contextlib.contextmanager
def memory(run: Run, name: str) -> Iterator[None]:
    """Note what the device held at most."""
    import torch

    cuda = run.device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    yield
    if cuda:
        run.measures[f"{name}: peak device memory, bytes"] = torch.cuda.max_memory_allocated(run.device)


def clock(run: Run, work: Callable[[], object]) -> float:
    """Seconds, until the device is done."""
    import torch

    waits = run.device.startswith("cuda")
    if waits:
        torch.cuda.synchronize(run.device)
    began = time.perf_counter()
    work()
    if waits:
        torch.cuda.synchronize(run.device)
    return time.perf_counter() - began


def samples(shape: Shape) -> Any:  # noqa: ANN401
    """Random states, and targets a hundredth off."""
    import numpy as np

    from shardxform.tuning.samples import Samples

    hidden = np.random.default_rng(0).standard_normal((shape.batch, shape.length, shape.hidden), np.float32)
    return Samples(block=0, hidden_NTH=hidden, target_NTH=1.01 * hidden)


def time_steps(run: Run, forward: Callable[[Any], Any]) -> float:
    """Median seconds of a forward and a backward pass over a batch; the first is not counted."""
    import numpy as np
    import torch

    from shardxform.tuning.samples import descend

    data, rows = samples(run.shape), np.arange(run.shape.batch)

    def step() -> None:
        descend(lambda hidden: forward(hidden.to(run.device)), data, rows, torch.bfloat16)

    step()
    return statistics.median(clock(run, step) for _ in range(run.shape.steps))


def measure_tuning(run: Run, kind: str) -> None:
    """An iteration of tuning a block, and making it ready."""
    import torch

    from shardxform.formats.scheme import Grid
    from shardxform.forward.runtime import fixed_order, on_device
    from shardxform.tuning.block import install
    from shardxform.tuning.elementwise import Pace
    from shardxform.tuning.linear_attention import frugal_linear_attention
    from shardxform.tuning.stacked import stacked_weight
    from shardxform.tuning.workers import Workers

    with memory(run, f"tuning, {kind}"), Workers(torch.get_num_threads()) as workers, torch.no_grad():
        layer, forward = block(run, kind, run.shape.experts, "eager")
        linear = {name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        names = sorted(name for name in linear if name.rpartition(".")[2] not in KEPT)
        few_EOI = layer.mlp.experts.gate_up_proj[:2].contiguous()
        stacked_weight(few_EOI[:1, :64].contiguous(), Grid(), workers, "warm")  # compiles
        searched = clock(run, lambda: stacked_weight(few_EOI, Grid(), workers, "few")) / few_EOI.numel()
        tuned = install(layer, [*names, "mlp.experts"], Grid(search=False), workers, recompute=False)
        weights = sum(math.prod(weight.shape) for weight in tuned.weights)
        run.measures["scale search, seconds a block (CPU)"] = searched * weights
        tuned.set_pace(Pace(128.0, 1 / 256, 0.0, 1.2))
        device = torch.device(run.device)
        with on_device(device), fixed_order(device), frugal_linear_attention(layer, workers):
            run.measures[f"tuning, {kind}: seconds an iteration"] = time_steps(run, forward)


def measure_healing(run: Run, kind: str) -> None:
    """An iteration of healing a block, all of it."""
    import torch

    from shardxform.forward.runtime import fixed_order, on_device
    from shardxform.tuning.heal import HealedStack, Wide
    from shardxform.tuning.linear_attention import frugal_linear_attention
    from shardxform.tuning.modules import TunedExperts
    from shardxform.tuning.workers import Workers

    with memory(run, f"healing, {kind}"), Workers(torch.get_num_threads()) as workers:
        layer, forward = block(run, kind, run.shape.experts, "eager")
        experts = layer.mlp.experts
        stacks = [HealedStack(experts._parameters.pop(key).data, moves=True) for key in ("gate_up_proj", "down_proj")]
        layer.mlp.experts = TunedExperts(stacks[0], stacks[1], experts._apply_gate, workers)
        wide = [Wide(parameter, parameter.detach().clone()) for parameter in layer.parameters()]
        for stack in stacks:
            stack.lr = 1e-4
        for each in wide:
            each.lr = 1e-4
        device = torch.device(run.device)
        with on_device(device), fixed_order(device), frugal_linear_attention(layer, workers):
            run.measures[f"healing, {kind}: seconds an iteration"] = time_steps(run, forward)


class RandomExpert:
    """Stands for an expert's weights."""

    def __init__(self, gate_up: Any, down: Any) -> None:  # noqa: ANN401
        from shardxform.forward.weights import ExpertValues

        self.values = ExpertValues(gate_up, down)

    def on(self, _device: object) -> RandomExpert:
        """It is there."""
        return self

    def dense(self, _precision: object) -> Any:  # noqa: ANN401
        """Its values."""
        return self.values


def measure_scoring(run: Run) -> None:
    """Tokens of a second through a block of all experts, with their statistics; and sending a block's bytes."""
    import torch

    from shardxform.experts.scoring import Scorer
    from shardxform.forward.runtime import on_device
    from shardxform.forward.weights import ExpertBank, Precision, attach

    shape, device = run.shape, torch.device(run.device)
    scorer = Scorer(shape.scored_experts)
    up_JH = torch.empty(2 * shape.inner, shape.hidden, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    down_HJ = torch.empty(shape.hidden, shape.inner, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    read: Any = lambda _expert: RandomExpert(up_JH.clone(), down_HJ.clone())  # noqa: E731
    seconds = 0.0
    with memory(run, "scoring"), torch.no_grad(), on_device(device):
        x_BTH = torch.randn(shape.batch // 2, shape.length, shape.hidden, device=device).bfloat16()
        for kind, part in (("linear_attention", 0.75), ("full_attention", 0.25)):
            layer, forward = block(run, kind, shape.scored_experts, "shardxform")
            attach(layer.mlp.experts, ExpertBank(read, Precision(device, torch.bfloat16), scorer.observer("")))
            forward(x_BTH)
            turn = partial(forward, x_BTH)
            seconds += part * statistics.median(clock(run, turn) for _ in range(shape.steps))
            del layer, forward, turn
    run.measures["scoring: tokens/s through a block"] = shape.batch // 2 * shape.length / seconds
    data = torch.zeros(up_JH.numel() * min(32, shape.experts), dtype=torch.bfloat16)
    run.measures["sending weights, GB/s"] = 2 * data.numel() / 1e9 / clock(run, lambda: data.to(device))


def measure_rounding(run: Run) -> None:
    """GB of bfloat16 weights a second, from and to the host's memory."""
    import numpy as np

    from shardxform.formats import rounding, rounding_torch
    from shardxform.formats.scheme import Grid

    grid, shape = Grid(search=False), (run.shape.rounded_rows, max(run.shape.hidden, 128))
    bits = (np.random.default_rng(0).standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    out = rounding.QuantizedWeight.empty("gptq", grid, shape)
    rounds = partial(rounding_torch.quantize_on, bits, "BF16", grid, out, rounding_torch.open_device(run.device))
    with memory(run, "rounding"):
        rounds()
        run.measures["rounding: GB/s of bfloat16"] = bits.nbytes / 1e9 / min(clock(run, rounds) for _ in range(3))


def predicted(found: Mapping[str, float]) -> dict[str, float]:
    """Hours of the reference recipe on a machine like this one, by stage, as far as its parts were measured.

    Qwen3.5-35B-A3B, 256 -> 128 experts: scored on 256 x 512 tokens, healed with the default trials, tuned for 200
    iterations of 8 x 512. Passes over all windows are counted at the speed of scoring, reading at that of sending.
    """
    from shardxform.ask.recipe import Heal

    out: dict[str, float] = {}

    def mean(what: str) -> float | None:
        kinds = [found.get(f"{what}, {kind}: seconds an iteration") for kind in ("linear_attention", "full_attention")]
        linear, full = kinds
        return None if linear is None or full is None else 0.75 * linear + 0.25 * full

    rate, sent = found.get("scoring: tokens/s through a block"), found.get("sending weights, GB/s")
    passing = None if rate is None or sent is None else BLOCKS * (256 * 512 / rate + 1.7 / sent) / 3600
    if passing is not None:
        out["score 256 x 512 tokens"] = passing
    steps, tuning, healing = Heal().iters, mean("tuning"), mean("healing")
    if healing is not None and passing is not None:
        out[f"heal: {steps} steps a block, and a pass of the original"] = BLOCKS * steps * healing / 3600 + passing
    if tuning is not None and passing is not None:
        search = found.get("scale search, seconds a block (CPU)", 0.0)
        out["tune: 200 steps a block, the scale search, and a pass"] = BLOCKS * (200 * tuning + search) / 3600 + passing
    if len(out) == 3:
        out["in all"] = sum(out.values())
    return out


# -- all of it --------------------------------------------------------------------------------------------------------

CHECKS: Final = {
    "score": (10, check_score),
    "evaluate": (15, check_evaluate),
    "round to nearest": (10, check_rounding),
    "tuning": (40, check_tuning),
    "healing": (30, check_healing),
    "long windows": (60, check_long),
}


def work(run: Run, *, checks: bool) -> None:
    """Do what the minutes allow, what matters most first."""
    for name, (seconds, check) in CHECKS.items() if checks else ():
        run.do(name, seconds, partial(check, run))
    for kind in ("linear_attention", "full_attention"):
        run.do(f"measuring tuning, {kind}", 25, partial(measure_tuning, run, kind))
    run.do("measuring scoring", 20, partial(measure_scoring, run))
    for kind in ("linear_attention", "full_attention"):
        run.do(f"measuring healing, {kind}", 25, partial(measure_healing, run, kind))
    run.do("measuring rounding", 10, partial(measure_rounding, run))


def table(run: Run, hours: Mapping[str, float]) -> Iterator[str]:
    """All rows."""
    for name, row in run.checks.items():
        said = f"{row['found']:.2e}, at most {row['tolerance']:.0e}" if "tolerance" in row else row["found"]
        yield f"| {name} | {said} | {'OK' if row['ok'] else 'FAIL'} |"
    for name, value in run.measures.items():
        yield f"| {name} | {value / 1e9:.2f} GB | |" if name.endswith("bytes") else f"| {name} | {value:.4g} | |"
    for name, value in hours.items():
        yield f"| predicted, {name} | {value:.2f} h | |"
    for name, why in run.skipped.items():
        yield f"| {name} | left out: {why} | |"


def machine(device: str) -> dict[str, Any]:
    """What it was measured on."""
    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fla": find_spec("fla") is not None,
        "cpus": os.cpu_count(),
    }


def missing(device: str) -> str:
    """What keeps this script from running, in a line; empty when nothing does."""
    for name in ("torch", "transformers", "numpy", "click"):
        if find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as e:
        return f"--device {device}: {str(e).splitlines()[0]}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 when a check fails, 2 when nothing can be run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="as torch names it (default cuda)")
    parser.add_argument("--minutes", type=float, default=8.0, help="what it may take (default 8)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--no-checks", action="store_true", help="measure only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    args = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * args.minutes
    if reason := missing(args.device):
        say(f"gpu.py: {reason}")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        shape = SMALL if args.small else Shape()
        run = Run(device=args.device, shape=shape, ends=ends, scratch=Path(scratch))
        work(run, checks=not args.no_checks)
    from shardxform.base.progress import peak_rss_bytes

    run.measures["the process: peak RSS, bytes"] = peak_rss_bytes()
    hours = {} if args.small else predicted(run.measures)
    where = machine(args.device)
    sys.stdout.write("\n".join([f"{where}", "", "| | found | |", "|---|---|---|", *table(run, hours)]) + "\n")
    if args.json:
        found = {"machine": where, "checks": run.checks, "measures": run.measures, "skipped": run.skipped}
        args.json.write_text(json.dumps({**found, "predicted_hours": hours}, indent=2) + "\n")
    return int(not all(row["ok"] for row in run.checks.values()))


if __name__ == "__main__":
    sys.exit(main())
