"""Planning a quantization: a view of the source, its selected modules replaced by packed parts, cut into steps.

With a manifest the view is a pruned one, so that pruning and quantizing are one pass over the source. Pure but for
sidecars; no tensor data is read and no array library is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from shardxform.ask.manifest import Manifest
from shardxform.ask.recipe import Recipe
from shardxform.base import computing
from shardxform.base.collecting import uncollected
from shardxform.base.tensors import TensorRef, TensorSpec
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats.config_names import declarations
from shardxform.formats.dialects import build
from shardxform.formats.grid import GROUP_SIZES
from shardxform.formats.scheme import FORMATS, Part, Scheme
from shardxform.formats.selection import Selection, reasons_summary, refuse_unread, select
from shardxform.model.layout import Layout, is_quantized
from shardxform.model.matrices import Cut, Matrix, single_biases
from shardxform.plan import plan as plans
from shardxform.plan.block_size import BlockSize, block_sizes
from shardxform.plan.heal import healed_names, kept_items, refuse_unpruned
from shardxform.plan.plan import Plan, ShardPlan, Step, copy_steps, extents_of, lay_out
from shardxform.plan.prune import ViewOptions, config_bytes, sidecar_digests, view_inputs, view_summary
from shardxform.plan.steps import Gather, GatherItem, KeptItem, Round, RoundItem, TuneBlock
from shardxform.plan.view import View, pruned_view

__all__ = ["gathered_tensors", "kept_tensors", "plan_quantize"]


@uncollected()
def plan_quantize(
    source: Checkpoint,
    scheme: Scheme,
    manifest: Manifest | None = None,
    options: ViewOptions | None = None,
    recipe: Recipe | None = None,
) -> Plan:
    """Plan a quantized copy of `source`, pruned by `manifest` on the way when one is given.

    With a `recipe`, the weights of decoder blocks are tuned, after they are healed if it says so; others are rounded to
    nearest all the same.

    Raises:
        SchemeError: see `selection.select`; or the source is quantized already, or the scheme cannot be tuned.
        FamilyError, ManifestError, PlanError: see `view.pruned_view`.

    """
    options = options or ViewOptions()
    if scheme.format == "compressed-tensors" and scheme.grid.scale_grid == "fp16":
        raise SchemeError(
            "`format` compressed-tensors needs `scale_grid` bf16: transformers runs experts in the type of their"
            " scales, and float16 overflows where bfloat16 does not"
        )
    if recipe and scheme.expert_names != "split":
        raise SchemeError("tuned and healed blocks are written with `expert_names` split; see `shardxform convert`")
    _refuse_quantized(source)
    view = pruned_view(source, manifest, text_only=options.text_only, mtp=options.mtp)
    if recipe and recipe.heal:
        refuse_unpruned(view)
    tensors = view.checkpoint.tensors
    _refuse_unscaled(view)
    refuse_unread(view.layout, scheme)
    selection = select(view.layout, tensors, scheme)
    _refuse_no_expert(selection, scheme)
    quantization = build(selection, scheme, view.layout, recipe.iters if recipe else 0)
    copied = kept_tensors(view.layout, tensors, selection, scheme)
    gathered = gathered_tensors(selection, scheme)
    parts = [scheme.parts(module.name, *module.shape) for module in selection.quantized]
    specs = [ref.spec for ref in copied.values()] + [spec for spec, _, _ in gathered.values()]
    specs += [part.spec for stored in parts for part in stored]
    shards = lay_out(specs, options.max_shard_bytes)
    placed = list(zip(selection.quantized, parts, strict=True))
    tuned = [(m, p) for m, p in placed if recipe and m.place.scope == "block"]
    rounds = _round_steps(shards, [(m, p) for m, p in placed if not (recipe and m.place.scope == "block")], scheme)
    healed = _healed(view, selection, copied, shards, recipe)
    unchanged = copied.keys() - {item.tensor.name for items in healed.values() for item in items}
    copies = copy_steps(shards, {name: ref for name, ref in copied.items() if name in unchanged})
    steps: tuple[Step, ...] = (*copies, *_gather_steps(shards, gathered), *rounds)
    if recipe:
        make = partial(TuneBlock, scheme=scheme, recipe=recipe)
        steps = (*steps, *_tune_steps(shards, tuned, healed, block_sizes(source, view), make))
    config = {**view.checkpoint.config, "quantization_config": quantization}
    quantized_view = replace(view, checkpoint=replace(view.checkpoint, config=config))
    sidecars = sidecar_digests(view.checkpoint)
    plan = Plan(
        command="quantize",
        source=source.root,
        remote=source.remote,
        source_shards=source.shards,
        view=view.checkpoint,
        shards=shards,
        steps=steps,
        config=config_bytes(source, quantized_view),
        sidecars=sidecars,
        inputs={
            **view_inputs("quantize", source, manifest, options, sidecars),
            "scheme": scheme_inputs(scheme, recipe),
            **({"recipe": recipe.facts()} if recipe else {}),
            computing.KEY: computing.of_model(recipe.device) if recipe else computing.of_rounding(),
        },
        summary=_summary(source, view, selection, scheme_inputs(scheme, recipe), len(specs), len(unchanged)),
        notes=(*view.notes, *_misfit_notes(selection)),
        unread=source.unread,
    )
    plan.check()
    return plan


def _refuse_quantized(source: Checkpoint) -> None:
    """Refuse a source that is quantized, or whose config says so.

    Raises:
        SchemeError: says which, and what to do.

    """
    for path, declared in declarations(source.config):
        where = ".".join(path)
        method = declared.get("quant_method") if isinstance(declared, Mapping) else None
        if not any(is_quantized(ref.spec) for ref in source.tensors.values()):
            raise SchemeError(
                f"{source.where}/{CONFIG}: {where} declares quantized weights, but the shards hold none;"
                f" remove {where} from config.json, and run the same command again"
            )
        if method in FORMATS and path == ("quantization_config",):
            raise SchemeError(f"config.json: {where}: the source is quantized already; see `shardxform convert`")
        named = f"by method {method!r}" if method else f"as {where} says"
        raise SchemeError(
            f"config.json: {where}: the source is quantized already, {named}, which is neither rounded again nor"
            " converted; start from a 16-bit checkpoint of the model"
        )


def _refuse_unscaled(view: View) -> None:
    """Refuse weights that are stored quantized although the config declares nothing: their values are not theirs.

    Raises:
        SchemeError: names one of them.

    """
    tensors, places = view.checkpoint.tensors, view.layout.places
    found = [ref.spec for name, ref in tensors.items() if name in places and is_quantized(ref.spec)]
    if found:
        more = f", and {len(found) - 1} tensors more" if len(found) > 1 else ""
        raise SchemeError(
            f"tensor '{found[0].name}' is {found[0].dtype}{more}: quantized weights, which mean nothing without the"
            " quantization_config that config.json lacks; start from a 16-bit checkpoint of the model"
        )


def _refuse_no_expert(selection: Selection, scheme: Scheme) -> None:
    """Refuse to leave all routed experts, most of the model, in 16 bits where another group size would fit them.

    Raises:
        SchemeError: names the group size.

    """
    kept = [module for module in selection.kept_modules if module.expert is not None and module.place.scope == "block"]
    misfits = [module for module in kept if module.name in selection.misfits]
    if not misfits or any(module.expert is not None for module in selection.quantized):
        return
    shapes = {module.shape for module in misfits}
    for size in GROUP_SIZES:
        other = replace(scheme, grid=replace(scheme.grid, group_size=size))
        if not any(other.misfit(*shape) for shape in shapes):
            odd = next(module for module in misfits if scheme.misfit(*module.shape))
            raise SchemeError(
                f"no routed expert can be quantized: {odd.name}: {selection.misfits[odd.name]};"
                f" `group_size` {size} fits; to keep them in 16 bits, `keep_16bit` '*.experts.*'"
            )


def kept_tensors(
    layout: Layout, tensors: Mapping[str, TensorRef], selection: Selection, scheme: Scheme
) -> dict[str, TensorRef]:
    """Tensors that stay as they are, byte for byte.

    Experts that stay 16-bit are un-fused too: the loader of auto-round and gptq un-fuses every block, whether any of
    its experts is quantized or not, and would leave fused ones at their random initial values with only a warning.
    That of compressed-tensors looks at each block, and wants 16-bit experts as the release has them.
    """
    replaced = {name for module in selection.quantized for name in module.sources}
    unfused: dict[str, TensorRef] = {}
    for module in _unfused(selection, scheme):
        replaced.update(module.sources)
        if module.cut is None:
            unfused[f"{module.name}.weight"] = module.weight.renamed(f"{module.name}.weight")
    unfused |= {bias.name: bias for stack in replaced for bias in single_biases(layout, tensors, stack)}
    stacks = {f"{name}_bias" for name in replaced}
    return {**{name: ref for name, ref in tensors.items() if name not in replaced | stacks}, **unfused}


def gathered_tensors(selection: Selection, scheme: Scheme) -> dict[str, tuple[TensorSpec, TensorRef, Cut]]:
    """Tensors that keep their values, but are no run of the source's bytes: what they are, and what they are a cut of.

    Experts that stay 16-bit where the family's stacks are transposed.
    """
    found: dict[str, tuple[TensorSpec, TensorRef, Cut]] = {}
    for module in _unfused(selection, scheme):
        if module.cut:
            spec = TensorSpec(f"{module.name}.weight", module.weight.spec.dtype, module.shape)
            found[spec.name] = spec, module.weight, module.cut
    return found


def _unfused(selection: Selection, scheme: Scheme) -> Iterator[Matrix]:
    """Experts that stay 16-bit, and are written one by one all the same."""
    if scheme.expert_names == "split" and scheme.format != "compressed-tensors":
        for module in selection.kept_modules:
            if module.place.template.variant == "fused" and module.place.scope == "block":
                yield module


def scheme_inputs(scheme: Scheme, recipe: Recipe | None = None) -> dict[str, Any]:
    """Describe a scheme as plain data, for the record and for comparison."""
    return {"method": "auto-round" if recipe and recipe.iters else "rtn", **asdict(scheme)}


def _gather_steps(
    shards: Sequence[ShardPlan], gathered: Mapping[str, tuple[TensorSpec, TensorRef, Cut]]
) -> Iterator[Gather]:
    """Steps in table order, each of at most `STEP_BYTES` of output unless a single tensor is larger."""
    extents = extents_of(shards)
    pending: list[GatherItem] = []
    filled = 0
    for name, (spec, tensor, cut) in gathered.items():
        if pending and filled + spec.nbytes > plans.STEP_BYTES:
            yield Gather(tuple(pending))
            pending, filled = [], 0
        pending.append(GatherItem(tensor, cut, extents[name]))
        filled += spec.nbytes
    if pending:
        yield Gather(tuple(pending))


def _round_steps(
    shards: Sequence[ShardPlan], modules: Iterable[tuple[Matrix, tuple[Part, ...]]], scheme: Scheme
) -> Iterator[Round]:
    """Steps in table order, each of at most `STEP_BYTES` of weights unless a single weight is larger."""
    extents = extents_of(shards)
    pending: list[RoundItem] = []
    filled = 0
    for module, parts in modules:
        nbytes = module.nbytes
        if pending and filled + nbytes > plans.STEP_BYTES:
            yield Round(tuple(pending), scheme)
            pending, filled = [], 0
        placed = tuple((part.role, extents[part.spec.name]) for part in parts)
        pending.append(RoundItem(module.name, module.weight, placed, module.cut))
        filled += nbytes
    if pending:
        yield Round(tuple(pending), scheme)


def _healed(
    view: View,
    selection: Selection,
    copied: Mapping[str, TensorRef],
    shards: Sequence[ShardPlan],
    recipe: Recipe | None,
) -> dict[int, tuple[KeptItem, ...]]:
    """By layer, what stays 16-bit and is healed."""
    if recipe is None or recipe.heal is None:
        return {}
    unfused = {f"{module.name}.weight": module.place for module in selection.kept_modules}
    places = {name: place for name, place in {**unfused, **view.layout.places}.items() if name in copied}
    return kept_items(healed_names(view.layout, places, recipe.heal.widest), places, copied, extents_of(shards))


def _tune_steps(
    shards: Sequence[ShardPlan],
    modules: Iterable[tuple[Matrix, tuple[Part, ...]]],
    healed: Mapping[int, tuple[KeptItem, ...]],
    sizes: Mapping[int, BlockSize],
    make: Callable[..., TuneBlock],
) -> Iterator[TuneBlock]:
    """One step per decoder block with weights to heal or tune, in order."""
    extents = extents_of(shards)
    blocks: dict[int, list[RoundItem]] = {layer: [] for layer in healed}
    for module, parts in modules:
        assert module.place.layer is not None
        placed = tuple((part.role, extents[part.spec.name]) for part in parts)
        blocks.setdefault(module.place.layer, []).append(RoundItem(module.name, module.weight, placed, module.cut))
    for layer, items in sorted(blocks.items()):
        yield make(layer=layer, items=tuple(items), kept=healed.get(layer, ()), size=sizes[layer])


def _summary(
    source: Checkpoint, view: View, selection: Selection, scheme: Mapping[str, Any], stored: int, copied: int
) -> dict[str, Any]:
    summary = view_summary(source, view)
    weights = sum(module.nbytes for module in selection.quantized)
    return {
        **summary,
        "tensors_after": stored,
        "copied": copied,
        "scheme": scheme,
        "quantized_modules": len(selection.quantized),
        "quantized_weight_bytes": weights,
        "kept_modules": reasons_summary(selection),
        "misfits": dict(selection.misfits),
    }


def _misfit_notes(selection: Selection) -> Iterator[str]:
    """Say which wanted modules stay 16-bit, a line per reason; and loudly when they are all the routed experts."""
    experts = {module.name for module in selection.kept_modules if module.expert is not None}
    if experts & selection.misfits.keys() and not any(module.expert is not None for module in selection.quantized):
        yield "no routed expert is quantized, since no group size fits their shapes: most of the model stays 16-bit"
    by_reason: dict[str, list[str]] = {}
    for name, why in selection.misfits.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"stays 16-bit, {why}: {names[0]}{more}"
