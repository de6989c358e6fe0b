"""Running a multi-token-prediction layer on its own inputs, which transformers has no code for.

As vLLM's `qwen3_next_mtp` and `deepseek_mtp` run it: the embedding of the next token and the hidden state after the
final norm, each normed, side by side through a projection, then a decoder block. A second MTP layer takes the first
one's output and the token after.
"""

# B: sequences, T: positions, H: hidden size.

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import torch
from torch import nn

from shardxform.errors import FamilyError
from shardxform.forward.experts import Observer
from shardxform.forward.skeleton import Block, Skeleton

__all__ = ["MtpLayer", "mtp_layer", "mtp_numbers"]

_EMBEDDING, _HIDDEN, _PROJECTION, _OUTPUT = range(4)
_SHIFT: Final = 1


class MtpLayer:
    """An MTP layer that is loaded."""

    def __init__(self, skeleton: Skeleton, block: Block, names: tuple[str, str, str, str]) -> None:
        self._skeleton = skeleton
        self._block = block
        self._norms = [skeleton.norm_like_final(names[at]) for at in (_EMBEDDING, _HIDDEN, _OUTPUT)]
        self._projection_HI = skeleton.weights.tensor(names[_PROJECTION])  # its shape: see `Weights.check`

    def __call__(self, ids_BT: torch.Tensor, normed_BTH: torch.Tensor) -> torch.Tensor:
        """Run the layer at every position but the last, which has no next token.

        Args:
            ids_BT: token ids.
            normed_BTH: hidden states of the same positions, after the final norm or the layer's before.

        Returns:
            its output [B, T - 1, H], normed: what a further MTP layer takes.

        """
        embedding_norm, hidden_norm, output_norm = self._norms
        next_BTH = embedding_norm(self._skeleton.embed(ids_BT[:, _SHIFT:]))
        both_BTI = torch.cat((next_BTH, hidden_norm(normed_BTH[:, :-_SHIFT])), dim=-1)
        entering_BTH = nn.functional.linear(both_BTI, self._projection_HI)
        out: torch.Tensor = output_norm(self._block(entering_BTH))
        return out


@contextlib.contextmanager
def mtp_layer(skeleton: Skeleton, layer: int, observer: Observer | None) -> Iterator[MtpLayer]:
    """Load MTP layer `layer`, counted from 0.

    Raises:
        FamilyError: the family has no such layer.
        CheckpointError: one of its tensors is missing.

    """
    layout = skeleton.layout
    mtp = layout.family.mtp
    if mtp is None or layer >= layout.mtp_layers:
        raise FamilyError(f"family {layout.family.name}: no MTP layer {layer}")
    number = str(layout.num_layers + layer if mtp.follows_blocks else layer)
    prefix, *inputs = (
        name.replace("{decoder}", layout.wrapper.prefix).replace("{l}", number) for name in (mtp.prefix, *mtp.inputs)
    )
    like = min(mtp.like(layout.text), skeleton.num_blocks - 1)
    embedding, hidden, projection, output = inputs
    with skeleton.block_of("mtp", layer, prefix, observer, as_layer=like) as block:
        yield MtpLayer(skeleton, block, (embedding, hidden, projection, output))


def mtp_numbers(skeleton: Skeleton) -> range:
    """MTP layers that the checkpoint has tensors of, and whose experts can be scored."""
    layout = skeleton.layout
    there = [layer for layer in range(layout.mtp_layers) if skeleton.weights.has_experts("mtp", layer)]
    return range(len(there)) if there == list(range(len(there))) else range(0)
