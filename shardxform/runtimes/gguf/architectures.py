"""The families that llama.cpp runs: how each becomes one of its architectures, as its own converter does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from shardxform.errors import SchemeError
from shardxform.model.layout import Layout
from shardxform.runtimes.gguf.architecture import Architecture, Kind
from shardxform.runtimes.gguf.delta_nets import DELTA_NETS
from shardxform.runtimes.gguf.latent_attention import LATENT
from shardxform.runtimes.gguf.plain_attention import PLAIN
from shardxform.runtimes.gguf.sliding_windows import SLIDING
from shardxform.runtimes.gguf.state_spaces import STATES

__all__ = ["KINDS", "architecture_of"]

KINDS: Final[Mapping[str, Kind]] = {**DELTA_NETS, **LATENT, **PLAIN, **SLIDING, **STATES}
"""What each family becomes, by its name."""


def architecture_of(layout: Layout) -> Architecture:
    """See a checkpoint, or a view of one, as llama.cpp does; its vision tower is left out.

    Raises:
        SchemeError: llama.cpp does not run the family, or it is not one of those that are written.

    """
    kind = KINDS.get(layout.family.name)
    if kind is None:
        raise SchemeError(
            f"family {layout.family.name} is not written as GGUF; those that are: {', '.join(sorted(KINDS))}"
        )
    return Architecture(kind, layout)
