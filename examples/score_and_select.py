"""Score experts through the library, compare criteria, and write the choice of one as a keep manifest.

    python examples/score_and_select.py [KEEP.json]

Scoring runs the model once; every criterion is then made of the same sums. Needs torch and transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from shardxform import Checkpoint
from shardxform.ask.manifest import manifest_text
from shardxform.calibration import DataOptions, load_windows
from shardxform.experts import decide
from shardxform.experts.scoring import ScoreOptions, score
from shardxform.forward.weights import Precision

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "examples" / "small-moe"
KEPT = 8


def main(path: Path) -> None:
    """Score on 16 windows of 256 tokens, and write which experts stay to `path`."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    text = DataOptions(data=str(SOURCE / "text" / "calib.jsonl"), samples=16, seqlen=256)
    windows = load_windows(SOURCE, text)
    with tempfile.TemporaryDirectory() as work:  # hidden states between blocks
        precision = Precision(torch.device("cpu"), torch.float32)
        saliency = score(
            Checkpoint.open(SOURCE), windows, ScoreOptions(precision=precision, work=Path(work) / "states")
        )

    by_reap = decide(saliency, KEPT, "reap")
    by_count = decide(saliency, KEPT, "frequency")
    for layer, choice in by_reap.layers.items():
        same = set(choice.keep) & set(by_count.layers[layer].keep)
        print(f"layer {layer}: keeps {list(choice.keep)}; by frequency {len(same)} of them would stay")

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(manifest_text(by_reap.manifest()))
    print(f"{path}: written; shardxform prune {SOURCE} OUT --manifest {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/score-and-select.json"))
