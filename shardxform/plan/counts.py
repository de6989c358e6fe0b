"""Parameters of a checkpoint, counted from its headers: what every token uses, and what one expert adds.

The decoder with embeddings and output head; MTP layers and the vision tower are counted apart, so that a source and an
output that dropped them compare. A quantized weight counts as its elements, its scales and zero points not at all.
Tensors that the family does not know are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats.stored import Stored, read_stored
from shardxform.model.layout import Layout, layout_of

__all__ = ["Parameters", "count_parameters", "stored_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Counts over all layers.

    Attributes:
        shared: parameters that do not depend on the number of experts.
        routed: of one routed expert of every MoE layer.
        router: that the routers have for one expert of every MoE layer.
        apart: of MTP layers and the vision tower, which are in none of the others.

    """

    shared: int
    routed: int
    router: int
    apart: int

    def total(self, experts: int) -> int:
        """With so many routed experts per layer."""
        return self.shared + experts * (self.routed + self.router)

    def active(self, experts: int, top_k: int) -> int:
        """What one token goes through: all routers, and `top_k` experts of every layer."""
        return self.shared + experts * self.router + top_k * self.routed


def stored_of(checkpoint: Checkpoint) -> Stored | None:
    """Read a checkpoint that is quantized as `quantize` does it; None for any other.

    Raises:
        CheckpointError: quantized so, but not as its config says.

    """
    if not checkpoint.config.get("quantization_config"):
        return None
    try:
        return read_stored(checkpoint)
    except SchemeError:
        return None


def count_parameters(checkpoint: Checkpoint, stored: Stored | None) -> Parameters:
    """Count from names and shapes; `stored` as `stored_of` gives it.

    Raises:
        FamilyError: see `layout.layout_of`.

    """
    if stored:
        return _count(stored.layout, [*stored.weights.values(), *stored.plain.values()])
    return _count(layout_of(checkpoint.config, checkpoint.tensors, checkpoint.where), checkpoint.tensors.values())


def _count(layout: Layout, refs: Iterable[TensorRef]) -> Parameters:
    shared = routed = router = apart = 0
    for ref in refs:
        place = layout.places.get(ref.name)
        if place is None or place.companion:
            continue
        size = math.prod(ref.spec.shape)
        if place.scope not in ("root", "block"):
            apart += size
        elif place.template.variant:
            routed += size
        elif place.template.sliced:
            router += size
        else:
            shared += size
    experts = layout.num_experts
    return Parameters(shared=shared, routed=routed // experts, router=router // experts, apart=apart)
