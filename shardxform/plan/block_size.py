"""What healing and tuning a decoder block takes in memory, from headers alone.

The constants are fits to what was measured with Qwen3.5-35B-A3B's blocks pruned to 128 experts, in bfloat16 and float32
(docs/quantization.md has the table); they err on the side of too much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from shardxform.ask.recipe import Recipe
from shardxform.base.constants import BATCH_TOKENS
from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import Checkpoint
from shardxform.model.layout import Place
from shardxform.plan.view import View

__all__ = ["BlockSize", "block_sizes", "sizes_of"]

_LIBRARIES: Final = 750_000_000  # python, torch, transformers, and kernels as they are compiled
_SLACK: Final = 0.5  # bytes a byte of the block: tiles, and holes that freed memory leaves
_TUNED: Final = 1.0  # an offset of two bytes beside each weight of 16 bits
_HEALED: Final = 0.5  # one byte beside it
_PER_FEATURE: Final = 34  # bytes that a token leaves behind for each row and column of the block's widest linear layer


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSize:
    """One decoder block.

    Attributes:
        nbytes: its weights as they are tuned, after pruning.
        original_nbytes: its weights in the source.
        features: rows and columns of its widest linear layer.

    """

    nbytes: int
    original_nbytes: int
    features: int

    def peak_bytes(self, recipe: Recipe) -> int:
        """Of the process that does the step: the original block puts out its states first, then the block is tuned."""
        beside = _TUNED if recipe.iters else _HEALED
        resting = max(self.original_nbytes, int((1 + beside) * self.nbytes)) + int(_SLACK * self.nbytes)
        return _LIBRARIES + resting + _PER_FEATURE * self.features * (BATCH_TOKENS + recipe.batch_tokens)


def sizes_of(tensors: Mapping[str, TensorRef], places: Mapping[str, Place]) -> dict[int, BlockSize]:
    """By number, the sizes of decoder blocks that nothing was taken from."""
    nbytes, features = Counter[int](), Counter[int]()
    for name, place in places.items():
        if place.scope != "block" or place.layer is None or name not in tensors:
            continue
        ref = tensors[name]
        nbytes[place.layer] += ref.nbytes
        if len(ref.spec.shape) == 2 and place.expert is None:
            features[place.layer] = max(features[place.layer], sum(ref.spec.shape))
    return {
        layer: BlockSize(nbytes=size, original_nbytes=size, features=features[layer]) for layer, size in nbytes.items()
    }


def block_sizes(source: Checkpoint, view: View) -> dict[int, BlockSize]:
    """By number, the sizes of the decoder blocks of a view of `source`."""
    before = sizes_of(source.tensors, view.source_layout.places)
    after = sizes_of(view.checkpoint.tensors, view.layout.places)
    return {layer: replace(size, original_nbytes=before[layer].nbytes) for layer, size in after.items()}
