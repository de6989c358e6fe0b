"""Which criterion keeps the better experts: KL from the unpruned model, over several samples of calibration text.

    python benchmarks/bench_criteria.py [--keep 12 8 4] [--seeds 5] [--heal 0] [--criteria NAME ...] [--source DIR]

Scores examples/small-moe on 32 windows of 512 tokens, a document each, in an order that a seed gives; chooses by each
criterion; measures on 32 x 256 held-out tokens. Prints the mean over the seeds and its standard error, in nats. With
`--heal N` every choice is healed first (`all`, N steps, on the windows it was chosen by). `random` draws the experts.
Everything runs in this process, through the commands that a user types.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from click.testing import CliRunner

from shardxform.cli import main as shardxform
from shardxform.experts.choosing import CRITERIA, WEIGHTS

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
TYPE: Final = ("--dtype", "float32")


def run(*words: object) -> str:
    """Run a command; gives what it prints."""
    result = CliRunner().invoke(shardxform, [str(word) for word in words], catch_exceptions=False)
    if result.exit_code:
        raise SystemExit(result.output)
    return result.stdout


def text(source: Path, seed: int) -> list[object]:
    """Options that name the windows of a sample."""
    data = source / "text" / "calib.jsonl"
    return ["--data", data, "--samples", 32, "--seqlen", 512, "--no-pack", "--seed", seed]


def chosen(source: Path, scratch: Path, criterion: str, keep: int, seed: int) -> Path:
    """The manifest of a criterion; scored once for each seed."""
    out = scratch / f"{criterion}-{keep}-{seed}.json"
    if criterion == "random":
        scored = chosen(source, scratch, "frequency", keep, seed)
        manifest = json.loads(scored.read_text())
        draw = random.Random(seed)
        experts = int(json.loads((source / "config.json").read_text())["num_experts"])
        manifest["keep"] = {layer: sorted(draw.sample(range(experts), keep)) for layer in manifest["keep"]}
        out.write_text(json.dumps(manifest))
        return out
    saliency = source if criterion in WEIGHTS else scratch / f"{seed}.saliency"
    if criterion not in WEIGHTS:
        run("score", source, "-o", saliency, "-q", *TYPE, *text(source, seed))
    run("select", saliency, "--criterion", criterion, "--keep", keep, "-o", out)
    return out


def divergence(source: Path, scratch: Path, manifest: Path, heal: int, seed: int) -> float:
    """KL of what the manifest leaves, healed if asked for, from the source."""
    held_out = ["--data", source / "text" / "heldout.jsonl", "--samples", 32, "--seqlen", 256, "--json", *TYPE]
    work = ["--work", scratch / "evaluate.work"]
    if not heal:
        told = run("evaluate", source, "-m", manifest, "--against", source, *held_out, *work)
    else:
        out = scratch / f"{manifest.stem}-healed"
        run("prune", source, out, "-m", manifest, "--heal=all", "--heal-iters", heal, "-q", *TYPE, *text(source, seed))
        told = run("evaluate", out, "--against", source, *held_out, *work)
    return float(json.loads(told)["against"]["kl"])


def figures(source: Path, scratch: Path, asked: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """A row for every criterion: mean and standard error for each number of experts."""
    for criterion in asked.criteria:
        cells: list[str] = []
        for keep in asked.keep:
            seeds = range(1 if criterion in WEIGHTS and not asked.heal else asked.seeds)
            found = [
                divergence(source, scratch, chosen(source, scratch, criterion, keep, seed), asked.heal, seed)
                for seed in seeds
            ]
            error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
            cells.append(f"{statistics.fmean(found):.4f} ± {error:.4f}" if error else f"{found[0]:.4f}")
            print(criterion, keep, cells[-1], flush=True)
        yield criterion, cells


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[12, 8, 4])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--heal", type=int, default=0, help="steps; 0 for plain pruning")
    parser.add_argument("--criteria", nargs="+", default=[*CRITERIA, "random"])
    parser.add_argument("--source", type=Path, default=SMALL_MOE)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = list(figures(asked.source, Path(folder), asked))
    print("| criterion | " + " | ".join(f"{keep} kept" for keep in asked.keep) + " |")
    print("|---|" + "---:|" * len(asked.keep))
    for criterion, cells in table:
        print(f"| {criterion} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
