"""Which criterion keeps the better experts: how far what is left is from the unpruned model, over samples of text.

    python benchmarks/bench_criteria.py [--keep 12 8 4] [--seeds 5] [--heal 0] [--criteria NAME ...] [--source DIR]
                                        [--work DIR]

Scores examples/small-moe once on each sample: 32 windows of 512 tokens, a document each, in an order that a seed gives;
chooses by each criterion; measures on 32 x 256 held-out tokens. Prints mean KL in nats and mean perplexity over the
seeds, with their standard errors. With `--heal N` every choice is healed first, on the windows it was chosen by: `all`,
N steps of 4 windows, the first step 0.016. `random` draws the experts. What was measured is kept in `--work`, and not
measured again. Everything runs in this process, through the commands that a user types.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from click.testing import CliRunner

from shardxform.cli import main as shardxform
from shardxform.experts.choosing import CRITERIA, WEIGHTS

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
TYPE: Final = ("--dtype", "float32")
IMPORTED: Final = frozenset({"output-energy"})
"""Criteria that no file of `score` serves."""


@dataclass(frozen=True)
class Distance:
    """How far a pruned model is from its source: KL in nats, and perplexity."""

    kl: float
    perplexity: float


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


def scored(source: Path, scratch: Path, seed: int, *options: str) -> Path:
    """The saliency of a sample, scored once."""
    out = scratch / f"{seed}.saliency"
    if not out.exists():
        run("score", source, "-o", out, "-q", *options, *TYPE, *text(source, seed))
    return out


def chosen(source: Path, scratch: Path, criterion: str, keep: int, seed: int) -> Path:
    """The manifest of a criterion."""
    out = scratch / f"{criterion}-{keep}-{seed}.json"
    if criterion == "random":
        manifest = json.loads(chosen(source, scratch, "frequency", keep, seed).read_text())
        draw = random.Random(seed)
        experts = int(json.loads((source / "config.json").read_text())["num_experts"])
        manifest["keep"] = {layer: sorted(draw.sample(range(experts), keep)) for layer in manifest["keep"]}
        out.write_text(json.dumps(manifest))
        return out
    saliency = source if criterion in WEIGHTS else scored(source, scratch, seed)
    run("select", saliency, "--criterion", criterion, "--keep", keep, "-o", out, "-q")
    return out


def distance(source: Path, scratch: Path, manifest: Path, heal: int, seed: int) -> Distance:
    """How far what the manifest leaves is from the source; healed, if asked for."""
    if not heal:
        return measured(source, scratch, source, "-m", manifest)
    return measured(source, scratch, pruned(source, scratch, manifest, heal, seed))


def pruned(source: Path, scratch: Path, manifest: Path, heal: int, seed: int) -> Path:
    """The pruned checkpoint; healed, if asked for."""
    out = scratch / "pruned"
    shutil.rmtree(out, ignore_errors=True)
    how = ["--heal=all", "--heal-iters", heal, "--heal-lr", 0.016, "--batch-size", 4, *TYPE, *text(source, seed)]
    run("prune", source, out, "-m", manifest, "-q", *(how if heal else []))
    return out


def measured(source: Path, scratch: Path, *model: object) -> Distance:
    """How far a model is from the source, by held-out text."""
    held_out = ["--data", source / "text" / "heldout.jsonl", "--samples", 32, "--seqlen", 256, *TYPE]
    told = run("evaluate", *model, "--against", source, *held_out, "--work", scratch / "evaluate.work", "--json", "-q")
    found = json.loads(told)
    return Distance(float(found["against"]["kl"]), float(found["perplexity"]))


def divergence(source: Path, scratch: Path, manifest: Path, heal: int, seed: int) -> float:
    """KL of what the manifest leaves, healed if asked for, from the source."""
    return distance(source, scratch, manifest, heal, seed).kl


@dataclass(frozen=True)
class Figures:
    """What was measured, kept in a file of one line a figure."""

    path: Path

    def once(self, key: str, measure: Callable[[], Distance]) -> Distance:
        """The distance of this key, measured unless it was before."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for name, kl, perplexity in map(json.loads, lines):
            if name == key:
                return Distance(kl, perplexity)
        found = measure()
        with self.path.open("a") as file:
            file.write(json.dumps([key, found.kl, found.perplexity]) + "\n")
        return found


def told(found: list[float], digits: int) -> str:
    """Mean and standard error over the samples; the figure alone where there is one."""
    mean = f"{statistics.fmean(found):.{digits}f}"
    return mean if len(set(found)) == 1 else f"{mean} ± {statistics.stdev(found) / len(found) ** 0.5:.{digits}f}"


def cells(figures: Figures, scratch: Path, asked: argparse.Namespace, criterion: str) -> list[str]:
    """Mean and standard error of KL, then of perplexity, for each number of experts."""
    kls: list[str] = []
    perplexities: list[str] = []
    for keep in asked.keep:
        found: list[Distance] = []
        for seed in range(1 if criterion in WEIGHTS and not asked.heal else asked.seeds):

            def measure(keep: int = keep, seed: int = seed) -> Distance:
                manifest = chosen(asked.source, scratch, criterion, keep, seed)
                return distance(asked.source, scratch, manifest, asked.heal, seed)

            found.append(figures.once(f"{criterion} {keep} {asked.heal} {seed}", measure))
        kls.append(told([one.kl for one in found], 4))
        perplexities.append(told([one.perplexity for one in found], 2))
        print(criterion, keep, kls[-1], perplexities[-1], flush=True)
    return kls + perplexities


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[12, 8, 4])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--heal", type=int, default=0, help="steps; 0 for plain pruning")
    parser.add_argument("--criteria", nargs="+", default=[*(c for c in CRITERIA if c not in IMPORTED), "random"])
    parser.add_argument("--source", type=Path, default=SMALL_MOE)
    parser.add_argument("--work", type=Path, help="a folder for what was measured")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = asked.work or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        figures = Figures(scratch / "figures.jsonl")
        table = [(criterion, cells(figures, scratch, asked, criterion)) for criterion in asked.criteria]
    names = [f"{what}, {keep} kept" for what in ("KL", "perplexity") for keep in asked.keep]
    print("| criterion | " + " | ".join(names) + " |")
    print("|---|" + "---:|" * len(names))
    for criterion, row in table:
        print(f"| {criterion} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
