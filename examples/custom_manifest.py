"""Choose experts by a rule of your own, write the keep manifest, and see what it would cost before anything is written.

    python examples/custom_manifest.py [KEEP.json]

The rule here: keep the experts whose weights are largest. It is a poor one, which `evaluate --manifest` shows without
writing a pruned checkpoint; what matters is that a manifest is plain data, checked against the model before it is used.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardxform import Checkpoint, Manifest, plan_prune
from shardxform.ask.manifest import manifest_text
from shardxform.model.layout import layout_of

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "examples" / "small-moe"
KEPT = 8


def squares_of_experts(source: Checkpoint, name: str) -> NDArray[np.float64]:
    """Sum of squares of every expert's slab of a fused bfloat16 tensor [E, ...], read as bytes."""
    ref = source.tensors[name]
    (place,) = ref.ranges
    bits = np.fromfile(source.root / place.file, np.uint16, place.length // 2, offset=place.offset)
    values = (bits.astype(np.uint32) << 16).view(np.float32).reshape(ref.spec.shape[0], -1)
    squares_E: NDArray[np.float64] = np.square(values, dtype=np.float64).sum(axis=1)
    return squares_E


def main(path: Path) -> None:
    """Write the manifest, and print what pruning by it would give."""
    source = Checkpoint.open(SOURCE)
    layout = layout_of(source.config, source.tensors)
    keep = {}
    for layer in layout.moe_layers:
        squares_E = squares_of_experts(source, f"model.layers.{layer}.mlp.experts.down_proj")
        keep[layer] = tuple(sorted(int(e) for e in np.argsort(-squares_E)[:KEPT]))  # ascending: keep[new] = old

    facts = {"model_type": layout.wrapper.model_type, "num_layers": layout.num_layers}
    manifest = Manifest(
        keep=keep,
        model={**facts, "num_experts": layout.num_experts},
        criterion="sum of squares of down_proj",
        provenance={"tool": "examples/custom_manifest.py"},
    )
    manifest.check(layout)  # what `prune` would refuse, it refuses here

    plan = plan_prune(source, manifest)
    print(f"{source.nbytes:,} -> {plan.data_bytes:,} bytes in {len(plan.shards)} shard, if it were written")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(manifest_text(manifest))
    print(f"{path}: written; shardxform evaluate {SOURCE} --manifest {path} --against {SOURCE} --data TEXT")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/custom-manifest.json"))
