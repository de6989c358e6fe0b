"""Planning a pruning: a view of the source, laid out into shards and cut into copy steps. Pure but for sidecars."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shardxform.ask.manifest import Manifest
from shardxform.ask.recipe import Recipe
from shardxform.base import computing
from shardxform.base.strict_json import pretty
from shardxform.base.tensors import uncollected
from shardxform.checkpoint.identity import identify, names_of
from shardxform.checkpoint.sidecars import refuse_faulty
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import CheckpointError
from shardxform.plan.plan import Plan, copy_steps, lay_out
from shardxform.plan.view import MtpMode, View, pruned_view

if TYPE_CHECKING:
    from shardxform.plan.steps import TuneBlock

__all__ = ["DEFAULT_SHARD_BYTES", "ViewOptions", "config_bytes", "plan_prune", "sidecar_digests"]

DEFAULT_SHARD_BYTES: Final = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOptions:
    """What decides an output's bytes beside source and manifest.

    Attributes:
        text_only: drop the vision tower and promote the text config.
        mtp: what becomes of multi-token-prediction layers; see `view.pruned_view`.
        max_shard_bytes: most bytes of tensor data in one shard.

    """

    text_only: bool = False
    mtp: MtpMode = "auto"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


@uncollected()
def plan_prune(
    source: Checkpoint, manifest: Manifest | None, options: ViewOptions | None = None, recipe: Recipe | None = None
) -> Plan:
    """Plan a pruned copy of `source`; with a `recipe`, its pruned blocks are healed.

    Raises:
        FamilyError, ManifestError, PlanError: see `view.pruned_view`; nothing is pruned that could be healed.
        CheckpointError: a sidecar cannot be read.

    """
    options = options or ViewOptions()
    view = pruned_view(source, manifest, text_only=options.text_only, mtp=options.mtp)
    tensors = view.checkpoint.tensors
    shards = lay_out((ref.spec for ref in tensors.values()), options.max_shard_bytes)
    sidecars = sidecar_digests(view.checkpoint)
    blocks: tuple[TuneBlock, ...] = ()
    if recipe:
        from shardxform.plan.steps import heal_steps  # most prunes only copy

        blocks = heal_steps(source, view, shards, recipe)
    healed = {item.tensor.name for step in blocks for item in step.kept}
    copies = copy_steps(shards, {name: ref for name, ref in tensors.items() if name not in healed})
    plan = Plan(
        command="prune",
        source=source.root,
        remote=source.remote,
        source_shards=source.shards,
        view=view.checkpoint,
        shards=shards,
        steps=(*copies, *blocks),
        config=config_bytes(source, view),
        sidecars=sidecars,
        inputs={
            **view_inputs("prune", source, manifest, options, sidecars),
            **({"recipe": recipe.facts(), computing.KEY: computing.of_model(recipe.device)} if recipe else {}),
        },
        summary={**view_summary(source, view), **({"healed": len(healed)} if recipe else {})},
        notes=view.notes,
        unread=source.unread,
    )
    plan.check()
    return plan


def view_inputs(
    command: str, source: Checkpoint, manifest: Manifest | None, options: ViewOptions, sidecars: Mapping[str, str]
) -> dict[str, Any]:
    """What the bytes of an output made from a view depend on, by name.

    Raises:
        ManifestError: the manifest says that it was chosen on another checkpoint, or on other values of this one.
        CheckpointError: a shard cannot be read.

    """
    identity = identify(source)
    if manifest is not None:
        manifest.refuse_other_source(identity, names_of(source.shards))
    keep = manifest.to_dict() if manifest else {}
    return {
        "command": command,
        "options": {"text_only": options.text_only, "mtp": options.mtp, "max_shard_bytes": options.max_shard_bytes},
        "manifest": {key: keep[key] for key in ("keep", "mtp_keep") if keep.get(key)},
        "source": {**identity.to_dict(), "sidecars": dict(sidecars)},
    }


def view_summary(source: Checkpoint, view: View) -> dict[str, Any]:
    """Figures of a view for people and for JSON; sizes in bytes."""
    roles: Counter[str] = Counter()
    for name, ref in view.checkpoint.tensors.items():
        place = view.layout.places.get(name)
        roles[place.role if place else "unknown"] += ref.nbytes
    return {
        "family": view.layout.family.name,
        "architecture": view.layout.wrapper.architecture,
        "layers": view.layout.num_layers,
        "experts_before": view.source_layout.num_experts,
        "experts_after": view.layout.num_experts,
        "top_k": view.layout.top_k,
        "tensors_before": len(source.tensors),
        "tensors_after": len(view.checkpoint.tensors),
        "copied": view.copied,
        "sliced": view.sliced,
        "renamed": view.renamed,
        "dropped": dict(view.dropped),
        "bytes_before": source.nbytes,
        "bytes_by_role": dict(roles),
    }


def config_bytes(source: Checkpoint, view: View) -> bytes:
    """Bytes of the view's config.json; the source's own when nothing in it changed.

    Raises:
        CheckpointError: the source's config.json can no longer be read.

    """
    if view.checkpoint.config == source.config:
        return _read(source, CONFIG)
    return pretty(view.checkpoint.config).encode()


def sidecar_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every sidecar, by name.

    Raises:
        CheckpointError: one cannot be read, here or by any client.

    """
    refuse_faulty(checkpoint)
    return {sidecar.name: _digest(checkpoint, sidecar.name) for sidecar in checkpoint.sidecars}


def _digest(checkpoint: Checkpoint, name: str) -> str:
    """SHA-256 of a small file; of a large one of the hub's without fetching it."""
    known = checkpoint.remote.sha256(name) if checkpoint.remote else ""
    return known or hashlib.sha256(_read(checkpoint, name)).hexdigest()


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    try:
        return checkpoint.file(name).read_bytes()
    except OSError as e:
        raise CheckpointError(f"{checkpoint.where}/{name}: {e.strerror}") from e
