"""Memory and time of `shardxform score` on blocks of the real shape, and what scoring costs beyond a forward pass.

    python benchmarks/bench_score.py --dir SCRATCH [--layers 4] [--sequences 8] [--length 512] [--json]

Writes a checkpoint of the shapes of Qwen3.5-35B-A3B (10.6 GB with four blocks, no MTP layer unless --mtp), with the
tokenizer and the calibration text of examples/small-moe, removed at the end unless --keep. Then runs, in turn: the
`score` process as a user would, its peak resident memory as the kernel counts it; and in one process, for every block,
a plain pass and a scoring pass over the same hidden states, taking turns, all experts read beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from synth import Spec, write_checkpoint
from transformers.utils import logging

from shardxform.calibration import DataOptions, Windows, load_windows
from shardxform.checkpoint.table import Checkpoint
from shardxform.experts.scoring import Scorer
from shardxform.forward.passes import batches
from shardxform.forward.skeleton import Skeleton
from shardxform.forward.weights import Precision, Weights

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
TEXT: Final = SMALL_MOE / "text" / "calib.jsonl"


def make_checkpoint(out: Path, layers: int, mtp: bool) -> None:
    """Write blocks of the real shape, and a tokenizer whose ids all lie in its vocabulary."""
    write_checkpoint(out, Spec(layers=layers, text_only=True, mtp=mtp, vocab=2048))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MOE / name, out / name)


def run_score(checkpoint: Path, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The process that a user starts; wall time, CPU time and peak memory of it."""
    out = scratch / "saliency.safetensors"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "shardxform", "score", str(checkpoint), "-o", str(out), "--data", str(TEXT)]
    command += ["--samples", str(args.sequences), "--seqlen", str(args.length), "--quiet", "--json"]
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"score ended with {status}")
    facts = json.loads(printed)
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": facts["peak_rss_bytes"],
        "tokens": facts["tokens"],
    }


def compare(checkpoint: Path, windows: Windows, rounds: int) -> list[dict[str, Any]]:
    """CPU seconds of a plain and of a scoring pass through each block, on the same random hidden states."""
    rows = []
    precision = Precision(torch.device("cpu"), torch.float32)
    with Weights(Checkpoint.open(checkpoint), precision) as weights, torch.no_grad():
        skeleton = Skeleton(weights)
        for layer in range(skeleton.num_blocks):
            scorer = Scorer(weights.layout.num_experts)
            with skeleton.block(layer) as block:
                plain, scored = [], []
                pass_through(block, skeleton, windows)  # reads the experts
                for _ in range(rounds):
                    block.bank.observer = None
                    plain.append(pass_through(block, skeleton, windows))
                    block.bank.observer = scorer.observer("")
                    scored.append(pass_through(block, skeleton, windows))
            ratios = [s / p for s, p in zip(scored, plain, strict=True)]
            rows.append(
                {"block": layer, "plain": min(plain), "scored": min(scored), "ratio": statistics.median(ratios)}
            )
    return rows


def pass_through(block: Any, skeleton: Skeleton, windows: Windows) -> float:  # noqa: ANN401
    """CPU seconds of one pass of all windows through a block, which other processes disturb less than the clock."""
    started = time.process_time()
    for batch in batches(windows):
        generator = torch.Generator().manual_seed(batch.start)
        hidden = torch.randn(*batch.ids_BT.shape, skeleton.hidden_size, generator=generator)
        block(hidden)
    return time.process_time() - started


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Measure scoring on blocks of the real shape.")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="scratch directory")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="turns of plain and scoring passes")
    parser.add_argument("--mtp", action="store_true", help="with the MTP layer")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint for the next run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    quiet: Any = logging
    quiet.set_verbosity_error()
    checkpoint = args.dir / f"shardxform-real-{args.layers}{'-mtp' if args.mtp else ''}"
    try:
        if not checkpoint.exists():
            make_checkpoint(checkpoint, args.layers, args.mtp)
        whole = run_score(checkpoint, args.dir, args)
        windows = load_windows(checkpoint, DataOptions(data=str(TEXT), samples=args.sequences, seqlen=args.length))
        rows = compare(checkpoint, windows, args.rounds)
    finally:
        (args.dir / "saliency.safetensors").unlink(missing_ok=True)
        if not args.keep:
            shutil.rmtree(checkpoint, ignore_errors=True)
    if args.json:
        print(json.dumps({"score": whole, "blocks": rows}))
        return
    print(f"score, {args.layers} blocks, {whole['tokens']:,} tokens, {torch.get_num_threads()} threads:")
    print(
        f"  {whole['seconds']:.1f} s, {whole['cpu_seconds']:.1f} CPU s, peak RSS {whole['peak_rss_bytes'] / 1e9:.2f} GB"
    )
    print("block   plain  scored  ratio (median of turns)")
    for row in rows:
        print(f"{row['block']:>5} {row['plain']:>6.2f}s {row['scored']:>6.2f}s {row['ratio']:>6.3f}")


if __name__ == "__main__":
    main()
