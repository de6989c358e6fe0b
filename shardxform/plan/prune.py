"""Planning a pruning: a view of the source, laid out into shards and cut into copy steps. Pure but for sidecars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from shardxform.ask.manifest import Manifest, chosen_by
from shardxform.ask.recipe import Recipe
from shardxform.base import computing
from shardxform.base.tensors import TensorRef, uncollected
from shardxform.checkpoint.history import past_of
from shardxform.checkpoint.identity import identity_when_asked
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import PlanError
from shardxform.formats.config_names import is_mlx
from shardxform.plan.plan import Plan, ShardPlan, Step, copy_steps, extents_of, lay_out
from shardxform.plan.view import (
    ViewOptions,
    config_bytes,
    pruned_view,
    sidecar_digests,
    view_stated,
    view_summary,
)
from shardxform.runtimes import as_family

if TYPE_CHECKING:
    from shardxform.plan.steps import TuneBlock

__all__ = [
    "plan_prune",
]


@uncollected()
def plan_prune(
    source: Checkpoint, manifest: Manifest | None, options: ViewOptions | None = None, recipe: Recipe | None = None
) -> Plan:
    """Plan a pruned copy of `source`; with a `recipe`, which heals, its pruned blocks are healed.

    Raises:
        FamilyError, ManifestError, PlanError: see `view.pruned_view`; nothing is pruned that could be healed.
        CheckpointError: a sidecar cannot be read.

    """
    options, source = options or ViewOptions(), as_family(source)
    if options.gguf:
        from shardxform.plan.gguf import plan_stored  # most prunes only copy

        if recipe and recipe.heal and recipe.heal.encoding:
            raise PlanError("`heal.encoding`: what is healed is written in types of GGUF; leave it out")
        return plan_stored("prune", source, manifest, options, recipe)
    view = pruned_view(source, manifest, text_only=options.text_only, mtp=options.mtp)
    if is_mlx(source.config):
        _refuse_healed(recipe)
    if recipe and recipe.heal:
        from shardxform.plan.steps import healed_view  # most prunes only copy

        view, heal = healed_view(view, recipe.heal)
        recipe = replace(recipe, heal=heal)
    written = view.checkpoint
    if is_mlx(source.config):
        from shardxform.runtimes import mlx

        mlx.refuse_unrun(view.layout)
        written = mlx.whole(view.checkpoint, view.layout)
    tensors = written.tensors
    shards = lay_out((ref.spec for ref in tensors.values()), options.max_shard_bytes)
    sidecars, identity, past = sidecar_digests(view.checkpoint), identity_when_asked(source), past_of(source)
    blocks: tuple[TuneBlock, ...] = ()
    if recipe:
        from shardxform.plan.steps import heal_steps

        blocks = heal_steps(source, view, shards, recipe)
    moved = [item for step in blocks for item in step.kept]
    healed = {extent for item in moved for _, extent in item.parts}
    places = extents_of(shards) if healed else {}
    unchanged = {name: ref for name, ref in tensors.items() if places.get(name) not in healed}
    copies: Iterator[Step] = _narrowed(shards, unchanged) if view.width else copy_steps(shards, unchanged)
    plan = Plan(
        command="prune",
        source=source.root,
        remote=source.remote,
        source_shards=source.shards,
        view=view.checkpoint,
        shards=shards,
        steps=(*copies, *blocks),
        config=config_bytes(source, replace(view, checkpoint=written)),
        sidecars=sidecars,
        identity=identity,
        stated={
            **view_stated("prune", source, manifest, options, sidecars, identity),
            **({"recipe": recipe.facts(), computing.KEY: computing.of_model(recipe.device)} if recipe else {}),
        },
        summary={**view_summary(source, view), **chosen_by(manifest), **({"healed": len(moved)} if recipe else {})},
        notes=(*view.notes, *past.notes),
        unread=source.unread,
        past=past,
    )
    plan.check()
    return plan


def _narrowed(shards: tuple[ShardPlan, ...], tensors: Mapping[str, TensorRef]) -> Iterator[Step]:
    """Steps that copy, and steps that write the channels that stay of every expert."""
    from shardxform.formats.encoding import Encoded
    from shardxform.formats.plain import Plain
    from shardxform.plan.steps import TranscodeItem, transcode_steps

    extents = extents_of(shards)
    narrow = {name: ref for name, ref in tensors.items() if isinstance(ref, Encoded)}
    yield from copy_steps(shards, {name: ref for name, ref in tensors.items() if name not in narrow})
    yield from transcode_steps(
        (TranscodeItem(name, ref.sources, Plain(ref.spec.dtype), (("values", extents[name]),)), ref.nbytes)
        for name, ref in narrow.items()
    )


def _refuse_healed(recipe: Recipe | None) -> None:
    if recipe:
        raise PlanError(
            "`heal`: the source is a checkpoint of MLX, whose experts are integers; heal the one that it was made from"
        )
