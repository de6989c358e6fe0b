"""Planning a quantization: a view of the source, its selected modules replaced by packed parts, cut into steps.

With a manifest the view is a pruned one, so that pruning and quantizing are one pass over the source. Pure but for
sidecars; no tensor data is read and no array library is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

from shardxform.ask.manifest import Manifest
from shardxform.ask.recipe import Recipe
from shardxform.base import computing
from shardxform.base.tensors import TensorRef, TensorSpec, uncollected
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats.config_names import declarations
from shardxform.formats.decoding import decoded
from shardxform.formats.dialects import (
    Selection,
    build,
    gathered_tensors,
    kept_tensors,
    method_of,
    reasons_summary,
    refuse_unread,
    select,
    target_of,
)
from shardxform.formats.encoding import Encoded, Storage
from shardxform.formats.integers import Ints
from shardxform.formats.matrices import Matrix
from shardxform.formats.picking import Picked
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import FORMATS, GGUF, GROUP_SIZES, Scheme
from shardxform.model.layout import is_quantized
from shardxform.plan.gguf import Blocks, Types, contents_of, crossing, documents_of, gguf_steps
from shardxform.plan.plan import Extent, Plan, ShardPlan, Step, copy_steps, extents_of, lay_out
from shardxform.plan.steps import (
    BlockSize,
    KeptItem,
    TranscodeItem,
    TuneBlock,
    block_sizes,
    healed_names,
    kept_items,
    refuse_unpruned,
    transcode_item,
    transcode_steps,
)
from shardxform.plan.view import (
    GgufOptions,
    MtpMode,
    View,
    ViewOptions,
    config_bytes,
    pruned_view,
    sidecar_digests,
    view_inputs,
    view_summary,
)
from shardxform.runtimes import mlx
from shardxform.runtimes.mlx import Stack

__all__ = ["plan_quantize"]


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
    options, source = options or ViewOptions(), mlx.single(source)
    if scheme.format == GGUF:
        return _plan_gguf(source, scheme, manifest, options, recipe)
    view = _view(source, scheme, manifest, options, recipe)
    tensors = view.checkpoint.tensors
    selection = select(view.layout, tensors, scheme)
    _refuse_no_expert(selection, scheme)
    quantization = build(selection, scheme, view.layout, recipe.iters if recipe else 0)
    stacks = mlx.stacks_of(view.layout, selection.quantized) if scheme.format == "mlx" else []
    kept = _kept(view, selection, scheme)
    copied = {name: ref for name, ref in kept.items() if not isinstance(ref, Encoded)}
    gathered = gathered_tensors(selection, scheme, kept)
    specs = [ref.spec for ref in copied.values()] + [spec for spec, _ in gathered.values()]
    specs += _part_specs(selection, scheme, stacks)
    shards = lay_out(specs, options.max_shard_bytes)
    healed = _healed(view, selection, scheme, copied, shards, recipe)
    unchanged = copied.keys() - {item.tensor.name for items in healed.values() for item in items}
    copies = copy_steps(shards, {name: ref for name, ref in copied.items() if name in unchanged})
    encoded = _Quantized(Ints.of(scheme), selection.quantized, stacks)
    computed = _computed(source, view, shards, gathered, encoded, healed, recipe)
    config = {**view.checkpoint.config, "quantization_config": quantization}
    if scheme.format == "mlx":
        config = mlx.config_of(view.checkpoint.config, view.layout, quantization)
    quantized_view = replace(view, checkpoint=replace(view.checkpoint, config=config))
    sidecars = sidecar_digests(view.checkpoint)
    plan = Plan(
        command="quantize",
        source=source.root,
        remote=source.remote,
        source_shards=source.shards,
        view=view.checkpoint,
        shards=shards,
        steps=(*copies, *computed),
        config=config_bytes(source, quantized_view),
        sidecars=sidecars,
        inputs={
            **view_inputs("quantize", source, manifest, options, sidecars),
            "scheme": scheme_inputs(scheme, recipe),
            **({"recipe": recipe.facts()} if recipe else {}),
            computing.KEY: computing.of_model(recipe.device) if recipe else computing.of_rounding(),
        },
        summary=_summary(source, view, selection, scheme_inputs(scheme, recipe), len(specs), len(unchanged)),
        notes=(*view.notes, *_decoded_notes(view, kept, scheme.grid.bits), *_misfit_notes(selection)),
        unread=source.unread,
    )
    plan.check()
    return plan


def _plan_gguf(
    source: Checkpoint, scheme: Scheme, manifest: Manifest | None, options: ViewOptions, recipe: Recipe | None
) -> Plan:
    """Plan the same as a GGUF file: the codes and scales of the selected weights are those of the other formats."""
    asked = options.gguf or GgufOptions()
    view = _view(source, scheme, manifest, options, recipe)
    chosen = select(view.layout, view.checkpoint.tensors, scheme)
    selection = _without(chosen, crossing(view))
    _refuse_no_expert(selection, scheme)
    modules = {m.name: m.place.layer if m.place.scope == "block" else None for m in selection.quantized}
    rounded = {name for module in selection.quantized for name in module.sources}
    healed = healed_names(view.layout, view.layout.places, recipe.heal.widest) if recipe and recipe.heal else ()
    types = Types(grid=scheme.grid, modules=modules)
    contents = contents_of(view, types, [name for name in healed if name not in rounded])
    shards = contents.shards(source, asked, options.max_shard_bytes)
    blocks = Blocks(recipe, block_sizes(decoded(source) or source, view)) if recipe else None
    documents = documents_of(view.checkpoint)
    sidecars = sidecar_digests(documents)
    told = scheme_inputs(scheme, recipe)
    plan = Plan(
        command="quantize",
        source=source.root,
        remote=source.remote,
        source_shards=source.shards,
        view=view.checkpoint,
        shards=shards,
        steps=tuple(gguf_steps(contents, view, shards, blocks)),
        config=b"",
        container="gguf",
        sidecars=sidecars,
        inputs={
            **view_inputs("quantize", source, manifest, replace(options, gguf=asked), sidecars),
            "scheme": told,
            **({"recipe": recipe.facts()} if recipe else {}),
            computing.KEY: computing.of_model(recipe.device) if recipe else computing.of_rounding(),
        },
        summary=_summary(source, view, selection, told, len(contents.written), contents.copies),
        notes=(*view.notes, *_gguf_notes(chosen, selection), *_misfit_notes(selection)),
        unread=source.unread,
    )
    plan.check()
    return plan


_CROSSING: Final = "its columns leave the blocks that share a scale in GGUF"


def _without(selection: Selection, apart: Collection[str]) -> Selection:
    """The selection less some modules, which stay in 16 bits."""
    quantized = tuple(module for module in selection.quantized if module.name not in apart)
    kept = tuple(module for module in selection.quantized if module.name in apart)
    reasons = {**selection.kept, **{module.name: _CROSSING for module in kept}}
    return Selection(quantized, reasons, selection.misfits, (*selection.kept_modules, *kept))


def _gguf_notes(chosen: Selection, selection: Selection) -> Iterator[str]:
    if count := len(chosen.quantized) - len(selection.quantized):
        yield f"{count:,} weights stay in 16 bits: {_CROSSING}"


def _kept(view: View, selection: Selection, scheme: Scheme) -> dict[str, TensorRef]:
    """What stays as wide as it is, under the names that the format's clients look for."""
    tensors = view.checkpoint.tensors
    if scheme.format == "mlx":
        return mlx.kept_of(view.layout, tensors, selection)
    return kept_tensors(view.layout, tensors, selection, scheme)


def _part_specs(selection: Selection, scheme: Scheme, stacks: Sequence[Stack]) -> Iterator[TensorSpec]:
    """Tensors that stand for what is quantized, of one module each or of a stack of them."""
    encoding = Ints.of(scheme)
    if not stacks:
        yield from (part.spec(m.name) for m in selection.quantized for part in encoding.parts(*m.shape))
    for stack in stacks:
        first = stack.members[0]
        yield from (stack.spec(part.spec(first.name)) for part in encoding.parts(*first.shape))


@dataclass(frozen=True, slots=True)
class _Quantized:
    """What is quantized, and how it is written: module by module, or in stacks where there are any."""

    encoding: Ints
    modules: Sequence[Matrix]
    stacks: Sequence[Stack]

    def items(
        self, extents: Mapping[str, Extent], *, tunes: bool
    ) -> tuple[list[tuple[int | None, TranscodeItem]], list[tuple[TranscodeItem, int]]]:
        """What is tuned, with the number of its block, and what is rounded, with the bytes that are read for it.

        A stack is rounded as one matrix, so that one step writes each chunk of it; a block is tuned in one step anyway.
        """
        tuned: list[tuple[int | None, TranscodeItem]] = []
        rounded: list[tuple[TranscodeItem, int]] = []
        for stack in self.stacks or [Stack(module.name, (module,)) for module in self.modules]:
            place = stack.members[0].place
            if tunes and place.scope == "block":
                tuned += ((place.layer, item) for item in self._one_by_one(stack, extents))
                continue
            stored = tuple(each for member in stack.members for each in member.stored)
            rounded.append((transcode_item(stack.name, stored, self.encoding, extents), stack.nbytes))
        return tuned, rounded

    def _one_by_one(self, stack: Stack, extents: Mapping[str, Extent]) -> Iterator[TranscodeItem]:
        """Members of a stack, each with its place in the tensors of all."""
        count = len(stack.members)
        suffixes = [part.suffix for part in self.encoding.parts(*stack.members[0].shape)]
        whole = {suffix: extents[f"{stack.name}.{suffix}"] for suffix in suffixes}
        for at, member in enumerate(stack.members):
            places: dict[str, Extent] = {}
            for suffix, extent in whole.items():
                length = extent.length // count
                places[f"{member.name}.{suffix}"] = Extent(extent.shard, extent.offset + at * length, length)
            yield transcode_item(member.name, member.stored, self.encoding, places)


def _view(
    source: Checkpoint, scheme: Scheme, manifest: Manifest | None, options: ViewOptions, recipe: Recipe | None
) -> View:
    """What is quantized of the source, as 16-bit weights; refuses what cannot be."""
    if scheme.format == "compressed-tensors" and scheme.grid.scale_grid == "fp16":
        raise SchemeError(
            "`format` compressed-tensors needs `scale_grid` bf16: transformers runs experts in the type of their"
            " scales, and float16 overflows where bfloat16 does not"
        )
    if recipe and scheme.expert_names != "split":
        raise SchemeError("tuned and healed blocks are written with `expert_names` split; see `shardxform convert`")
    plain = decoded(source)
    if plain is None:
        _refuse_quantized(source)
    mtp = _mtp(scheme, options)
    view = pruned_view(plain or source, manifest, text_only=options.text_only, mtp=mtp)
    if scheme.format == "mlx":
        mlx.refuse_unrun(view.layout)
    if recipe and recipe.heal:
        refuse_unpruned(view)
    _refuse_unscaled(view)
    refuse_unread(view.layout, scheme)
    return view


def _mtp(scheme: Scheme, options: ViewOptions) -> MtpMode:
    """What becomes of MTP layers.

    Raises:
        SchemeError: they are to be kept where no client runs them.

    """
    if scheme.format != "mlx":
        return options.mtp
    if options.mtp == "keep":
        raise SchemeError("`mtp` keep: mlx-lm runs no MTP layers, and refuses some: leave it out with `format` mlx")
    return "drop"


def _computed(
    source: Checkpoint,
    view: View,
    shards: Sequence[ShardPlan],
    gathered: Mapping[str, tuple[TensorSpec, tuple[Storage, ...]]],
    quantized: _Quantized,
    healed: Mapping[int, tuple[KeptItem, ...]],
    recipe: Recipe | None,
) -> Iterator[Step]:
    """Steps that compute: values that are moved or decoded, weights that are rounded, blocks that are tuned."""
    extents = extents_of(shards)
    tuned, rounded = quantized.items(extents, tunes=recipe is not None)
    yield from transcode_steps(
        (TranscodeItem(name, stored, Plain(spec.dtype), (("values", extents[name]),)), spec.nbytes)
        for name, (spec, stored) in gathered.items()
    )
    yield from transcode_steps(rounded)
    if recipe:
        yield from _tune_steps(
            tuned, healed, block_sizes(decoded(source) or source, view), partial(TuneBlock, recipe=recipe)
        )


def _refuse_quantized(source: Checkpoint) -> None:
    """Refuse a source that is quantized, or whose config says so.

    Raises:
        SchemeError: says which, and what to do.

    """
    for path, declared in declarations(source.config):
        where = ".".join(path)
        method = method_of(declared) if isinstance(declared, Mapping) else None
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
        if not any(target_of(other).misfit(*shape) for shape in shapes):
            odd = next(module for module in misfits if target_of(scheme).misfit(*module.shape))
            raise SchemeError(
                f"no routed expert can be quantized: {odd.name}: {selection.misfits[odd.name]};"
                f" `group_size` {size} fits; to keep them in 16 bits, `keep_16bit` '*.experts.*'"
            )


def scheme_inputs(scheme: Scheme, recipe: Recipe | None = None) -> dict[str, Any]:
    """Describe a scheme as plain data, for the record and for comparison."""
    return {"method": "auto-round" if recipe and recipe.iters else "rtn", **asdict(scheme)}


def _healed(
    view: View,
    selection: Selection,
    scheme: Scheme,
    copied: Mapping[str, TensorRef],
    shards: Sequence[ShardPlan],
    recipe: Recipe | None,
) -> dict[int, tuple[KeptItem, ...]]:
    """By layer, what stays 16-bit and is healed."""
    if recipe is None or recipe.heal is None:
        return {}
    if scheme.format == "mlx":
        _refuse_stacked(selection)
    unfused = {f"{module.name}.weight": module.place for module in selection.kept_modules}
    places = {name: place for name, place in {**unfused, **view.layout.places}.items() if name in copied}
    return kept_items(healed_names(view.layout, places, recipe.heal.widest), places, copied, extents_of(shards))


def _refuse_stacked(selection: Selection) -> None:
    """Refuse to heal experts that stay 16-bit and are stacked: what is healed has its own tensor.

    Raises:
        SchemeError: names one.

    """
    stay = [m.name for m in selection.kept_modules if m.expert is not None and m.place.scope == "block"]
    if stay:
        raise SchemeError(
            f"`heal`: {stay[0]} stays 16-bit, and `format` mlx stacks such experts, which are not healed there; heal"
            " with `shardxform prune` first"
        )


def _tune_steps(
    items: Iterable[tuple[int | None, TranscodeItem]],
    healed: Mapping[int, tuple[KeptItem, ...]],
    sizes: Mapping[int, BlockSize],
    make: Callable[..., TuneBlock],
) -> Iterator[TuneBlock]:
    """One step per decoder block with weights to heal or tune, in order."""
    blocks: dict[int, list[TranscodeItem]] = {layer: [] for layer in healed}
    for layer, item in items:
        assert layer is not None
        blocks.setdefault(layer, []).append(item)
    for layer, tuned in sorted(blocks.items()):
        yield make(layer=layer, items=tuple(tuned), kept=healed.get(layer, ()), size=sizes[layer])


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


def _decoded_notes(view: View, kept: Mapping[str, TensorRef], bits: int) -> Iterator[str]:
    """Say what becomes of weights that are no 16-bit ones in the source."""
    found = Counter(
        str(source.encoding)
        for ref in view.checkpoint.tensors.values()
        if isinstance(ref, Encoded)
        for source in ref.sources
        if not isinstance(source.encoding, Picked)
    )
    if not found:
        return
    stay = sum(len(ref.sources) for ref in kept.values() if isinstance(ref, Encoded))
    how = ", ".join(f"{count:,} in {name}" for name, count in found.most_common())
    yield (
        f"weights of the source are in small floats ({how}): {stay:,} of them are written as bfloat16, and the others"
        " rounded from float32"
    )
    if any("FP4" in name for name in found) and bits >= 4:
        yield (
            "weights of 4 bits are rounded a second time and become no smaller: `prune` keeps their bytes, which is"
            " lossless"
        )


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
