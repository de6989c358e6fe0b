"""What other runtimes call the parts of a model, and how they want them laid out: pure data, no numbers are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardxform.formats.config_names import QUANTIZATION

if TYPE_CHECKING:
    from shardxform.checkpoint.table import Checkpoint

__all__ = ["as_family"]


def as_family(checkpoint: Checkpoint) -> Checkpoint:
    """Give a checkpoint of MLX as its family has it, see `mlx.single`; any other as it is, and no time is spent."""
    if QUANTIZATION not in checkpoint.config:
        return checkpoint
    from shardxform.runtimes.mlx import single

    return single(checkpoint)
