"""Which tensors of a pruned view healing may change, and the steps that do it. Names and places only; no numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from shardxform.ask.recipe import HEALED, Recipe
from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import PlanError
from shardxform.model.layout import Layout, Place
from shardxform.plan.block_size import block_sizes
from shardxform.plan.plan import Extent, ShardPlan, extents_of
from shardxform.plan.steps import KeptItem, TuneBlock
from shardxform.plan.view import View

__all__ = ["heal_steps", "healed_names", "kept_items", "refuse_unpruned"]

_NORM_BEFORE_EXPERTS: Final = "post_attention_layernorm.weight"
_MOVABLE: Final = ("BF16", "F16", "F32")


def refuse_unpruned(view: View) -> None:
    """Refuse to heal what nothing was taken from.

    Raises:
        PlanError: says what to give.

    """
    if view.layout.num_experts == view.source_layout.num_experts:
        raise PlanError("`heal`: nothing is pruned, so there is nothing to heal; give `manifest`")


def heal_steps(source: Checkpoint, view: View, shards: Sequence[ShardPlan], recipe: Recipe) -> tuple[TuneBlock, ...]:
    """One step per pruned block, in order."""
    refuse_unpruned(view)
    assert recipe.heal is not None
    places, tensors = view.layout.places, view.checkpoint.tensors
    kept = kept_items(healed_names(view.layout, places, recipe.heal.widest), places, tensors, extents_of(shards))
    sizes = block_sizes(source, view)
    return tuple(TuneBlock(layer=at, kept=items, recipe=recipe, size=sizes[at]) for at, items in kept.items())


def healed_names(layout: Layout, places: Mapping[str, Place], what: str) -> Iterator[str]:
    """Of the names in `places`, those of weights in pruned blocks that healing `what` may change."""
    roles, layers = HEALED[what], frozenset(layout.moe_layers)
    for name, place in places.items():
        if place.template.variant and not place.template.is_expert_weight:
            continue  # of experts: they are few, and nothing moves them
        wanted = place.role in roles or (what != "router" and place.template.name == _NORM_BEFORE_EXPERTS)
        if place.scope == "block" and place.layer in layers and wanted:
            yield name


def kept_items(
    names: Iterable[str], places: Mapping[str, Place], tensors: Mapping[str, TensorRef], extents: Mapping[str, Extent]
) -> dict[int, tuple[KeptItem, ...]]:
    """By layer, what healing writes as wide as it was.

    Raises:
        PlanError: one of them is no float of 16 or 32 bits, as in a quantized source.

    """
    out: dict[int, list[KeptItem]] = {}
    for name in names:
        dtype = tensors[name].spec.dtype
        if dtype not in _MOVABLE:
            raise PlanError(
                f"`heal`: tensor '{name}': expected {', '.join(_MOVABLE)}, found {dtype}, which cannot move"
            )
        layer = places[name].layer
        assert layer is not None
        out.setdefault(layer, []).append(KeptItem(tensors[name], extents[name]))
    return {layer: tuple(items) for layer, items in sorted(out.items())}
