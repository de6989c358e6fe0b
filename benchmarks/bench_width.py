"""Fewer experts or narrower ones: KL from the unpruned model at the same size, over several samples of text.

    python benchmarks/bench_width.py [--seeds 3] [--heal 0] [KEEPxWIDTH ...]

Scores examples/small-moe (16 experts of 128 channels) on 32 windows of 512 tokens, a document each, in an order that
a seed gives; keeps the experts with the most `energy`, and of each its best channels; measures on 32 x 256 held-out
tokens. With `--heal N` each is healed first (`all`, N steps, on the same windows). Prints mean and standard error.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from bench_criteria import SMALL_MOE, divergence, run, scored


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ["12x128", "16x96", "8x128", "11x96", "16x64", "4x128", "8x64", "16x32"]
    parser.add_argument("sizes", nargs="*", default=sizes, metavar="KEEPxWIDTH")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heal", type=int, default=0, help="steps; 0 for plain pruning")
    asked = parser.parse_args()
    print("| experts x channels | of 16 x 128 | KL |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for size in asked.sizes:
            keep, width = map(int, size.split("x"))
            found = [of(scratch, keep, width, asked.heal, seed) for seed in range(asked.seeds)]
            error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
            share = keep * width / (16 * 128)
            print(f"| {keep} x {width} | {share:.0%} | {statistics.fmean(found):.4f} ± {error:.4f} |", flush=True)


def of(scratch: Path, keep: int, width: int, heal: int, seed: int) -> float:
    """KL of one choice."""
    saliency, out = scored(SMALL_MOE, scratch, seed, "--channels"), scratch / f"{keep}x{width}-{seed}.json"
    narrow = ["--width", width] if width < 128 else []
    run("select", saliency, "--criterion", "energy", "--keep", keep, *narrow, "-o", out)
    return divergence(SMALL_MOE, scratch, out, heal, seed)


if __name__ == "__main__":
    main()
