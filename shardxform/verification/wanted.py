"""What the output must hold, tensor by tensor: bytes of the source, roundings of its weights, or values made of them.

Of tensors whose values follow from nothing that is there, it is said why. Names, dtypes and shapes; no tensor data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Final, Literal, cast

from shardxform.ask.recipe import HEALED, ROUTED
from shardxform.base.strict_json import Fields
from shardxform.base.tensors import TensorRef, TensorSpec, natural_key
from shardxform.checkpoint.history import steps_since
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError, SchemeError
from shardxform.formats.config_names import declared_in, declares, method_of
from shardxform.formats.dialects import is_carried, select
from shardxform.formats.encoding import ROUNDED, Encoded, Storage
from shardxform.formats.matrices import matrices_of, single_biases, turns
from shardxform.formats.plain import Plain, storages_of
from shardxform.formats.scheme import ExpertNames, Format, Grid, Scheme
from shardxform.formats.stored import HALF_DTYPES, Stored, config_of_half, plain_of, read_stored, released
from shardxform.model.families.base import LINEAR_ROLES
from shardxform.model.layout import COMPANIONS, Layout, layout_of
from shardxform.plan.gguf_origin import inputs_for
from shardxform.plan.steps import healed_names
from shardxform.plan.view import View
from shardxform.verification.findings import Findings
from shardxform.verification.parts import Pair, Rule, grid_of, pair_of

__all__ = [
    "Derived",
    "HealedWeight",
    "Known",
    "Reason",
    "Wanted",
    "heal_of",
    "healed_by",
    "known_of",
    "method_declared",
    "wanted_of",
]

Reason = Literal["healed", "tuned", "unknown"]

_FLOATS: Final = ("BF16", "F16", "F32")
_HALVES: Final = ("BF16", "F16")


@dataclass(frozen=True, slots=True)
class Derived:
    """Where the values of a tensor come from: what the source has for its rows [R, I], one below the other.

    They are those values as `dtype`; where there is a `grid`, after they were rounded to it.
    """

    sources: tuple[Storage, ...]
    dtype: str
    grid: Grid | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[R, I]."""
        return sum(source.shape[0] for source in self.sources), self.sources[0].shape[1]

    @property
    def moves(self) -> bool:
        """Whether the values are the source's own, in another order."""
        return self.grid is None and all(source.encoding == Plain(self.dtype) for source in self.sources)


@dataclass(frozen=True, slots=True)
class HealedWeight:
    """A matrix that healing moved.

    Attributes:
        name: of the tensor.
        source, stored: where it lies, and how, in the source and in the output.
        beside: matrices of the source whose root mean square, of all together, was the measure of a step.
        reach: the way of all steps, as a part of that.
        iters: how many steps there were.

    """

    name: str
    source: Storage
    stored: Storage
    beside: tuple[Storage, ...]
    reach: float
    iters: int

    @property
    def nbytes(self) -> int:
        """Of the matrix in the source."""
        return self.source.nbytes


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of how the output was made.

    Attributes:
        stored: its own quantized modules, where it has any.
        packed: those of the source, where the output holds its weights in another form, as `convert` writes it.
        record: `inputs` of shardxform.json, as they hold for this source, or empty; `facts` among them.
        mlx: whether the output, or one between it and the source, was written for MLX, which leaves MTP layers out and
            adds keys to config.json.

    """

    stored: Stored | None
    packed: Stored | None
    record: Mapping[str, object]
    mlx: bool = False

    @property
    def dequantized(self) -> str:
        """The type, where the output was converted to bf16 or fp16; else nothing."""
        target = self.record.get("target")
        named = str(target.get("format")) if isinstance(target, Mapping) else ""
        return HALF_DTYPES.get(named, "") if self.record.get("command") == "convert" else ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the output must hold.

    Attributes:
        view: of the source.
        tensors: those of the view as they are stored.
        parts: names of the parts of quantized weights.
        pairs: weights with the modules that stand for them.
        rule: how those were rounded.
        derived: tensors that hold values which follow from the source, though not its bytes.
        left: tensors of the output, parts among them, whose values are not held against the source, and why.
        healed: matrices among these that can only be so far from the source's.

    """

    view: View
    tensors: Mapping[str, TensorRef]
    parts: frozenset[str] = frozenset()
    pairs: tuple[Pair, ...] = ()
    rule: Rule | None = None
    derived: Mapping[str, Derived] = field(default_factory=dict)
    left: Mapping[str, Reason] = field(default_factory=dict)
    healed: tuple[HealedWeight, ...] = ()

    @property
    def same_bytes(self) -> dict[str, TensorRef]:
        """Tensors whose bytes are the source's."""
        apart = self.left.keys() | self.derived.keys()
        return {name: ref for name, ref in self.tensors.items() if name not in apart}


# -- how it was made ----------------------------------------------------------------------------------------------


def known_of(source: Checkpoint, out: Checkpoint | None, stored: Stored | None, record: Mapping[str, object]) -> Known:
    """Read a record against `source`.

    Args:
        source: the checkpoint that is compared with.
        out: the output, as far as it could be read.
        stored: its quantized modules.
        record: shardxform.json, or empty.

    Raises:
        CheckpointError: a quantized source is not stored as its config says.

    """
    inputs = record.get("inputs")
    inputs = inputs if isinstance(inputs, Mapping) else {}
    packed = None if (heal_of(inputs) or {}).get("encoding") else _packed_source(source, out, stored, inputs)
    asked = inputs_for(source, inputs, packed=packed is not None, facts=record.get("facts"))
    return Known(stored, packed, {"facts": record.get("facts"), **asked}, _is_of_mlx(source, out, inputs))


def _is_of_mlx(source: Checkpoint, out: Checkpoint | None, inputs: Mapping[str, object]) -> bool:
    method, before = (method_declared(each) if each else None for each in (out, source))
    if "mlx" in (method, before):
        return method == "mlx"
    steps = map(Fields, steps_since(source, inputs, None))
    return any("mlx" in (s.section("scheme").text("format"), s.section("target").text("format")) for s in steps)


def method_declared(checkpoint: Checkpoint) -> object:
    """Give the method by which config.json says that weights are quantized; None where it says nothing."""
    declared = declared_in(checkpoint.config)
    return method_of(declared) if isinstance(declared, Mapping) else None


def _packed_source(
    source: Checkpoint, out: Checkpoint | None, stored: Stored | None, inputs: Mapping[str, object]
) -> Stored | None:
    """A source of integers that OUT holds in another form, or beside more of them; None for any other.

    So `convert` writes it, and `quantize`, which rounds what is not quantized in the source.
    """
    if not declares(source.config) or out is None:
        return None
    try:
        packed = read_stored(source)
    except SchemeError:
        return None  # a form that is not understood can only have been copied
    if not declares(out.config):
        return packed
    form, other = ((s.scheme.format, s.spellings, s.scheme.g_idx) if s else None for s in (packed, stored))
    steps = steps_since(source, inputs, None) or [inputs]
    written = any(step.get("command") != "prune" for step in steps[:-1]) or inputs.get("command") == "quantize"
    if stored is None or (form == other and not written):
        more = stored and any(name in packed.plain for name in stored.weights)
        return packed if more else None
    return packed


def healed_by(view: View, record: Mapping[str, object]) -> frozenset[str]:
    """Tensors of the view that healing changed, by the record; where it does not name blocks, all that it may have."""
    return _healing(view, record).names


@dataclass(frozen=True, slots=True)
class _Healing:
    """Which tensors healing moved, and how, by the record; where it does not name blocks, all that it may have.

    Attributes:
        view: with values in place of small floats.
        names: tensors of it.
        stored: the same as they are stored; scales of a whole tensor stay.
        blocks: by layer, the first step, and how many steps there were.
        merged: those of them that pruned experts were merged into, which are near nothing.

    """

    view: View
    names: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()
    blocks: Mapping[int | None, tuple[float, int]] = field(default_factory=dict)
    merged: frozenset[str] = frozenset()


def heal_of(record: Mapping[str, object]) -> Mapping[str, object] | None:
    """How blocks were healed, as a record has it; None when they were not."""
    recipe = record.get("recipe")
    heal = recipe.get("heal") if isinstance(recipe, Mapping) else None
    return heal if isinstance(heal, Mapping) else None


def _healing(view: View, record: Mapping[str, object]) -> _Healing:
    heal = heal_of(record)
    if heal is None:
        return _Healing(view)
    as_stored = heal.get("encoding") == "source"
    if as_stored and (plain := plain_of(view.checkpoint)):
        view = replace(view, checkpoint=plain, layout=layout_of(plain.config, plain.tensors))
    widest = next((what for what in HEALED if what == heal.get("what")), "all")
    places, done = view.layout.places, dict(_healed_blocks(record.get("facts")))
    names: dict[str | None, frozenset[str]] = {
        what: frozenset(healed_names(view.layout, places, what)) for what in HEALED
    }
    merged = frozenset(_merged_blocks(record.get("facts")))
    moved = {name for name in names[widest] if name in names.get(done.get(places[name].layer, widest), ())}
    moved |= {name for name in names[ROUTED] if places[name].layer in merged} if heal.get("merge") is True else set()
    parts = {part for name in moved for part in _stored_names(view.checkpoint.tensors[name])} if as_stored else moved
    return _Healing(
        view=view,
        names=frozenset(moved),
        stored=frozenset(parts),
        blocks=dict(_moved(record.get("facts"), heal.get("iters"))),
        merged=frozenset(name for name in names[ROUTED] if places[name].layer in merged),
    )


def _stored_names(ref: TensorRef) -> Iterator[str]:
    if isinstance(ref, Encoded):
        yield from (part.name for role, part in ref.sources[0].parts if role in ROUNDED)
    else:
        yield ref.name


def _moved(facts: object, usual: object) -> Iterator[tuple[int | None, tuple[float, int]]]:
    """Layers with the first step of healing, and how many steps there were: `usual` for all, in earlier records."""
    blocks = facts.get("blocks") if isinstance(facts, Mapping) else None
    for block in blocks if isinstance(blocks, list) else ():
        healed = block.get("healed") if isinstance(block, Mapping) else None
        rate = healed.get("lr") if isinstance(healed, Mapping) else None
        steps = healed.get("iters", usual) if isinstance(healed, Mapping) else None
        if type(steps) is not int or steps < 1:
            continue
        if isinstance(rate, float) and 0 < rate <= 1 and type(block.get("layer")) is int:
            yield block["layer"], (rate, steps)


def _moves(healing: _Healing, out: Checkpoint) -> Iterator[HealedWeight]:
    """Matrices that OUT has as the view has them, with how far healing can have moved them."""
    try:
        found = (plain_of(out) or out).tensors
    except (CheckpointError, SchemeError):
        return  # what is wrong is said where OUT is looked at
    tensors, layout = healing.view.checkpoint.tensors, healing.view.layout
    for name in sorted(healing.names, key=natural_key):
        layer = layout.places[name].layer
        if layer not in healing.blocks or name in healing.merged:
            continue
        ref, other = tensors[name], found.get(name)
        if other is None or other.spec.shape != ref.spec.shape or other.spec.dtype != ref.spec.dtype:
            continue
        rate, steps = healing.blocks[layer]
        reach = rate * (steps + 1) / 2
        together = [one for each in _measured_with(name, layout) for one in _matrices(tensors[each])]
        for source, stored in zip(_matrices(ref), _matrices(other), strict=True):
            beside = (source,) if len(ref.spec.shape) > 2 else tuple(together)
            yield HealedWeight(name, source, stored, beside, reach, steps)


def _measured_with(name: str, layout: Layout) -> tuple[str, ...]:
    """Tensors that have one root mean square with this one: those of an expert's first stack."""
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    inner = layout.family.experts.inner
    if layout.places[name].expert is None or last not in inner:
        return (name,)
    return tuple(f"{stem}.{each}.weight" for each in inner)


def _matrices(ref: TensorRef) -> Sequence[Storage]:
    """Each matrix of experts by itself; any other tensor as one."""
    if isinstance(ref, Encoded):
        return ref.sources
    shape = ref.spec.shape
    if len(shape) == 3 and shape[1] > 1:
        return [one for each in ref.slabs() for one in storages_of(each)]
    return storages_of(ref.reshaped((math.prod(shape[:-1]), shape[-1])) if len(shape) > 2 else ref)


def _healed_blocks(facts: object) -> Iterator[tuple[int | None, str | None]]:
    """Layers with what was healed in them, None for those that stayed as they were pruned."""
    blocks = facts.get("blocks") if isinstance(facts, Mapping) else None
    for block in blocks if isinstance(blocks, list) else ():
        healed = block.get("healed") if isinstance(block, Mapping) else None
        if not isinstance(healed, Mapping):
            continue
        what = healed.get("what", "")
        if type(block.get("layer")) is int and (what is None or what in list(HEALED)):
            yield block["layer"], what


def _merged_blocks(facts: object) -> Iterator[int]:
    """Layers that began with pruned experts merged into those that stay."""
    blocks = facts.get("blocks") if isinstance(facts, Mapping) else None
    for block in blocks if isinstance(blocks, list) else ():
        healed = block.get("healed") if isinstance(block, Mapping) else None
        if isinstance(healed, Mapping) and _is_share(healed.get("merged")) and type(block.get("layer")) is int:
            yield block["layer"]


def _is_share(merged: object) -> bool:
    return isinstance(merged, float) and 0 < merged <= 1


# -- what follows from it -----------------------------------------------------------------------------------------


def wanted_of(view: View, out: Checkpoint, known: Known, findings: Findings) -> Wanted:
    """Give what `out` must hold of `view`, whose weights it may hold quantized, dequantized, healed or one by one."""
    healing = _healing(view, known.record)
    healed = healing.stored
    if not declares(out.config) and (known.packed or known.dequantized):
        return _dequantized(view, out, known, healed, findings)
    if not declares(out.config) or declares(view.checkpoint.config):
        wanted = _apart(Wanted(view, view.checkpoint.tensors, derived=dict(_decoded(view))), healed)
        return replace(wanted, healed=tuple(_moves(healing, out)))
    return _apart(_quantized(view, out, known, findings), healed)


def _decoded(view: View) -> Iterator[tuple[str, Derived]]:
    """What is small floats in the source, and values of the view."""
    for name, ref in view.checkpoint.tensors.items():
        if isinstance(ref, Encoded):
            yield name, Derived(ref.sources, ref.spec.dtype)


def _apart(wanted: Wanted, healed: Collection[str]) -> Wanted:
    """Leave out the values that healing gave, which nothing but the record tells."""
    view = wanted.view
    modules = matrices_of(view.layout, view.checkpoint.tensors) if healed else ()
    single = {f"{module.name}.weight" for module in modules if any(name in healed for name in module.sources)}
    parts = {ref.name for pair in wanted.pairs if pair.name in single for _, ref in pair.stored.parts}
    names = parts | {name for name in wanted.tensors if name in healed or name in single}
    left: dict[str, Reason] = {**wanted.left, **dict.fromkeys(names, "healed")}
    pairs = tuple(pair for pair in wanted.pairs if pair.name not in single)
    derived = {name: values for name, values in wanted.derived.items() if name not in left}
    return replace(wanted, pairs=pairs, derived=derived, left=left)


def _quantized(view: View, out: Checkpoint, known: Known, findings: Findings) -> Wanted:
    """Take weights that `out` holds quantized out of the view's table, and un-fuse experts that it holds one by one."""
    stored, packed = known.stored, known.packed
    tensors = dict(view.checkpoint.tensors)
    parts: set[str] = set()
    pairs: list[Pair] = []
    derived: dict[str, Derived] = {}
    skipped: dict[str, set[str]] = {}
    for module in matrices_of(view.layout, view.checkpoint.tensors):
        if all(name in out.tensors and out.tensors[name].spec.dtype != "U32" for name in module.sources):
            continue
        for name in module.sources:
            tensors.pop(name, None)
        name = f"{module.name}.weight"
        found = {part for last in COMPANIONS if (part := f"{module.name}.{last}") in out.tensors}
        found |= {name} if name in out.tensors and out.tensors[name].spec.dtype == "U32" else set()
        pair = pair_of(name, module.stored, stored) if stored else None
        if pair:
            found |= {ref.name for _, ref in pair.stored.parts}
        if pair and stored and not _misshapen(pair, stored, findings) and _is_roundable(module.weight):
            pairs.append(pair)
        elif found:
            skipped[module.name] = found
        if found:
            parts |= found
        elif module.cut:
            tensors[name] = TensorRef(TensorSpec(name, module.weight.spec.dtype, module.shape), ())
            derived[name] = Derived(module.stored, module.weight.spec.dtype)
        else:
            tensors[name] = module.weight.renamed(name)
    _take_biases_apart(view, out, tensors)
    if skipped:
        more = f", such as {next(iter(skipped))}"
        findings.warn("rounded", ".", f"quantized modules that are not held against the source: {len(skipped)}{more}")
    if packed:  # what OUT holds in 16 bits has no bytes to compare with
        tensors = {name: ref for name, ref in tensors.items() if name not in packed.weights or name not in out.tensors}
    derived |= {
        name: Derived(ref.sources, ref.spec.dtype)
        for name, ref in tensors.items()
        if isinstance(ref, Encoded) and name not in derived
    }
    if stored and stored.scheme.format == "mlx" and view.layout.family.experts.gate == "interleaved":
        own = dict(_in_own_rows(view.layout, tensors, derived))
        tensors |= {name: TensorRef(tensors[name].spec, ()) for name in own}
        derived |= own
    left: dict[str, Reason] = {name: "unknown" for names in skipped.values() for name in names}
    return Wanted(view, tensors, frozenset(parts), tuple(pairs), derived=derived, left=left)


def _take_biases_apart(view: View, out: Checkpoint, tensors: dict[str, TensorRef]) -> None:
    """Put biases of experts one by one in place of stacks that `out` does not hold."""
    stacks = [name.removesuffix("_bias") for name in view.layout.places if name.endswith("_bias")]
    for stack in stacks:
        if f"{stack}_bias" in out.tensors:
            continue
        for bias in single_biases(view.layout, view.checkpoint.tensors, stack):
            tensors.pop(f"{stack}_bias", None)
            tensors[bias.name] = bias


def _in_own_rows(
    layout: Layout, tensors: Mapping[str, TensorRef], derived: Mapping[str, Derived]
) -> Iterator[tuple[str, Derived]]:
    """Gate and up projections that OUT has each as it is, of halves of a stack in which their rows take turns."""
    inner = layout.family.experts.inner
    for name, ref in tensors.items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith(f".{inner[0]}") or f".{layout.family.experts.home}." not in name:
            continue
        names = [f"{stem.removesuffix(inner[0])}{each}.{last}" for each in inner]
        halves = [storages_of(tensors[each]) if each not in derived else derived[each].sources for each in names]
        found = [storage for half in halves for storage in half]
        for at, each in enumerate(names):
            cuts = turns([storage.shape[0] for storage in found], at)
            parts = tuple(storage.part(cut) for storage, cut in zip(found, cuts, strict=True))
            yield each, Derived(parts, ref.spec.dtype)


def _misshapen(pair: Pair, stored: Stored, findings: Findings) -> bool:
    wanted, found = pair.source.shape, stored.weights[pair.name].spec.shape
    if wanted != found:
        text = f"stands for a weight of shape {list(found)}, but {list(wanted)} by the source"
        findings.problem("source-shape", pair.words, text)
    return wanted != found


def _is_roundable(weight: TensorRef) -> bool:
    return weight.spec.dtype in _FLOATS and weight.nbytes > 0


# -- dequantized --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rounding:
    """Which tensors of the view were rounded on the way to OUT, and to what grid where values follow from that.

    `still` are those that are integers of that grid in the source, and stayed so.
    """

    names: frozenset[str]
    grid: Grid | None
    why: Reason
    still: frozenset[str] = frozenset()

    def derived(self, ref: TensorRef, dtype: str, *, still: bool) -> Derived | None:
        """Where the values of a released tensor that OUT holds as `dtype` come from; None where nothing tells."""
        if isinstance(ref, Encoded) and still:
            return Derived(ref.sources, dtype)
        if self.grid is None or not _is_roundable(ref):
            return None
        rows = ref.reshaped((math.prod(ref.spec.shape[:-1]), ref.spec.shape[-1])) if ref.ranges else ref
        return Derived(storages_of(rows), dtype, self.grid)


def _rounding(view: View, known: Known) -> _Rounding:
    tensors, recorded = view.checkpoint.tensors, known.record.get("scheme")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    encoded = frozenset(name for name, ref in tensors.items() if isinstance(ref, Encoded))
    if encoded and "method" not in recorded:  # which were decoded, and nothing more
        return _Rounding(encoded, None, "unknown", still=encoded)
    try:
        scheme = _scheme_of(recorded)
        quantized = select(view.layout, tensors, scheme).quantized
    except (SchemeError, TypeError):  # not recorded, or not ours: then any linear module may have been rounded
        linear = (m for m in matrices_of(view.layout, tensors) if m.place.template.role in LINEAR_ROLES)
        return _Rounding(frozenset(name for m in linear for name in m.sources), None, "unknown")
    names = frozenset(name for module in quantized for name in module.sources)
    still = frozenset(name for module in quantized if is_carried(module, scheme) for name in module.sources)
    if recorded.get("method") == "rtn":
        return _Rounding(names, scheme.grid, "unknown", still)
    return _Rounding(names, None, "tuned", still)


def _scheme_of(recorded: Mapping[str, object]) -> Scheme:
    """The scheme of a record.

    Raises:
        SchemeError, TypeError: it is none, or has more to it than is known here.

    """
    grid = grid_of(recorded.get("grid"))
    if grid is None:
        raise SchemeError("no grid")
    names: ExpertNames = "fused-indexed" if recorded.get("expert_names") == "fused-indexed" else "split"
    return Scheme(
        grid=grid,
        format=cast(Format, recorded.get("format")),
        expert_names=names,
        keep_16bit=_patterns(recorded.get("keep_16bit")),
        quantize=_patterns(recorded.get("quantize")),
        requantize=recorded.get("requantize") is True,
    )


def _patterns(recorded: object) -> tuple[str, ...]:
    listed = recorded if isinstance(recorded, list) else [None]
    if not all(isinstance(pattern, str) for pattern in listed):
        raise SchemeError("no patterns")
    return tuple(listed)


def _dequantized(view: View, out: Checkpoint, known: Known, healed: Collection[str], findings: Findings) -> Wanted:
    """A 16-bit output of quantized weights: what they stand for, rounded to its type, in the release's layout."""
    rounding = _rounding(view, known)
    table: dict[str, TensorRef] = {}
    derived: dict[str, Derived] = {}
    left: dict[str, Reason] = {}
    dequantized: set[str] = set()
    for rounded, still, changed in product((True, False), repeat=3):  # experts of a layer are all of one kind
        refs = {
            name: ref
            for name, ref in view.checkpoint.tensors.items()
            if (name in rounding.names, name in rounding.still, name in healed) == (rounded, still, changed)
        }
        for ref in _as_stored(refs, view, out):
            dequantized |= {ref.name} if rounded else set()
            dtype = _dtype_of(ref.name, out, known) if rounded else ref.spec.dtype
            table[ref.name] = replace(ref, spec=ref.spec._replace(dtype=dtype))
            values = rounding.derived(ref, dtype, still=still) if rounded and dtype in _HALVES else None
            if isinstance(ref, Encoded) and not rounded:  # decoded, and not rounded beside others that were
                values = Derived(ref.sources, dtype)
            if changed:
                left[ref.name] = "healed"
            elif values:
                derived[ref.name] = values
            elif rounded:
                left[ref.name] = rounding.why
    _warn_of_left([name for name in left if name in dequantized], known, findings)
    if known.dequantized == "F16":
        view = replace(view, checkpoint=replace(view.checkpoint, config=config_of_half(view.checkpoint.config)))
    return Wanted(view, table, derived=derived, left=left)


def _warn_of_left(names: Sequence[str], known: Known, findings: Findings) -> None:
    """Say how the values could be compared."""
    if not names:
        return
    many = f"{len(names)} dequantized tensors are not held against the source, such as {names[0]}"
    way = "against the quantized checkpoint that OUT was converted from, all are"
    findings.warn("dequantized", ".", f"{many}; {'they are in no 16-bit type' if known.packed else way}")


def _as_stored(refs: Mapping[str, TensorRef], view: View, out: Checkpoint) -> Iterator[TensorRef]:
    """Tensors as `convert` writes them for releases of the family, or with experts one by one in layers of OUT that do.

    Experts that are fused in the source are one by one in its quantized form, and stay so in other families.
    """
    layers: dict[int | None, dict[str, TensorRef]] = {}
    for name, ref in refs.items():
        place = view.layout.places.get(name)
        layers.setdefault(place.layer if place and place.scope == "block" else None, {})[name] = ref
    for members in layers.values():
        fused, single = released(members, view.layout), list(_unfused(members, view.layout))
        apart = {ref.name for ref in single} - {ref.name for ref in fused}
        yield from single if any(name in out.tensors for name in apart) else fused


def _unfused(refs: Mapping[str, TensorRef], layout: Layout) -> Iterator[TensorRef]:
    """The same tensors with experts one by one."""
    for name, ref in refs.items():
        place = layout.places.get(name)
        if place is None or place.template.variant != "fused":
            yield ref
            continue
        for module in matrices_of(layout, {name: ref}):
            yield module.weight.renamed(f"{module.name}.weight")


def _dtype_of(name: str, out: Checkpoint, known: Known) -> str:
    """What `convert` was told to write; other tools may have chosen any float."""
    if known.record.get("command") == "convert":
        return known.dequantized or "BF16"
    found = out.tensors.get(name)
    return found.spec.dtype if found and found.spec.dtype in _FLOATS else "BF16"
