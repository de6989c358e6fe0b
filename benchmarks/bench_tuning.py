"""Time and memory of tuning one decoder block of the real shape, with random weights, on the CPU.

    python benchmarks/bench_tuning.py --one [--threads 1] [--experts 128] [--tokens 512] [--dtype float32] [--json]
    python benchmarks/bench_tuning.py --upstream [--threads 1] [--experts 128] [--tokens 512]

`--one` tunes a linear-attention layer of Qwen3.5-35B-A3B's shape on one sequence. An iteration is the median time from
one forward pass that is followed by a backward pass to the next; on a busy machine look at the CPU seconds. Memory is
what the process held at most, less what it held after one forward pass of the 16-bit layer: the tuner's state, scratch
memory, and the activations of the backward pass. `--upstream` gives the same layer to auto-round in processes of its
own, and takes the time of an iteration from two runs of different length; at 128 experts it wants 19 GB.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
KEPT: Final = ("gate", "shared_expert_gate", "in_proj_a", "in_proj_b")
UPSTREAM_ITERATIONS: Final = (4, 44)  # what comes before the first varies by 20 s


def config(args: argparse.Namespace) -> Any:  # noqa: ANN401
    """The text config of the release, cut to one layer, and to as many experts as asked for."""
    from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe

    build: Any = configuration_qwen3_5_moe.Qwen3_5MoeTextConfig
    return build(
        vocab_size=2048,
        hidden_size=args.hidden,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        num_experts=args.experts,
        num_experts_per_tok=8,
        moe_intermediate_size=args.hidden // 4,
        shared_expert_intermediate_size=args.hidden // 4,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def random_model(args: argparse.Namespace) -> Any:  # noqa: ANN401
    """A bfloat16 model of one layer, of the same random weights every time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    build: Any = AutoModelForCausalLM.from_config
    model = build(config(args))
    torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
    return model.eval()


def memory(key: str) -> float:
    """Bytes of the process as Linux counts them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def import_everything() -> None:
    """Load libraries and compiled code, which are no memory of the tuner's."""
    from shardxform.tuning import kernels

    importlib.import_module("torch.utils.checkpoint")

    for dtype in ("BF16", "F32"):
        kernels.valuer("BF16", dtype)
        kernels.stepper("BF16", dtype)
    kernels.keeper("BF16")


def bytes_beside(weight: Any) -> int:  # noqa: ANN401
    """Bytes that are held beside the weights being tuned."""
    import torch

    held = {name: value for name, value in vars(weight).items() if isinstance(value, torch.Tensor)}
    return sum(value.nbytes for name, value in held.items() if name != "_w_RI")


def one(args: argparse.Namespace) -> dict[str, float]:
    """Tune the layer; time of an iteration in seconds, memory in bytes."""
    import numpy as np
    import torch

    from shardxform.formats.scheme import Grid
    from shardxform.forward.runtime import give_back, keep_few_kernels
    from shardxform.tuning.block import TuneOptions, install, tune_block
    from shardxform.tuning.linear_attention import frugal_linear_attention
    from shardxform.tuning.samples import Samples
    from shardxform.tuning.workers import Workers

    keep_few_kernels()
    torch.set_num_threads(args.threads)
    layer = random_model(args).model.layers[0]
    names = [
        name
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] not in KEPT
    ]
    weights = sum(layer.get_submodule(name).weight.numel() for name in names)
    weights += sum(parameter.numel() for parameter in layer.mlp.experts.parameters())
    dtype = getattr(torch, args.dtype)
    import_everything()
    with torch.no_grad():
        layer(torch.zeros(1, args.tokens, args.hidden, dtype=torch.bfloat16), position_embeddings=None)
    before = memory("VmRSS")
    forget_peak()
    with Workers(args.threads) as workers, frugal_linear_attention(layer, workers):
        began = time.monotonic()
        grid = Grid(search=not args.plain)
        block = install(layer, [*names, "mlp.experts"], grid, workers, recompute=args.tokens > 4096)
        layer.to(dtype)
        give_back()
        installed = time.monotonic() - began
        starts: list[tuple[float, float]] = []

        def forward(hidden_BTH: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                starts.append((time.monotonic(), time.process_time()))
            out: torch.Tensor = layer(hidden_BTH, position_embeddings=None)
            return out

        hidden_BTH = np.random.default_rng(0).standard_normal((1, args.tokens, args.hidden), np.float32)
        samples = Samples(block=0, hidden_NTH=hidden_BTH, target_NTH=1.01 * hidden_BTH)
        options = TuneOptions(seed=0, iters=args.iterations, dtype=dtype)
        began = time.monotonic()
        tune_block(block, forward, samples, options)
        total = time.monotonic() - began
    peak = memory("VmHWM")
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(starts)]
    return {
        "iteration_s": statistics.median(wall for wall, _ in steps),
        "iteration_cpu_s": statistics.median(cpu for _, cpu in steps),
        "prepare_s": installed,
        "total_s": total,
        "weights": float(weights),
        "peak_rss_bytes": peak,
        "state_bytes_per_weight": sum(bytes_beside(weight) for weight in block.weights) / weights,
        "bytes_per_weight_above_block": (peak - before) / weights,
    }


def upstream(args: argparse.Namespace) -> dict[str, float]:
    """auto-round in processes of their own, with two numbers of iterations; seconds of one, bytes at most."""
    runs = []
    for iterations in UPSTREAM_ITERATIONS:
        command = [sys.executable, __file__, "--upstream-run", str(iterations), "--experts", str(args.experts)]
        command += ["--tokens", str(args.tokens), "--hidden", str(args.hidden)]
        command += ["--compile"] if args.compile else []
        command += ["--threads", str(args.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
        out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs.append(json.loads(out.splitlines()[-1]))
    few, many = UPSTREAM_ITERATIONS
    return {
        "iteration_s": (runs[1]["seconds"] - runs[0]["seconds"]) / (many - few),
        "iteration_cpu_s": (runs[1]["cpu_seconds"] - runs[0]["cpu_seconds"]) / (many - few),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def upstream_run(args: argparse.Namespace) -> dict[str, float]:
    """Let auto-round tune the layer, in this process."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    model = random_model(args)
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MOE)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.json"
        document = " ".join(str(i) for i in range(4 * args.tokens))
        text.write_text(json.dumps([{"text": document}]))
        began, began_cpu = time.monotonic(), time.process_time()
        AutoRound(
            model,
            tokenizer,
            scheme="W4A16",
            iters=args.upstream_run,
            nsamples=1,
            seqlen=args.tokens,
            batch_size=1,
            dataset=str(text),
            device_map="cpu",
            enable_torch_compile=args.compile,
        ).quantize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - began_cpu,
        "peak_rss_bytes": peak,
    }


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--one", action="store_true", help="tune one layer with this package")
    what.add_argument("--upstream", action="store_true", help="tune one layer with auto-round")
    what.add_argument("--upstream-run", type=int, metavar="ITERATIONS", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--experts", type=int, default=128, help="routed experts (default 128)")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size; a fourth inside experts (default 2048)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the sequence (default 512)")
    parser.add_argument("--iterations", type=int, default=6, help="steps (default 6)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the hidden states")
    parser.add_argument("--plain", action="store_true", help="start from min/max scales, without the search")
    parser.add_argument("--compile", action="store_true", help="let auto-round use torch.compile, its default")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args()
    figures = one(args) if args.one else upstream(args) if args.upstream else upstream_run(args)
    if args.json or args.upstream_run:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:30}{value:16,.3f}")


if __name__ == "__main__":
    main()
