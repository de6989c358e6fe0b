"""Time and memory of the gated delta rule, forward and backward: transformers' torch version and the one of tuning.

    python benchmarks/bench_delta_rule.py [--positions 512 2048] [--samples 1 4]

At the shapes of Qwen3.5-35B-A3B, on one thread. With several samples, the inside of each is forgotten and made again
when its gradient arrives: as tuning does it, and for transformers' version by checkpointing one sample after the other.
Every figure is from a process of its own: CPU seconds are the least of three turns, memory is the peak above what the
inputs take.
"""

# ruff: noqa: ANN401

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

KEY_HEADS: Final = 16
VALUE_HEADS: Final = 32
WIDTH: Final = 128
TURNS: Final = 3


def theirs(rule: Callable[..., Any]) -> Callable[..., Any]:
    """`rule`, checkpointed sample by sample where there are several."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def each(*tensors: Any) -> Any:
        def one(*sample: Any) -> Any:
            query, key, value, g, beta = sample
            return rule(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

        if len(tensors[0]) == 1:
            return one(*tensors)
        samples = zip(*(tensor.split(1) for tensor in tensors), strict=True)
        return torch.cat([checkpoint(one, *s, use_reentrant=False, preserve_rng_state=False) for s in samples])

    return each


def ours() -> Callable[..., Any]:
    """The rule as tuning calls it."""
    from shardxform.tuning.delta_rule import gated_delta_rule
    from shardxform.tuning.linear_attention import one_by_one
    from shardxform.tuning.workers import Workers

    rule = one_by_one(gated_delta_rule, Workers(1))
    return lambda q, k, v, g, beta: rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def measure(which: str, samples: int, positions: int) -> dict[str, float]:
    """CPU seconds and bytes, in this process."""
    import torch
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

    torch.set_num_threads(1)
    rule = ours() if which == "ours" else theirs(modeling.torch_chunk_gated_delta_rule)
    wide = [torch.randn(samples, positions, heads, WIDTH) for heads in (KEY_HEADS, KEY_HEADS, VALUE_HEADS)]
    narrow = [-torch.rand(samples, positions, VALUE_HEADS), torch.rand(samples, positions, VALUE_HEADS)]
    tensors = [*(x.bfloat16() for x in wide), narrow[0], narrow[1].bfloat16()]
    tensors = [x.requires_grad_() for x in tensors]
    del wide
    before, seconds = peak(), []
    for _ in range(TURNS):
        began = time.process_time()
        out = rule(*tensors)
        out.backward(torch.ones_like(out))
        seconds.append(time.process_time() - began)
        del out
        for tensor in tensors:
            tensor.grad = None
    return {"seconds": min(seconds), "bytes": peak() - before}


def peak() -> float:
    """Most bytes that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 2048], help="of a sample")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="of a batch")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        which, samples, positions = args.one
        print(json.dumps(measure(which, int(samples), int(positions))))
        return
    print(f"{'samples x positions':22}{'version':14}{'CPU':>9}{'memory':>11}")
    for samples in args.samples:
        for positions in args.positions:
            for which in ("transformers", "ours"):
                command = [sys.executable, __file__, "--one", which, str(samples), str(positions)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found = json.loads(out.splitlines()[-1])
                case = f"{samples} x {positions}"
                print(f"{case:22}{which:14}{found['seconds']:7.2f} s{found['bytes'] / 1e6:8.0f} MB")


if __name__ == "__main__":
    main()
