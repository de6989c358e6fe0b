"""Perplexity and divergence of a pruned checkpoint against its source, by what the experts were chosen by.

    python benchmarks/bench_pruning.py [--source examples/small-moe] [--keep 8] [--random 5] [--json]

Scores the source on calibration text (SOURCE/text/calib.jsonl, 64 x 512 tokens, packed), chooses by every criterion
there is and, for comparison, at random (numpy seeds 0, 1, ...), and evaluates each choice as a view, nothing written,
on held-out text (SOURCE/text/heldout.jsonl, 32 x 256 tokens). float32 on the CPU. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers.utils import logging

from shardxform.ask.manifest import Manifest
from shardxform.calibration import DataOptions, Windows, load_windows
from shardxform.checkpoint.table import Checkpoint
from shardxform.evaluation.evaluate import EvaluateOptions, evaluate
from shardxform.experts import CRITERIA, Saliency, choose
from shardxform.experts.scoring import ScoreOptions, score
from shardxform.forward.weights import Precision
from shardxform.plan.view import pruned_view

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
CPU: Final = Precision(torch.device("cpu"), torch.float32)
RANDOM: Final = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One choice of experts; `kl_error` is the standard error of `kl` over the windows, `top1` a share."""

    name: str
    perplexity: float
    kl: float
    kl_error: float
    top1: float


def random_keep(saliency: Saliency, keep: int, seed: int) -> Manifest:
    """As many experts of every layer, drawn without looking at them; layers in ascending order, MTP layers last."""
    rng = np.random.default_rng(seed)

    def drawn() -> tuple[int, ...]:
        return tuple(sorted(rng.choice(saliency.num_experts, keep, replace=False).tolist()))

    return Manifest(
        keep={layer: drawn() for layer in saliency.layers}, mtp_keep={layer: drawn() for layer in saliency.mtp_layers}
    )


def choices(saliency: Saliency, args: argparse.Namespace) -> Iterator[tuple[str, Manifest]]:
    """Every criterion, then the random draws."""
    for criterion in CRITERIA:
        yield criterion, choose(saliency, args.keep, criterion)
    for seed in range(args.random):
        yield f"{RANDOM} {seed}", random_keep(saliency, args.keep, seed)


def measure(source: Checkpoint, windows: Windows, named: tuple[str, Manifest], work: Path) -> tuple[Row, float]:
    """Evaluate one choice, and the source with it, whose perplexity comes second."""
    name, manifest = named
    options = EvaluateOptions(precision=CPU, work=work)
    found = evaluate(pruned_view(source, manifest).checkpoint, windows, options, source)
    against = found.against
    assert against is not None
    row = Row(name=name, perplexity=found.perplexity, kl=against.kl, kl_error=against.kl_error, top1=against.top1)
    return row, against.perplexity


def table(rows: Sequence[Row], reference: float) -> Iterator[str]:
    """Lines of the table: criteria from the best, then the mean of the random draws, the best and the worst of them."""
    by_perplexity = sorted(rows, key=lambda row: row.perplexity)
    drawn = [row for row in by_perplexity if row.name.startswith(RANDOM)]
    yield f"{'':18}{'perplexity':>10}{'KL':>9}{'+-':>9}{'top-1':>9}"
    yield _line("16-bit source", Row(name="", perplexity=reference, kl=0.0, kl_error=math.nan, top1=1.0))
    yield from (_line(row.name, row) for row in by_perplexity if row not in drawn)
    if drawn:
        mean = {key: fmean(getattr(row, key) for row in drawn) for key in ("perplexity", "kl", "top1")}
        yield _line(f"{RANDOM}, mean of {len(drawn)}", Row(name="", kl_error=math.nan, **mean))
        yield _line(f"{RANDOM}, best", drawn[0])
        yield _line(f"{RANDOM}, worst", drawn[-1])


def _line(name: str, row: Row) -> str:
    error = "" if math.isnan(row.kl_error) else f"{row.kl_error:.4f}"
    return f"{name:18}{row.perplexity:10.3f}{row.kl:9.4f}{error:>9}{row.top1:9.1%}"


def options_of(text: Path, default: Path, size: Sequence[int]) -> DataOptions:
    """Packed windows of a text, as the commands cut them by default."""
    return DataOptions(data=str(text or default), samples=size[0], seqlen=size[1])


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SMALL_MOE, help="16-bit checkpoint (default examples/small-moe)")
    parser.add_argument("--calib", type=Path, help="text to score on (default SOURCE/text/calib.jsonl)")
    parser.add_argument("--heldout", type=Path, help="text to evaluate on (default SOURCE/text/heldout.jsonl)")
    pair: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("WINDOWS", "TOKENS")}
    parser.add_argument("--calib-size", default=(64, 512), help="default 64 512", **pair)
    parser.add_argument("--heldout-size", default=(32, 256), help="default 32 256", **pair)
    parser.add_argument("--keep", type=int, default=8, help="experts to keep in every layer (default 8)")
    parser.add_argument("--random", type=int, default=5, metavar="N", help="random choices (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args()


def main() -> None:
    """Score once, evaluate every choice, print."""
    args = parsed()
    quiet: Any = logging
    quiet.set_verbosity_error()
    source, text = Checkpoint.open(args.source), args.source / "text"
    calib = load_windows(args.source, options_of(args.calib, text / "calib.jsonl", args.calib_size))
    heldout = load_windows(args.source, options_of(args.heldout, text / "heldout.jsonl", args.heldout_size))
    with tempfile.TemporaryDirectory() as folder:
        saliency = score(source, calib, ScoreOptions(precision=CPU, work=Path(folder) / "score"))
        named = list(choices(saliency, args))
        found = [measure(source, heldout, each, Path(folder) / "evaluate") for each in named]
    rows, reference = [row for row, _ in found], found[0][1]
    if args.json:
        facts = {"reference": reference, "calib": dict(calib.provenance), "heldout": dict(heldout.provenance)}
        keeps = {name: {str(layer): ids for layer, ids in each.keep.items()} for name, each in named}
        rows_json = [{**asdict(row), "keep": keeps[row.name]} for row in rows]
        print(json.dumps({"experts": saliency.num_experts, "kept": args.keep, **facts, "rows": rows_json}))
        return
    print(f"{args.keep} of {saliency.num_experts} experts kept, {heldout.provenance['tokens']:,} held-out tokens")
    print("\n".join(table(rows, reference)))


if __name__ == "__main__":
    main()
