"""Write a keep manifest by weight norm: the experts with the largest weights stay. Needs numpy, reads each tensor once.

    python scripts/make_small_manifest.py examples/small-moe manifests/small-moe-keep8.json --keep 8

This is how manifests/small-moe-keep8.json was made. Norms need no data and no forward pass, and say little about what
an expert is worth: good for a first try, and as the baseline that a saliency from activations has to beat. Handles
experts stored fused, in bfloat16, without MTP layers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shardxform.checkpoint import Checkpoint
from shardxform.layout import layout_of
from shardxform.manifest import Manifest


def squared_norms(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float64]:
    """Sum of squares of every expert's part of a fused bfloat16 tensor."""
    ref = checkpoint.tensors[name]
    if ref.spec.dtype != "BF16" or len(ref.spec.shape) != 3:
        raise SystemExit(f"tensor '{name}': expected fused bfloat16 experts, found {ref.spec.dtype} {ref.spec.shape}")
    place = ref.ranges[0]
    data = np.fromfile(checkpoint.root / place.file, np.uint16, math.prod(ref.spec.shape), offset=place.offset)
    values = (data.astype(np.uint32) << 16).view(np.float32).reshape(ref.spec.shape[0], -1)
    norms: npt.NDArray[np.float64] = np.square(values, dtype=np.float64).sum(axis=1)
    return norms


def by_magnitude(checkpoint: Checkpoint, count: int) -> Manifest:
    """Keep the `count` experts of every layer whose weights have the largest Frobenius norm; ties to the lower id."""
    layout = layout_of(checkpoint.config, checkpoint.tensors)
    norms: dict[int, npt.NDArray[np.float64]] = defaultdict(lambda: np.zeros(layout.num_experts))
    for name, place in layout.places.items():
        if place.scope == "block" and place.role == "routed experts":
            assert place.layer is not None
            norms[place.layer] += squared_norms(checkpoint, name)
    order = {layer: np.argsort(-norms[layer], kind="stable") for layer in sorted(norms)}
    manifest = Manifest(
        keep={layer: tuple(sorted(int(expert) for expert in ids[:count])) for layer, ids in order.items()},
        model={
            "model_type": layout.wrapper.model_type,
            "num_layers": layout.num_layers,
            "num_experts": layout.num_experts,
        },
        criterion="magnitude",
        ratio=1 - count / layout.num_experts,
        provenance={"tool": "scripts/make_small_manifest.py", "score": "Frobenius norm of an expert's weights"},
    )
    manifest.check(layout)
    return manifest


def pretty(manifest: Manifest) -> str:
    """JSON with one list of ids per line."""
    lines = json.dumps(manifest.to_dict(), indent=2, default=list)
    for ids in (*manifest.keep.values(), *manifest.mtp_keep.values()):
        lines = lines.replace("[\n      " + ",\n      ".join(map(str, ids)) + "\n    ]", json.dumps(list(ids)))
    return lines + "\n"


def main() -> None:
    """Write the manifest that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a keep manifest by weight norm.")
    parser.add_argument("source", type=Path, help="checkpoint directory")
    parser.add_argument("out", type=Path, help="the manifest")
    parser.add_argument("--keep", type=int, required=True, help="experts to keep per layer")
    given = parser.parse_args()
    given.out.write_text(pretty(by_magnitude(Checkpoint.open(given.source), given.keep)), encoding="utf-8")


if __name__ == "__main__":
    main()
