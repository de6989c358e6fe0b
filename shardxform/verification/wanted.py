"""What the output must hold, tensor by tensor: bytes of the source, roundings of its weights, or values made of them.

Of tensors whose values follow from nothing that is there, it is said why. Names, dtypes and shapes; no tensor data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Final, Literal, cast

from shardxform.ask.recipe import HEALED
from shardxform.base.tensors import TensorRef, TensorSpec
from shardxform.checkpoint.identity import config_sha256
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats.dialects import select
from shardxform.formats.encoding import Encoded, Storage
from shardxform.formats.matrices import matrices_of, single_biases
from shardxform.formats.plain import Plain, storages_of
from shardxform.formats.scheme import ExpertNames, Format, Grid, Scheme
from shardxform.formats.stored import HALF_DTYPES, Stored, config_of_half, read_stored, released
from shardxform.model.families.base import LINEAR_ROLES
from shardxform.model.layout import COMPANIONS, Layout
from shardxform.plan.steps import healed_names
from shardxform.plan.view import View
from shardxform.verification.findings import Findings
from shardxform.verification.parts import Pair, Rule, grid_of, pair_of

__all__ = ["Derived", "Known", "Reason", "Wanted", "known_of", "wanted_of"]

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
class Known:
    """What is known of how the output was made.

    Attributes:
        stored: its own quantized modules, where it has any.
        packed: those of the source, where the output holds its weights in another form, as `convert` writes it.
        record: `inputs` of shardxform.json, as they hold for this source, or empty; `facts` among them.

    """

    stored: Stored | None
    packed: Stored | None
    record: Mapping[str, object]

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

    """

    view: View
    tensors: Mapping[str, TensorRef]
    parts: frozenset[str] = frozenset()
    pairs: tuple[Pair, ...] = ()
    rule: Rule | None = None
    derived: Mapping[str, Derived] = field(default_factory=dict)
    left: Mapping[str, Reason] = field(default_factory=dict)

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
    packed = _packed_source(source, out, stored)
    inputs = record.get("inputs")
    inputs = inputs if isinstance(inputs, Mapping) else {}
    return Known(stored, packed, {"facts": record.get("facts"), **_inputs_for(source, inputs, packed)})


def _inputs_for(source: Checkpoint, inputs: Mapping[str, object], packed: Stored | None) -> Mapping[str, object]:
    """Those of a converted output also tell how what was converted had been made, which counts for another source."""
    origin, recorded = inputs.get("origin"), inputs.get("source")
    direct = isinstance(recorded, Mapping) and recorded.get("config") == config_sha256(source.config)
    return inputs if direct or packed or not isinstance(origin, Mapping) else {**inputs, **origin}


def _packed_source(source: Checkpoint, out: Checkpoint | None, stored: Stored | None) -> Stored | None:
    """A quantized source whose weights OUT holds in another form, as `convert` writes it; None for any other."""
    if not source.config.get("quantization_config") or out is None:
        return None
    try:
        packed = read_stored(source)
    except SchemeError:
        return None  # a form that is not understood can only have been copied
    if not out.config.get("quantization_config"):
        return packed
    form, other = ((s.scheme.format, s.spellings, s.scheme.g_idx) if s else None for s in (packed, stored))
    return packed if stored and form != other else None


def _healed(view: View, record: Mapping[str, object]) -> frozenset[str]:
    """Tensors of the view that healing changed, by the record; where it does not name blocks, all that it may have."""
    recipe = record.get("recipe")
    heal = recipe.get("heal") if isinstance(recipe, Mapping) else None
    if not isinstance(heal, Mapping):
        return frozenset()
    widest = next((what for what in HEALED if what == heal.get("what")), "all")
    places, done = view.layout.places, dict(_healed_blocks(record.get("facts")))
    names: dict[str | None, frozenset[str]] = {
        what: frozenset(healed_names(view.layout, places, what)) for what in HEALED
    }
    return frozenset(name for name in names[widest] if name in names.get(done.get(places[name].layer, widest), ()))


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


# -- what follows from it -----------------------------------------------------------------------------------------


def wanted_of(view: View, out: Checkpoint, known: Known, findings: Findings) -> Wanted:
    """Give what `out` must hold of `view`, whose weights it may hold quantized, dequantized, healed or one by one."""
    healed = _healed(view, known.record)
    if not out.config.get("quantization_config") and (known.packed or known.dequantized):
        return _dequantized(view, out, known, healed, findings)
    if not out.config.get("quantization_config") or view.checkpoint.config.get("quantization_config"):
        made = {
            name: Derived(ref.sources, ref.spec.dtype)
            for name, ref in view.checkpoint.tensors.items()
            if isinstance(ref, Encoded)
        }
        return _apart(Wanted(view, view.checkpoint.tensors, derived=made), healed)
    return _apart(_quantized(view, out, known, findings), healed)


def _apart(wanted: Wanted, healed: Collection[str]) -> Wanted:
    """Leave out the values that healing gave, which nothing but the record tells."""
    view = wanted.view
    modules = matrices_of(view.layout, view.checkpoint.tensors) if healed else ()
    single = {f"{module.name}.weight" for module in modules if any(name in healed for name in module.sources)}
    parts = {ref.name for pair in wanted.pairs if pair.name in single for _, ref in pair.stored.parts}
    names = parts | {name for name in wanted.tensors if name in healed or name in single}
    left: dict[str, Reason] = {**wanted.left, **dict.fromkeys(names, "healed")}
    return replace(wanted, pairs=tuple(pair for pair in wanted.pairs if pair.name not in single), left=left)


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
        findings.warn("rounded", ".", f"{len(skipped)} quantized modules are not held against the source{more}")
    if packed:  # what OUT holds in 16 bits has no bytes to compare with
        tensors = {name: ref for name, ref in tensors.items() if name not in packed.weights or name not in out.tensors}
    derived |= {
        name: Derived(ref.sources, ref.spec.dtype)
        for name, ref in tensors.items()
        if isinstance(ref, Encoded) and name not in derived
    }
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
    """Which tensors of the view were rounded on the way to OUT, and to what grid where values follow from that."""

    names: frozenset[str]
    grid: Grid | None
    why: Reason

    def derived(self, ref: TensorRef, dtype: str) -> Derived | None:
        """Where the values of a released tensor that OUT holds as `dtype` come from; None where nothing tells."""
        if isinstance(ref, Encoded):
            return Derived(ref.sources, dtype)
        rows = ref.reshaped((math.prod(ref.spec.shape[:-1]), ref.spec.shape[-1]))
        return Derived(storages_of(rows), dtype, self.grid) if self.grid and _is_roundable(ref) else None


def _rounding(view: View, known: Known) -> _Rounding:
    if known.packed:
        return _Rounding(frozenset(known.packed.weights), None, "unknown")
    tensors, recorded = view.checkpoint.tensors, known.record.get("scheme")
    if decoded := frozenset(name for name, ref in tensors.items() if isinstance(ref, Encoded)):
        return _Rounding(decoded, None, "unknown")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    try:
        scheme = _scheme_of(recorded)
        names = {name for module in select(view.layout, tensors, scheme).quantized for name in module.sources}
    except (SchemeError, TypeError):  # not recorded, or not ours: then any linear module may have been rounded
        linear = (m for m in matrices_of(view.layout, tensors) if m.place.template.role in LINEAR_ROLES)
        return _Rounding(frozenset(name for m in linear for name in m.sources), None, "unknown")
    if recorded.get("method") == "rtn":
        return _Rounding(frozenset(names), scheme.grid, "unknown")
    return _Rounding(frozenset(names), None, "tuned")


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
    for rounded, changed in product((True, False), repeat=2):  # experts of a layer are all of one kind
        refs = {
            name: ref
            for name, ref in view.checkpoint.tensors.items()
            if (name in rounding.names, name in healed) == (rounded, changed)
        }
        for ref in _as_stored(refs, view, out):
            dequantized |= {ref.name} if rounded else set()
            dtype = _dtype_of(ref.name, out, known) if rounded else ref.spec.dtype
            table[ref.name] = replace(ref, spec=replace(ref.spec, dtype=dtype))
            values = rounding.derived(ref, dtype) if rounded and dtype in _HALVES else None
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
