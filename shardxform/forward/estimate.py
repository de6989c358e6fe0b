"""What a forward pass will take, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shardxform.base.file_system import FileSystem
from shardxform.calibration import Windows
from shardxform.checkpoint.table import Checkpoint
from shardxform.forward.passes import BATCH_TOKENS
from shardxform.forward.skeleton import Skeleton
from shardxform.forward.weights import Precision, Weights

__all__ = ["estimate"]

_LIBRARIES: Final = 450_000_000  # python, torch, transformers and a tokenizer, resident
_LIVE_STATES: Final = 90  # states that one block holds at its peak: activations, and what reading leaves behind


def estimate(
    checkpoints: Mapping[str, Checkpoint], windows: Windows, precision: Precision, work: Path | None = None
) -> dict[str, Any]:
    """Predict memory, disk and reading of a pass over `windows`; sizes in bytes, free ones where `work` will be.

    Raises:
        FamilyError, SchemeError, CheckpointError: see `Skeleton`.

    """
    blocks = heads = states = read = live = 0
    layers = 0
    for checkpoint in checkpoints.values():
        with Weights(checkpoint, precision) as weights:
            skeleton = Skeleton(weights)
            sizes = Counter[tuple[str, int]]()
            for name, place in weights.layout.places.items():
                if place.scope in ("block", "mtp") and place.layer is not None:
                    sizes[place.scope, place.layer] += _stored_bytes(weights, name)
            blocks += max(sizes.values(), default=0)
            heads += skeleton.head_ref.nbytes
            read += sizes.total()
            layers = skeleton.num_blocks
            state = skeleton.hidden_size * precision.dtype.itemsize
            states += 2 * windows.ids_NT.size * state
            live = max(live, _LIVE_STATES * max(BATCH_TOKENS, windows.ids_NT.shape[1]) * state)
    return {
        "tokens": windows.ids_NT.size,
        "blocks": layers,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "device": str(precision.device),
        "read_bytes": read,
        "peak_memory_bytes": _LIBRARIES + max(blocks, heads) + live,
        "work_bytes": states,
        "free_disk_bytes": FileSystem().free_bytes(Path.cwd() / (work or "")),
    }


def _stored_bytes(weights: Weights, name: str) -> int:
    """Size at rest; a quantized weight is shown as if in 16 bits, and is at most that."""
    return weights.ref(name).nbytes if weights.has(name) else 0
