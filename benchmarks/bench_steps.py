"""How large the first step of healing should be, on one block of each model, judged on held-out windows.

    python benchmarks/bench_steps.py MODEL [MODEL ...] [--layer 1] [--windows 16 64] [--iters 32]
        [--rates 0.01 0.02 0.04 0.08 0.16]

MODEL is examples/small-moe, or a checkpoint of `small_moes.py`. Half the experts are kept by REAP sum of 64 x 512
tokens of the calibration text of examples/small-moe. The block takes what the pruned blocks before it put out, learns
from the first `--windows` of these windows in steps of four, and is judged on 12 x 512 held-out tokens: squared error
relative to each token's size, in parts of that of the block as it was pruned. `searched` is the step that healing takes
by itself, here by these judges. A whole model takes minutes: see `bench_heal.py steps`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

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
from shardxform.tuning.heal import _Run
from shardxform.tuning.healer import BlockHealer
from shardxform.tuning.linear_attention import frugal_linear_attention
from shardxform.tuning.samples import Samples, Split
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
        for windows in args.windows:
            for iters in args.iters:
                for rate in (*args.rates, None):
                    began = time.process_time()
                    run = _Run(
                        healer._load, samples, Heal(what="all", iters=iters, batch_size=BATCH), SEED, torch.float32
                    )
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
    tried = " ".join(f"{lr:.3g}" for _, lr, _ in result.tried)
    return f"searched  {result.lr:<8.3g}{result.loss / result.start_loss:7.4f}  tried {tried}"


def main() -> None:
    """Print a line as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--windows", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--iters", nargs="+", type=int, default=[32])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.01, 0.02, 0.04, 0.08, 0.16])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models:
        for line in heal(model, args):
            print(line, flush=True)


if __name__ == "__main__":
    main()
