"""Planning a quantization: a view of the source, its selected modules replaced by packed parts, cut into steps.

With a manifest the view is a pruned one, so that pruning and quantizing are one pass over the source. Pure but for
sidecars; no tensor data is read and no array library is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from shardxform.ask.manifest import Manifest, chosen_by
from shardxform.ask.recipe import Recipe
from shardxform.base import computing
from shardxform.base.tensors import TensorRef, TensorSpec, uncollected
from shardxform.checkpoint.history import past_of
from shardxform.checkpoint.identity import identity_when_asked
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats.affine import Affine
from shardxform.formats.asymmetric import Asymmetric
from shardxform.formats.config_names import declarations, declared_in, method_of, with_declared
from shardxform.formats.decoding import decoded, encodings_of
from shardxform.formats.dialects import (
    Selection,
    build,
    gathered_tensors,
    is_carried,
    kept_tensors,
    reasons_summary,
    refuse_unread,
    select,
    takes_over,
    target_of,
)
from shardxform.formats.encoding import Encoded, Encoding, Storage
from shardxform.formats.fp8 import Fp8
from shardxform.formats.integers import Ints, Values, reread
from shardxform.formats.matrices import Matrix
from shardxform.formats.microscaling import Microscaled
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import FORMATS, GGUF, GROUP_SIZES, Grid, Scheme
from shardxform.formats.stored import Stored, as_plain, read_stored
from shardxform.model.layout import is_quantized
from shardxform.plan.gguf import GgufFiles, Types, crossing, documents_of, drafted
from shardxform.plan.mlx import member_items, part_specs, stack_item
from shardxform.plan.plan import Extent, Plan, ShardPlan, Step, copy_steps, extents_of, lay_out
from shardxform.plan.steps import (
    BlockSize,
    KeptItem,
    TranscodeItem,
    TuneBlock,
    block_sizes,
    healed_names,
    kept_items,
    merged_into,
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
    view_stated,
    view_summary,
)
from shardxform.runtimes import as_family, mlx
from shardxform.runtimes.mlx import Stack
from shardxform.runtimes.mlx_families import refuse_misread

__all__ = ["draft_quantized", "plan_quantize", "rounded_again"]


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
    options, source = options or ViewOptions(), as_family(source)
    if scheme.format == GGUF:
        return _plan_gguf(source, scheme, manifest, options, recipe)
    plain, stored = _plain(source, scheme)
    view = _view(source, plain, scheme, manifest, options, recipe)
    tensors = view.checkpoint.tensors
    selection = select(view.layout, tensors, scheme)
    _refuse_no_expert(selection, scheme)
    _refuse_second_rounding(selection, scheme, stored)
    _refuse_still(view, selection, scheme, recipe)
    quantization = build(selection, scheme, view.layout, recipe.iters if recipe else 0)
    stacks = _stacks(view, selection, scheme)
    kept = _kept(view, selection, scheme)
    copied = {name: ref for name, ref in kept.items() if not isinstance(ref, Encoded)}
    gathered = gathered_tensors(selection, scheme, kept)
    specs = [ref.spec for ref in copied.values()] + [spec for spec, _ in gathered.values()]
    specs += _part_specs(selection, scheme, stacks)
    shards = lay_out(specs, options.max_shard_bytes)
    apart = {name: Encoded(spec, (), stored) for name, (spec, stored) in gathered.items()}
    healed = _healed(view, selection, scheme, {**copied, **apart}, shards, recipe)
    moved = {item.tensor.name for items in healed.values() for item in items}
    unchanged, gathered = copied.keys() - moved, {name: gathered[name] for name in gathered if name not in moved}
    copies = copy_steps(shards, {name: ref for name, ref in copied.items() if name in unchanged})
    still = frozenset(module.name for module in selection.quantized if is_carried(module, scheme))
    encoded = _Quantized(Ints.of(scheme), selection.quantized, stacks, still)
    computed = _computed(plain or source, view, shards, gathered, encoded, healed, recipe)
    config, told = _config(view, quantization, scheme)
    quantized_view = replace(view, checkpoint=replace(view.checkpoint, config=config))
    sidecars, identity, past = sidecar_digests(view.checkpoint), identity_when_asked(source), past_of(source)
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
        identity=identity,
        stated={
            **view_stated("quantize", source, manifest, options, sidecars, identity),
            "scheme": scheme_inputs(scheme, recipe),
            **({"recipe": recipe.facts()} if recipe else {}),
            computing.KEY: computing.of_model(recipe.device) if recipe else computing.of_rounding(),
        },
        summary={
            **_summary(source, view, selection, scheme_inputs(scheme, recipe), len(specs), len(unchanged)),
            **chosen_by(manifest),
        },
        notes=(*view.notes, *_decoded_notes(selection, kept, scheme), *_misfit_notes(selection), *told, *past.notes),
        unread=source.unread,
        past=past,
    )
    plan.check()
    return plan


def _stacks(view: View, selection: Selection, scheme: Scheme) -> list[Stack]:
    """Stacks of experts that a format has; none where experts are written one by one.

    Raises:
        SchemeError: MLX would run something else.

    """
    if scheme.format != "mlx":
        return []
    mlx.refuse_unrun(view.layout, selection.quantized)
    return mlx.stacks_of(view.layout, selection.quantized)


def _config(view: View, quantization: dict[str, Any], scheme: Scheme) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config that is written, and what a person should know of it."""
    if scheme.format != "mlx":
        return with_declared(view.checkpoint.config, quantization), ()
    config = mlx.config_of(view.checkpoint.config, view.layout, quantization)
    return config, tuple(mlx.notes_of(view.source_layout, config))


def _plan_gguf(
    source: Checkpoint, scheme: Scheme, manifest: Manifest | None, options: ViewOptions, recipe: Recipe | None
) -> Plan:
    """Plan the same as a GGUF file."""
    options = replace(options, gguf=options.gguf or GgufOptions())
    draft, chosen, selection = draft_quantized(source, scheme, manifest, options, recipe)
    sidecars, told = sidecar_digests(documents_of(draft.view.checkpoint)), scheme_inputs(scheme, recipe)
    identity = identity_when_asked(source)
    stated = {
        **view_stated("quantize", source, manifest, options, sidecars, identity),
        "scheme": told,
        **({"recipe": recipe.facts()} if recipe else {}),
        computing.KEY: computing.of_model(recipe.device) if recipe else computing.of_rounding(),
    }
    stored, copied = len(draft.contents.written), draft.contents.copies
    return draft.plan(
        source,
        recipe,
        identity=identity,
        stated=stated,
        summary={**_summary(source, draft.view, selection, told, stored, copied), **chosen_by(manifest)},
        notes=(
            *draft.view.notes,
            *_decoded_notes(selection, {}, scheme),
            *_gguf_notes(chosen, selection),
            *_misfit_notes(selection),
            *draft.notes,
        ),
    )


def draft_quantized(
    source: Checkpoint,
    scheme: Scheme,
    manifest: Manifest | None = None,
    options: ViewOptions | None = None,
    recipe: Recipe | None = None,
) -> tuple[GgufFiles, Selection, Selection]:
    """Find what a GGUF file holds whose selected weights have the codes and scales of the other formats.

    Returns:
        the draft, the weights that were selected, and those that are quantized: columns of others leave their blocks.

    Raises:
        SchemeError, FamilyError, ManifestError, PlanError: see `plan_quantize`.

    """
    options = options or ViewOptions()
    if options.gguf and options.gguf.kind:
        raise SchemeError(f"`gguf.kind` {options.gguf.kind}: weights are rounded by `scheme`; give one of the two")
    plain, stored = _plain(source, scheme)
    view = _view(source, plain, scheme, manifest, options, recipe)
    chosen = select(view.layout, view.checkpoint.tensors, scheme)
    selection = _without(chosen, crossing(view))
    _refuse_no_expert(selection, scheme)
    _refuse_second_rounding(selection, scheme, stored)
    _refuse_still(view, selection, scheme, recipe)
    tuned = {m.name for m in selection.quantized if m.place.scope == "block" and not is_carried(m, scheme)}
    modules = {m.name: m.place.layer if m.name in tuned else None for m in selection.quantized}
    rounded = {name for module in selection.quantized for name in module.sources}
    healed = healed_names(view.layout, view.layout.places, recipe.heal.widest) if recipe and recipe.heal else ()
    left = [name for name in healed if name not in rounded]
    return drafted(source, view, Types(grid=scheme.grid, modules=modules), options, left), chosen, selection


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
    if scheme.format == "mlx":
        yield from part_specs(stacks, encoding)
    else:
        yield from (part.spec(m.name) for m in selection.quantized for part in encoding.parts(*m.shape))


@dataclass(frozen=True, slots=True)
class _Quantized:
    """What is quantized, and how it is written: module by module, or in stacks where there are any.

    `still` names those whose integers stay what they are.
    """

    encoding: Ints
    modules: Sequence[Matrix]
    stacks: Sequence[Stack]
    still: frozenset[str]

    def items(
        self, extents: Mapping[str, Extent], *, tunes: bool
    ) -> tuple[list[tuple[int | None, TranscodeItem]], list[tuple[TranscodeItem, int]]]:
        """What is tuned, with the number of its block, and what is rounded, with the bytes that are read for it."""
        tuned: list[tuple[int | None, TranscodeItem]] = []
        rounded: list[tuple[TranscodeItem, int]] = []
        parts_of = functools.cache(self.encoding.parts)  # of one shape, as a rule, for ten thousand experts
        for module in () if self.stacks else self.modules:
            item = transcode_item(module.name, module.stored, self.encoding, extents, parts_of)
            if tunes and module.place.scope == "block" and module.name not in self.still:
                tuned.append((module.place.layer, item))
            else:
                rounded.append((item, module.nbytes))
        for stack in self.stacks:
            place = stack.first.place
            if tunes and place.scope == "block" and stack.first.name not in self.still:
                tuned += ((place.layer, item) for item in member_items(stack, self.encoding, extents))
            else:
                rounded.append((stack_item(stack, self.encoding, extents), stack.nbytes))
        return tuned, rounded


def _view(
    source: Checkpoint,
    plain: Checkpoint | None,
    scheme: Scheme,
    manifest: Manifest | None,
    options: ViewOptions,
    recipe: Recipe | None,
) -> View:
    """What is quantized of the source, which a quantized one has as `plain`; refuses what cannot be."""
    if scheme.format == "compressed-tensors" and scheme.grid.scale_grid == "fp16":
        raise SchemeError(
            "`format` compressed-tensors needs `scale_grid` bf16: transformers runs experts in the type of their"
            " scales, and float16 overflows where bfloat16 does not"
        )
    if recipe and scheme.expert_names != "split":
        raise SchemeError("tuned and healed blocks are written with `expert_names` split; see `shardxform convert`")
    if plain is None:
        _refuse_quantized(source)
    mtp = _mtp(scheme, options)
    view = pruned_view(plain or source, manifest, text_only=options.text_only, mtp=mtp)
    if scheme.format == "mlx":
        mlx.refuse_unrun(view.layout)
        refuse_misread(view.layout)
    if recipe and recipe.heal:
        refuse_unpruned(view, recipe.heal)
        if recipe.heal.encoding:
            raise SchemeError("`heal.encoding`: what is healed is rounded, or stays in 16 bits; leave it out")
    _refuse_unscaled(view)
    refuse_unread(view.layout, scheme)
    return view


def _plain(source: Checkpoint, scheme: Scheme) -> tuple[Checkpoint | None, Stored | None]:
    """The 16-bit checkpoint that a quantized source stands for, and its integers, if they are those of one scheme."""
    if plain := decoded(source):
        return plain, None
    stored = _integers(source)
    return (_of_integers(source, stored, scheme), stored) if stored else (None, None)


def _integers(source: Checkpoint) -> Stored | None:
    """A source of integers of one scheme; None for one that declares none.

    Raises:
        SchemeError, CheckpointError: not as the config says.

    """
    declared = declared_in(source.config)
    method = method_of(declared) if isinstance(declared, Mapping) else None
    if method not in FORMATS or not any(is_quantized(ref.spec) for ref in source.tensors.values()):
        return None
    stored = read_stored(source)
    if stored.contradictions:
        raise SchemeError(f"{source.where}: {stored.contradictions[0]}; see `shardxform verify`")
    return stored


def _of_integers(source: Checkpoint, stored: Stored, scheme: Scheme) -> Checkpoint:
    """The 16-bit checkpoint that integers stand for.

    Those that are of the grid asked for stay what they are; others are values, which can be rounded.
    """
    plain = as_plain(source, stored)
    if takes_over(scheme, Ints.of(stored.scheme)):
        return plain
    return replace(plain, tensors={name: reread(ref) for name, ref in plain.tensors.items()})


def rounded_again(selection: Selection, scheme: Scheme) -> list[tuple[str, Encoding]]:
    """Modules that would be rounded from no more bits than they get, and what they are stored in."""
    return [
        (module.name, encoding)
        for module in selection.quantized
        for encoding in module.encodings
        if isinstance(encoding, (Ints, Values, Affine, Asymmetric, Fp8, Microscaled))
        and encoding.width <= scheme.grid.bits
        and not is_carried(module, scheme)
    ]


_AGAIN: Final = "rounds them a second time, with a loss, and `shardxform prune` keeps every byte"


def _refuse_second_rounding(selection: Selection, scheme: Scheme, stored: Stored | None) -> None:
    """Refuse to round what is no larger than what is asked for, unless it is to be rounded anew.

    It cannot stay as it is beside others: clients read one kind of quantized weights in a checkpoint.

    Raises:
        SchemeError: names one, and what can be done.

    """
    found = [] if scheme.requantize else rounded_again(selection, scheme)
    if not found:
        return
    (name, encoding), way = found[0], _way_to_carry(scheme.grid, stored.scheme.grid) if stored else ""
    raise SchemeError(
        f"{len(found):,} weights of the source, such as {name}, are {encoding}: no larger than {Ints.of(scheme)}, and"
        f" no client reads both in one checkpoint; {way}`requantize` {_AGAIN}"
    )


def _refuse_still(view: View, selection: Selection, scheme: Scheme, recipe: Recipe | None) -> None:
    """Refuse to round, heal or tune where it is integers that stay as they are.

    Raises:
        SchemeError: says which.

    """
    still = [module for module in selection.quantized if is_carried(module, scheme) and module.place.scope == "block"]
    if len(still) == len(selection.quantized) and view.layout.num_experts == view.source_layout.num_experts:
        raise SchemeError(
            f"nothing to round: all {len(still):,} weights are {Ints.of(scheme)} already; see `shardxform convert`, or"
            " `requantize` to round them anew"
        )
    if not recipe or not still:
        return
    if recipe.heal:
        names = set(healed_names(view.layout, view.layout.places, recipe.heal.widest))
        if moved := [module.name for module in still if not names.isdisjoint(module.sources)]:
            raise SchemeError(
                f"`heal`: {len(moved):,} weights, such as {moved[0]}, are integers that stay as they are, and cannot"
                " move; `requantize` heals and rounds them"
            )
    if recipe.iters and len(still) == sum(module.place.scope == "block" for module in selection.quantized):
        raise SchemeError(
            f"nothing to tune: all {len(still):,} weights are {Ints.of(scheme)} already, and stay as they are;"
            " `requantize` tunes and rounds them anew"
        )


def _way_to_carry(asked: Grid, found: Grid) -> str:
    """What to ask for so that integers stay as they are."""
    ways = []
    if asked.bits != found.bits:
        ways.append(f"`bits` W{found.bits}A16")
    if asked.group_size != found.group_size:
        ways.append(f"`group_size` {found.group_size}")
    if (asked.scale_grid, found.scale_grid) == ("bf16", "fp16"):
        ways.append("`scale_grid` fp16")
    return f"{' and '.join(ways)} takes them over as they are, " if ways else ""


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
        make, keep = partial(TuneBlock, recipe=recipe), merged_into(view, recipe)
        yield from _tune_steps(tuned, healed, block_sizes(source, view), make, keep)


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
    again = [] if scheme.requantize else rounded_again(replace(selection, quantized=tuple(misfits)), scheme)
    way = "; to keep them in 16 bits, `keep_16bit` '*.experts.*'"
    if again:
        way = f", but they are {again[0][1]} already: `requantize` {_AGAIN}"
    shapes = {module.shape for module in misfits}
    for size in GROUP_SIZES:
        other = replace(scheme, grid=replace(scheme.grid, group_size=size))
        if not any(target_of(other).misfit(*shape) for shape in shapes):
            odd = next(module for module in misfits if target_of(scheme).misfit(*module.shape))
            raise SchemeError(
                f"no routed expert can be quantized: {odd.name}: {selection.misfits[odd.name]};"
                f" `group_size` {size} fits{way}"
            )


def scheme_inputs(scheme: Scheme, recipe: Recipe | None = None) -> dict[str, Any]:
    """Describe a scheme as plain data, for the record and for comparison."""
    return {"method": "auto-round" if recipe and recipe.iters else "rtn", **scheme.facts()}


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
    keep: Mapping[int, tuple[int, ...]],
) -> Iterator[TuneBlock]:
    """One step per decoder block with weights to heal or tune, in order."""
    blocks: dict[int, list[TranscodeItem]] = {layer: [] for layer in healed}
    for layer, item in items:
        assert layer is not None
        blocks.setdefault(layer, []).append(item)
    for layer, tuned in sorted(blocks.items()):
        kept, into = healed.get(layer, ()), keep.get(layer, ())
        yield make(layer=layer, keep=into, items=tuple(tuned), kept=kept, size=sizes[layer])


def _summary(
    source: Checkpoint, view: View, selection: Selection, scheme: Mapping[str, object], stored: int, copied: int
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


def _decoded_notes(selection: Selection, kept: Mapping[str, TensorRef], scheme: Scheme) -> Iterator[str]:
    """Say what becomes of weights that are no 16-bit ones in the source, and what of it is lossless."""
    carried = [module for module in selection.quantized if is_carried(module, scheme)]
    if carried:
        yield (
            f"{len(carried):,} weights keep every integer and every scale: the source holds them in"
            f" {Ints.of(scheme)} already"
        )
    rounded = encodings_of(module.weight for module in selection.quantized if not is_carried(module, scheme))
    written = encodings_of(kept.values())
    if rounded:
        yield f"rounded from their values: {_listed(rounded)} in the source"
    if written:
        yield f"written as bfloat16, rounded to its 8 significant bits: {_listed(written)} in the source"
    if scheme.requantize and rounded:
        yield "what is rounded a second time is not what the source holds: `shardxform prune` keeps its bytes"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} weights that are {name}" for name, count in counts.items())


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
