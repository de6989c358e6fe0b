"""Pruning and text-only as functions from one checkpoint to a view of it: a new table and a new config, no bytes.

A view is what `prune` writes, what `quantize` rounds in the same pass, and what `verify` holds an output
against; all three call `pruned_view`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from shardxform.ask.manifest import Manifest, mtp_moe_layers
from shardxform.base.strict_json import config_text, parse_config
from shardxform.base.tensors import ID_DTYPES, Remade, TensorRef
from shardxform.checkpoint.identity import Identity
from shardxform.checkpoint.sidecars import refuse_faulty
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import CheckpointError, FamilyError, ManifestError, PlanError
from shardxform.formats.config_names import (
    DECLARATIONS,
    Changes,
    declarations,
    is_mlx,
    modules_moved,
    tells_experts_apart,
    with_renamed,
    without_empty,
)
from shardxform.model.expected import Expected, expected, first_of_alike
from shardxform.model.families import family_origin
from shardxform.model.families.base import Slicing, Template, Wrapper
from shardxform.model.layout import (
    COMPANIONS,
    Layout,
    Place,
    count_paths,
    is_quantized,
    is_shape,
    layout_of,
    refuse_strays,
    refuse_two_spellings,
    value_at,
    variants_found,
)
from shardxform.model.tied_head import tied_notes

__all__ = [
    "DEFAULT_GGUF_BYTES",
    "DEFAULT_SHARD_BYTES",
    "GgufOptions",
    "MtpMode",
    "View",
    "ViewOptions",
    "config_bytes",
    "pruned_view",
    "sidecar_digests",
]

MtpMode = Literal["auto", "keep", "drop"]

# Top-level keys of a multimodal config that still mean something once the text config is promoted.
_CARRIED = ("dtype", "torch_dtype", "tie_word_embeddings", "transformers_version")

Promised = Sequence[tuple[str, Expected]]
"""What must be there, as `expected` gives it."""

_MTP_WAY_OUT = "; or leave the MTP layers out with `mtp` drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A checkpoint nobody wrote.

    Attributes:
        checkpoint: table, config and sidecars of the view; its byte ranges lie in the source's shards.
        layout: of the view.
        source_layout: of the source.
        copied, sliced, renamed: numbers of tensors written, by what was done to them (sliced ones may be renamed too).
        dropped: numbers of source tensors left out, by reason.
        notes: what a person should know before running, one sentence each.
        width: channels that every expert keeps, where some are taken out.
        keep: by decoder block, experts of the source that stay, ascending; empty without a manifest.

    """

    checkpoint: Checkpoint
    layout: Layout
    source_layout: Layout
    copied: int
    sliced: int
    renamed: int
    dropped: Mapping[str, int]
    notes: tuple[str, ...]
    width: int | None = None
    keep: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def prunes(self) -> bool:
        """Whether experts are taken out, or channels of them."""
        return self.width is not None or self.layout.num_experts < self.source_layout.num_experts


def pruned_view(
    source: Checkpoint, manifest: Manifest | None, *, text_only: bool = False, mtp: MtpMode = "auto"
) -> View:
    """Apply a keep manifest, and optionally drop the vision tower, by names and byte ranges alone.

    Args:
        source: the checkpoint to look at.
        manifest: experts to keep, checked here against the source; None keeps all.
        text_only: drop the vision tower and promote the text config.
        mtp: `keep` prunes the MTP layers by the manifest's `mtp_keep`; `drop` removes them; `auto` keeps them when
            `mtp_keep` is there or nothing is pruned, and drops them otherwise.

    Raises:
        FamilyError: the source contradicts its family, or the family has no text-only class.
        ManifestError: the manifest does not fit.
        PlanError: a tensor that cannot be pruned safely.

    """
    layout = layout_of(source.config, source.tensors, source.where)
    if manifest is not None:
        manifest.check(layout)
    kept, width = (manifest.num_kept, manifest.width) if manifest else (layout.num_experts, None)
    prunes = kept < layout.num_experts or width is not None
    notes: list[str] = []
    dropped = _dropped_mtp(layout, manifest, mtp, prunes, notes)
    wanted = replace(layout, wrapper=replace(layout.wrapper, vision=False)) if text_only else layout
    looked_at = _looked_at(wanted, source.tensors)
    refuse_two_spellings(looked_at, dropped, _MTP_WAY_OUT)
    promised = list(expected(looked_at, variants_found(looked_at)))
    _check_experts(looked_at, source.tensors, dropped, promised)
    notes[:0] = _notes(source, looked_at, dropped, promised)
    if prunes:
        _refuse_unsafe(layout, source, dropped)
    refuse_strays(layout, source.tensors, but=dropped)
    wrapper = _text_wrapper(layout, notes) if text_only else layout.wrapper
    config = without_empty(_config(layout, wrapper, kept, bool(dropped)))
    only_experts = not dropped and wrapper is layout.wrapper
    renames = any(declarations(config)) and (tells_experts_apart(config) or not only_experts)
    builder = _Builder(layout, manifest, dropped, wrapper, traces=renames)
    tensors = _unique(builder.tensors(source.tensors))
    if builder.renumbered:
        notes.append(
            f"'{builder.renumbered[0]}' names experts by token: in place of a pruned one stands the next by number that"
            f" stays and that the token has not ({len(builder.renumbered)} such tables)"
        )
    if width:
        from shardxform.plan.narrowing import narrowed, told_of  # most prunings leave experts as wide as they are

        tensors, changes = narrowed(tensors, config, width)
        config = _with_changes(config, changes)
        notes += told_of(changes, width)
    if renames:
        modules = modules_moved(layout, builder.moved, builder.keeps)
        config = with_renamed(config, Changes(modules, (layout.wrapper.prefix, wrapper.prefix)))
    checkpoint = replace(source, tensors=tensors, config=config)
    if wrapper is not layout.wrapper:
        left_out = layout.family.vision_sidecars
        checkpoint = replace(checkpoint, sidecars=tuple(s for s in source.sidecars if s.name not in left_out))
    changed = config != source.config or tensors.keys() != source.tensors.keys()
    return View(
        checkpoint=checkpoint,
        layout=layout_of(config, tensors) if changed else layout,
        source_layout=layout,
        copied=len(tensors) - builder.sliced,
        sliced=builder.sliced,
        renamed=builder.renamed,
        dropped=dict(builder.dropped),
        notes=tuple(notes),
        width=width.channels if width else None,
        keep=manifest.keep if manifest else {},
    )


def _looked_at(layout: Layout, tensors: Mapping[str, TensorRef]) -> Layout:
    """A layout of what must be looked at, to have looked at all."""
    firsts = first_of_alike(layout, (ref.spec for ref in tensors.values()))
    if firsts is None:
        return layout
    places = {spec.name: place for spec in firsts if (place := layout.places.get(spec.name))}
    return replace(layout, places=places, sampled=True)


def _unique(tensors: Iterable[tuple[str, TensorRef]]) -> dict[str, TensorRef]:
    """Refuse two tensors that would end under one name."""
    out: dict[str, TensorRef] = {}
    for name, ref in tensors:
        if name in out:
            raise PlanError(f"two tensors of the source would both be called '{name}'")
        out[name] = ref
    return out


class _Builder:
    """Walks the source's table once, in source order, counting what it does; `moved` has what it `traces`."""

    def __init__(
        self,
        layout: Layout,
        manifest: Manifest | None,
        dropped_mtp: tuple[str, ...],
        wrapper: Wrapper,
        *,
        traces: bool,
    ) -> None:
        self.moved: dict[str, str] = {}
        self._traces = traces
        self._layout = layout
        self._manifest = manifest
        self._dropped_mtp = dropped_mtp
        self._wrapper = wrapper
        self.sliced = 0
        self.renamed = 0
        self.renumbered: list[str] = []
        self.dropped: Counter[str] = Counter()
        self._numbers: dict[tuple[str, int | None], dict[int | None, int]] = {
            layer: {old: new for new, old in enumerate(ids)} for layer, ids in self.keeps.items()
        }

    @property
    def keeps(self) -> dict[tuple[str, int], tuple[int, ...]]:
        """Ids of the experts that stay, by scope and layer."""
        if self._manifest is None:
            return {}
        both = {"block": self._manifest.keep, "mtp": self._manifest.mtp_keep}
        return {(scope, layer): ids for scope, keep in both.items() for layer, ids in keep.items()}

    def tensors(self, source: Mapping[str, TensorRef]) -> Iterator[tuple[str, TensorRef]]:
        places, traces = self._layout.places, self._traces
        leaves_out = bool(self._dropped_mtp) or self._wrapper is not self._layout.wrapper
        for name, ref in source.items():
            place = places.get(name)
            if leaves_out and (reason := self._reason_to_drop(name, place)):
                out = None
            elif place and place.expert is not None:
                out, reason = self._renumbered(ref, place), "pruned experts"
            else:
                out = self._pruned(ref, place) if place else ref
            if out is None:
                self.dropped[reason] += 1
            else:
                out = self._rename(out) if leaves_out else out
                self.renamed += out.spec.name != name
                yield out.spec.name, out
            if traces:
                self.moved[name] = out.spec.name if out else ""

    def _renumbered(self, ref: TensorRef, place: Place) -> TensorRef | None:
        """A tensor of one expert under the expert's new number; None of one that does not stay."""
        _, scope, layer, expert, at, _ = place
        numbers = self._numbers.get((scope, layer))
        new = numbers.get(expert) if numbers else expert
        if new is None or new == expert:
            return None if new is None else ref
        *before, _, after = ref.spec.name.split(".", at + 1)
        return ref.renamed(".".join((*before, str(new), after)))

    def _reason_to_drop(self, name: str, place: Place | None) -> str:
        if self._dropped_mtp and name.startswith(self._dropped_mtp):
            return "MTP layers"
        if self._wrapper is not self._layout.wrapper:
            vision = self._layout.family.vision_prefix
            if (vision and name.startswith(vision)) or (place and place.template in self._layout.family.towers):
                return "vision tower"
        return ""

    def _pruned(self, ref: TensorRef, place: Place) -> TensorRef:
        keep = self._keep(place)
        if keep is None or len(keep) == self._layout.num_experts:
            return ref
        if place.template.slicing:
            if place.companion and not _has_rows(ref, place, self._layout):
                return ref
            self.sliced += 1
            return self._sliced(ref, place.template, keep)
        if place.template.ids and not place.companion:
            self.renumbered.append(ref.name)
            return _with_ids(ref, self._layout.num_experts, keep)
        return ref

    def _sliced(self, ref: TensorRef, template: Template, keep: tuple[int, ...]) -> TensorRef:
        """What stays of a tensor that counts experts: all of them, those of one set, or of each in a row."""
        each = self._layout.in_set
        assert template.slicing
        if not template.sets:
            return _sliced(ref, template.slicing, self._layout.num_experts, keep)
        if len(template.sets) == 1:
            own = tuple(expert % each for expert in keep if expert // each == template.sets[0])
            return _sliced(ref, template.slicing, each, own)
        rows = len(template.sets)  # one below the other, they are a row of all
        return ref.reshaped((rows * each,)).select(keep).reshaped((rows, len(keep) // rows))

    def _keep(self, place: Place) -> tuple[int, ...] | None:
        if self._manifest is None or (place.layer is None and not place.template.pruned):
            return None
        keeps = self._manifest.mtp_keep if place.scope == "mtp" else self._manifest.keep
        if place.layer is None:
            return _common(place.template.name, keeps)
        return keeps.get(place.layer)

    def _rename(self, ref: TensorRef) -> TensorRef:
        before, after = self._layout.wrapper, self._wrapper
        if before is after:
            return ref
        for old, new in ((before.prefix, after.prefix), (f"{before.head}.", f"{after.head}.")):
            if ref.name.startswith(old):
                return ref.renamed(new + ref.name[len(old) :]) if old != new else ref
        return ref


_MOST_RUNS: Final = 64
"""Runs of bytes, before the dimension that counts experts, up to which a tensor is cut into them."""


def _sliced(ref: TensorRef, slicing: Slicing, experts: int, keep: tuple[int, ...]) -> TensorRef:
    """A tensor with the positions of the experts that stay; those of a long matrix are to be worked out.

    Raises:
        PlanError: it has not the positions of so many experts.

    """
    axis, shape = slicing.axis, ref.spec.shape
    before, after = shape[:axis], shape[axis + 1 :]
    try:
        positions = slicing.positions(shape[axis], experts, keep)
    except (IndexError, ValueError) as e:
        raise PlanError(f"tensor '{ref.name}' {list(shape)} cannot be pruned: {e}, as config.json has it") from e
    out = (*before, len(positions), *after)
    if not after and math.prod(before) > _MOST_RUNS:
        matrix = ref.reshaped((math.prod(before), shape[axis]))
        return TensorRef(ref.spec.of_shape(out), (), remade=Remade(matrix, tuple(positions), "columns"))
    if slicing.several and not slicing.others:
        return ref.reshaped((*before, experts, shape[axis] // experts, *after)).take(axis, keep).reshaped(out)
    return ref.take(axis, positions)


def _with_ids(ref: TensorRef, experts: int, keep: tuple[int, ...]) -> TensorRef:
    """A table of experts' ids, [rows, ids], with those of the experts that stay.

    Raises:
        PlanError: it is no table of integers, or more ids stand in a row than experts stay.

    """
    shape = ref.spec.shape
    if ref.spec.dtype not in ID_DTYPES or len(shape) != 2:
        raise PlanError(
            f"tensor '{ref.name}' {ref.spec.dtype} {list(shape)}: expected rows of experts' ids, as integers"
        )
    if shape[1] > len(keep):
        raise PlanError(f"tensor '{ref.name}' gives {shape[1]} experts to each row, but {len(keep)} stay")
    return TensorRef(ref.spec, (), remade=Remade(ref, keep, "ids", experts))


def _common(name: str, keeps: Mapping[int, tuple[int, ...]]) -> tuple[int, ...] | None:
    """What every layer keeps, for a tensor that all of them share.

    Raises:
        PlanError: some keep other experts.

    """
    if len(set(keeps.values())) > 1:
        raise PlanError(f"all layers share '{name}': it can be pruned only if every layer keeps the same experts")
    return next(iter(keeps.values()), None)


def _has_rows(ref: TensorRef, place: Place, layout: Layout) -> bool:
    """Whether axis 0 of what stands for, or beside, a router's weight counts its rows, so that pruning slices it.

    Raises:
        PlanError: neither that, nor a tensor that stays as it is whichever rows are taken out.

    """
    rows, counts, shape = layout.num_experts, COMPANIONS[place.companion], ref.spec.shape
    if place.companion in ("scales", "biases") and is_mlx(layout.config):
        counts = "rows"
    plain = place.template.slicing == Slicing(0)
    if plain and counts in ("rows", "blocks") and shape and shape[0] == rows:
        return True
    if counts == "none" or (counts == "blocks" and (not shape or shape[0] == 1)):  # one block that holds every row
        return False
    why = {
        "rows": f"expected {rows} rows, one per expert",
        "blocks": f"its scales are for blocks of the router's {rows} rows, which pruning would take apart",
        "inside": "it counts the router's rows within its words or on another axis, where they cannot be taken out",
    }
    raise PlanError(
        f"tensor '{ref.name}' {list(shape)} of a quantized router cannot be pruned: {why[counts]};"
        " prune a checkpoint whose routers are in 16 bits"
    )


def _check_experts(
    layout: Layout, tensors: Mapping[str, TensorRef], dropped: tuple[str, ...], promised: Promised
) -> None:
    """Every MoE block has its router and every expert, in the shapes that the config promises, and no more.

    MTP layers that are dropped, whose names begin with `dropped`, are not looked at.
    """
    wanted: set[str] = set()
    for name, item in promised:
        template = item.place.template
        if not template.pruned or (item.place.scope == "mtp" and not layout.has_mtp):
            continue
        if name.startswith(dropped):
            continue
        wanted.add(name)
        ref = tensors.get(name)
        if ref is None and _has_companion(name, layout):
            continue
        way_out = _MTP_WAY_OUT if item.place.scope == "mtp" else ""
        if ref is None:
            raise FamilyError(
                f"tensor '{name}' is missing; the config promises {layout.num_experts} experts a layer{way_out}"
            )
        if not is_shape(ref.spec, item.shape):
            found, shape = list(ref.spec.shape), list(item.shape or ())
            raise FamilyError(f"tensor '{name}': shape {found}, but the config promises {shape}{way_out}")
    for name, place in layout.places.items():
        if name in wanted or place.companion or not place.template.pruned or name.startswith(dropped):
            continue
        _refuse_uncounted(layout, name, place)


def _refuse_uncounted(layout: Layout, name: str, place: Place) -> None:
    way_out = _MTP_WAY_OUT if place.scope == "mtp" else ""
    if place.scope == "mtp" and not layout.mtp_layers:
        key = layout.family.mtp.count_key if layout.family.mtp else ""
        raise FamilyError(f"tensor '{name}' belongs to an MTP layer, but config.json has no {key}{way_out}")
    count = layout.num_experts
    raise FamilyError(f"tensor '{name}' is one the config does not allow for ({count} experts){way_out}")


def _has_companion(name: str, layout: Layout) -> bool:
    stem = name.removesuffix("weight")
    return any(stem + suffix in layout.places for suffix in ("qweight", "weight_packed", "_blocks"))


def _dropped_mtp(
    layout: Layout, manifest: Manifest | None, mtp: MtpMode, prunes: bool, notes: list[str]
) -> tuple[str, ...]:
    """What the names of dropped MTP layers begin with; nothing where none is dropped."""
    if mtp == "drop":
        prefixes = (*layout.mtp_prefixes, *layout.undeclared_mtp_prefixes())
        found = layout.has_mtp or layout.mtp_layers > 0 or any(name.startswith(prefixes) for name in layout.unknown)
        return prefixes if found else ()
    return layout.mtp_prefixes if _drops_mtp(layout, manifest, mtp, prunes, notes) else ()


def _drops_mtp(layout: Layout, manifest: Manifest | None, mtp: MtpMode, prunes: bool, notes: list[str]) -> bool:
    if not layout.has_mtp:
        if layout.mtp_layers > 0 and prunes:
            notes.append("config.json declares MTP layers, but the source has no tensor of them; left as it is")
        return False
    if not prunes or (manifest and manifest.mtp_keep) or not mtp_moe_layers(layout):
        return False
    if mtp == "keep":
        raise ManifestError(
            "`mtp` keep: the MTP layers share the expert count and must be pruned too,"
            " but the manifest has no mtp_keep; expected one list per MTP layer"
        )
    notes.append("the MTP layers are dropped: they share the expert count, and the manifest has no mtp_keep for them")
    return True


def _refuse_unsafe(layout: Layout, source: Checkpoint, dropped: tuple[str, ...]) -> None:
    """Refuse what slicing could leave inconsistent without anyone noticing."""
    blocks = (layout.blocks, *layout.mtp_prefixes)
    undeclared = layout.undeclared_mtp_prefixes()
    for name in (each for each in layout.unknown if not each.startswith(dropped)):
        shape = source.tensors[name].spec.shape
        counts = {layout.num_experts, layout.in_set}.intersection(shape)
        if name.startswith(blocks) and ("expert" in name or "router" in name or counts):
            way_out = _MTP_WAY_OUT if name.startswith(undeclared) else ""
            raise PlanError(
                f"tensor '{name}' {list(shape)} is unknown to family {layout.family.name},"
                f" and looks as if it had to be pruned too{way_out}"
            )


def _notes(source: Checkpoint, layout: Layout, dropped: tuple[str, ...], promised: Promised) -> Iterator[str]:
    unknown = [name for name in layout.unknown if not name.startswith(dropped)]
    if unknown:
        names = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        yield f"{len(unknown)} tensors unknown to family {layout.family.name} are copied as they are: {names}"
    missing = [
        name
        for name, item in promised
        if name not in source.tensors
        and not item.optional
        and not _has_companion(name, layout)
        and (item.place.scope != "mtp" or layout.has_mtp)
        and not name.startswith(dropped)
    ]
    yield from _undeclared(source)
    if missing:
        yield f"the source lacks {len(missing)} tensors that family {layout.family.name} expects, such as {missing[0]}"
    yield from tied_notes(source, layout)


def _undeclared(source: Checkpoint) -> Iterator[str]:
    """Say where config.json declares quantized weights that are not there, or none although some are."""
    quantized = (ref.spec for ref in source.tensors.values() if is_quantized(ref.spec))
    declared, first = next(declarations(source.config), None), next(quantized, None)
    if declared and not first:
        where = ".".join(declared[0])
        yield f"config.json: {where} declares quantized weights, but the shards hold none: remove it, or clients refuse"
    elif first and not declared:
        count = 1 + sum(1 for _ in quantized)
        yield (
            f"{count} tensors of quantized weights, such as {first.name} ({first.dtype}), but config.json has"
            " no quantization_config, without which clients take them for something else"
        )


def _text_wrapper(layout: Layout, notes: list[str]) -> Wrapper:
    if layout.wrapper.text_key is None and not layout.wrapper.vision:
        notes.append("`text_only`: the source is text-only already")
        return layout.wrapper
    for wrapper in layout.family.wrappers:
        if wrapper.text_key is None and not wrapper.vision:
            return wrapper
    raise FamilyError(f"family {layout.family.name} has no text-only class")


def _config(layout: Layout, wrapper: Wrapper, kept: int, drop_mtp: bool) -> dict[str, Any]:
    """The config of the view: expert count, MTP count and wrapper; every other key as it was, in its order."""
    changes: dict[tuple[str, ...], Any] = {}
    if kept != layout.num_experts:
        for path in count_paths(layout.config, layout.family, layout.wrapper):
            counts, own = value_at(layout.config, ".".join(path)), kept // max(len(layout.family.sets), 1)
            changes[path] = [own] * len(counts) if isinstance(counts, list) else own
    mtp = layout.family.mtp
    if drop_mtp and mtp and mtp.count_key in layout.text:
        home = tuple(layout.wrapper.text_key.split(".")) if layout.wrapper.text_key else ()
        changes[(*home, mtp.count_key)] = 0
    config = _with_changes(layout.config, changes)
    if wrapper is layout.wrapper or layout.wrapper.text_key is None:
        return config
    text = {**config[layout.wrapper.text_key], "model_type": wrapper.model_type}
    carried = {key: config[key] for key in _CARRIED if key in config}
    carried.update(_carried_declarations(config, text))
    if "tie_word_embeddings" in text:  # the text-only class reads it here, the multimodal one read its own level
        carried["tie_word_embeddings"] = layout.text["tie_word_embeddings"]
    named = {"architectures": [wrapper.architecture]}
    return {**named, **text, **carried, **named}  # first, and whatever the text config says of it


def _carried_declarations(config: Mapping[str, object], text: Mapping[str, object]) -> Iterator[tuple[str, Any]]:
    """What the top level says of quantization; where the text config says it too, both must say the same.

    Raises:
        PlanError: they do not.

    """
    for key in DECLARATIONS:
        above, below = config.get(key), text.get(key)
        if above and below and above != below:
            raise PlanError(f"config.json: {key} and that of the text config differ; expected one")
        if key in config and (above or not below):
            yield key, above


def _with_changes(config: Mapping[str, Any], changes: Mapping[tuple[str, ...], object]) -> dict[str, Any]:
    out = dict(config)
    for (head, *rest), value in changes.items():
        out[head] = _with_changes(out[head], {tuple(rest): value}) if rest else value
    return out


DEFAULT_SHARD_BYTES: Final = 5_000_000_000
DEFAULT_GGUF_BYTES: Final = 48_000_000_000
"""A hub takes files of 50 GB, and few programs read a GGUF file that is split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufOptions:
    """What decides the bytes of a GGUF file beside what it is made of.

    Attributes:
        pre_tokenizer: llama.cpp's name of how text is split before it is tokenized; empty to tell it by the tokenizer.
        kind: of file, as llama-quantize names it, to whose types floats are rounded; empty for weights as they are.

    """

    pre_tokenizer: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOptions:
    """What decides an output's bytes beside source and manifest.

    Attributes:
        text_only: drop the vision tower and promote the text config.
        mtp: what becomes of multi-token-prediction layers; see `view.pruned_view`.
        max_shard_bytes: most bytes of tensor data in one shard.
        gguf: how a GGUF file is written; None where shards of safetensors are.

    """

    text_only: bool = False
    mtp: MtpMode = "auto"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    gguf: GgufOptions | None = None


def view_stated(
    command: str,
    source: Checkpoint,
    manifest: Manifest | None,
    options: ViewOptions,
    sidecars: Mapping[str, str],
    identity: Callable[[], Identity],
) -> dict[str, Any]:
    """What the bytes of an output made from a view depend on, by name, but for the source's values.

    Raises:
        ManifestError: the manifest says that it was chosen on another checkpoint, or on other values of this one.
        CheckpointError: a shard cannot be read, whose values the manifest says something of.

    """
    if manifest is not None:
        manifest.refuse_other_source(identity, source.shards)
    keep = manifest.to_dict() if manifest else {}
    chosen = {"text_only": options.text_only, "mtp": options.mtp, "max_shard_bytes": options.max_shard_bytes}
    return {
        "command": command,
        "options": {**chosen, **({"gguf": asdict(options.gguf)} if options.gguf else {})},
        "manifest": {key: keep[key] for key in ("keep", "mtp_keep", "width") if keep.get(key)},
        "source": {"sidecars": dict(sidecars)},
        **family_origin(source.config),
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
    """Bytes of the view's config.json; the source's own when nothing in it changed, and it said all that is known.

    Raises:
        CheckpointError: the source's config.json can no longer be read.

    """
    if view.checkpoint.config == source.config:
        data = _read(source, CONFIG)
        if bool(parse_config(data).get(DECLARATIONS[0])) == bool(source.config.get(DECLARATIONS[0])):
            return data
    return config_text(view.checkpoint.config).encode()


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
