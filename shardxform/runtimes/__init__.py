"""What other runtimes call the parts of a model, and how they want them laid out: pure data, no numbers are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from shardxform.formats.config_names import QUANTIZATION

if TYPE_CHECKING:
    from shardxform.checkpoint.table import Checkpoint

__all__ = ["as_family", "rotation_notes"]


def as_family(checkpoint: Checkpoint) -> Checkpoint:
    """Give a checkpoint of MLX as its family has it, see `mlx.single`; any other as it is, and no time is spent."""
    if QUANTIZATION not in checkpoint.config:
        return checkpoint
    from shardxform.runtimes.mlx import single

    return single(checkpoint)


def rotation_notes(text: Mapping[str, object], runtime: str) -> Iterator[str]:
    """Say where a runtime rotates positions by another rule than transformers, and has no key to be told.

    Args:
        text: config of the decoder.
        runtime: its name.

    """
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) != "yarn":
        return
    if rope.get("truncate") is False:
        yield (
            f"config.json's truncate is false, but {runtime} always takes YaRN's range in whole channels: its logits"
            " differ a little from those of transformers"
        )
