"""A quantized checkpoint read as modules: which stored tensors stand for which weight, held against its own config.

Reads config and headers, never tensor data: names, dtypes and shapes are compared with the parts of the encoding, the
arithmetic that writes them. Each weight is also shown as an `Encoded` tensor [O, I] in the current spelling, so that
what works on the table of a plain checkpoint works on that of a quantized one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple, cast

from shardxform.base.strict_json import JsonError, parse_object
from shardxform.base.tensors import TensorRef, TensorSpec, coalesce
from shardxform.checkpoint.record import PROVENANCE
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import CheckpointError, SchemeError
from shardxform.formats.asymmetric import as_rounded
from shardxform.formats.config_names import declarations, declared_in, declares, method_of, undeclared
from shardxform.formats.decoding import decoded, encoded_weights
from shardxform.formats.dialects import Resolved, resolve
from shardxform.formats.encoding import Cut, Encoded, Role, Storage, in_turns
from shardxform.formats.integers import Ints
from shardxform.formats.matrices import Matrix, matrices_of
from shardxform.formats.plain import storages_of
from shardxform.formats.scheme import ROW_FORMATS, Bits, ExpertNames, Format, Grid, ScaleGrid, Scheme
from shardxform.model.expected import Expected, expected
from shardxform.model.families import family_of
from shardxform.model.families.base import LINEAR_ROLES
from shardxform.model.layout import TELLING, Layout, is_quantized, layout_of, refuse_two_spellings, variants_found

__all__ = [
    "HALF_DTYPES",
    "Float",
    "Stored",
    "as_plain",
    "config_of_half",
    "encoded_by_codes",
    "has_g_idx",
    "plain_of",
    "read_stored",
    "released",
    "scan_stored",
]

_GPTQ: Final = ("qweight", "qzeros", "scales")
_ROW: Final = ("weight_packed", "weight_scale", "weight_shape")
_AFFINE: Final = ("weight", "scales", "biases")
_MEANINGS: Final = {
    "weight_zero_point": "an asymmetric weight, which is not supported",
    "weight_g_idx": "a weight with its columns in another order, which is not supported",
    "weight": "the weight in 16 bits beside its quantized parts",
}
_FUSED_INDEXED: Final = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)\.(0|[1-9]\d{0,8})")
_ID: Final = re.compile(r"0|[1-9]\d{0,8}")
_PROJECTION: Final = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantized checkpoint.

    Attributes:
        scheme: format, bits and groups; `scale_grid` is bf16 when the scales are known to be exact in it.
        spellings: how its quantized experts are named; more than one when layers differ.
        modules: every quantized module by its stored name, in source order.
        plain: every other tensor.
        weights: the weights of `modules` under the names `experts.{id}.gate_proj.weight`.
        layout: of `weights` and `plain` together.
        contradictions: where the config does not say what is stored, one sentence each.

    """

    scheme: Scheme
    spellings: frozenset[ExpertNames]
    modules: Mapping[str, Storage]
    plain: Mapping[str, TensorRef]
    weights: Mapping[str, Encoded]
    layout: Layout
    contradictions: tuple[str, ...]


def read_stored(source: Checkpoint) -> Stored:
    """Read a quantized checkpoint.

    Raises:
        SchemeError: it is not quantized, or in a way that is not supported.
        CheckpointError: the first of everything that `scan_stored` finds wrong.
        FamilyError: see `layout.layout_of`.

    """
    stored, errors = scan_stored(source)
    refuse_two_spellings(stored.layout)
    if errors:
        raise errors[0]
    return stored


def as_plain(source: Checkpoint, stored: Stored) -> Checkpoint:
    """Give a quantized checkpoint as the 16-bit one that its weights stand for."""
    return replace(source, tensors={**stored.weights, **stored.plain}, config=undeclared(source.config))


def plain_of(source: Checkpoint) -> Checkpoint | None:
    """Give any quantized checkpoint as the 16-bit one that it stands for; None for one that is not quantized.

    As `decoded` does; symmetric integers too, in the encoding to which values are rounded.

    Raises:
        CheckpointError, FamilyError, SchemeError: as `decoded` and `read_stored`.

    """
    if plain := decoded(source):
        return plain
    if not declares(source.config):
        return None
    stored = read_stored(source)
    weights = {name: replace(ref, sources=tuple(map(as_rounded, ref.sources))) for name, ref in stored.weights.items()}
    return as_plain(source, replace(stored, weights=weights))


def encoded_by_codes(source: Checkpoint) -> dict[str, Encoded]:
    """All quantized weights of a checkpoint, by the names of the tensors that hold their codes; raises as `plain_of`.

    Of several weights in one tensor there is one.
    """
    if found := encoded_weights(source):
        return found
    weights = read_stored(source).weights.values() if declares(source.config) else ()
    return {ref.sources[0].parts[0][1].name: ref for ref in weights}


def scan_stored(source: Checkpoint) -> tuple[Stored, list[CheckpointError]]:
    """Read a quantized checkpoint, and list every module that is not stored as its config and family say.

    Raises:
        SchemeError: it is not quantized, or in a way that is not supported.
        FamilyError: see `layout.layout_of`.

    """
    declared = next((value for _, value in declarations(source.config)), None)
    mlx = isinstance(declared, Mapping) and method_of(declared) == "mlx"
    groups, plain = _grouped(source.tensors, mlx=mlx)
    if declared and not any(is_quantized(ref.spec) for ref in source.tensors.values()):
        raise SchemeError(
            f"{source.where}/{CONFIG}: quantization_config, but no tensor is quantized: remove it from config.json,"
            " and the checkpoint is the 16-bit one that the shards hold"
        )
    resolved = _resolved(source)
    if not groups:
        raise SchemeError(f"{source.where}/{CONFIG}: quantization_config, but no tensor is a part of such a weight")
    grid = Grid(
        bits=cast(Bits, resolved.bits), group_size=resolved.group_size, scale_grid=_scale_grid(source, resolved, groups)
    )
    names = [name for stem in groups for name in _weight_names(stem)]
    layout = layout_of(source.config, [*names, *plain], source.where)
    promised = dict(expected(layout, variants_found(layout)))
    errors: list[CheckpointError] = []
    modules: dict[str, Storage] = {}
    rules = _Rules(resolved.format, grid, layout, promised)
    for stem, parts in groups.items():
        try:
            modules[stem] = _module(stem, parts, rules, plain)
        except CheckpointError as e:
            errors.append(e)
    weights = {ref.name: ref for stem, module in modules.items() for ref in _weights(stem, module)}
    if mlx and layout.family.experts.gate == "interleaved":
        weights, plain = {**weights, **dict(_halves(weights, layout))}, {**plain, **dict(_halves(plain, layout))}
    errors.extend(_mixed(groups, layout, weights, plain))
    spellings = frozenset(spelling for stem in groups if (spelling := _spelling(stem)[0]))
    g_idx = all(has_g_idx(module) for module in modules.values())
    scheme = Scheme(grid=grid, format=resolved.format, g_idx=g_idx and resolved.format not in ROW_FORMATS)
    said = tuple(_contradictions(resolved, layout, weights, plain))
    return Stored(scheme, spellings, modules, plain, weights, layout, said), errors


def has_g_idx(module: Storage) -> bool:
    """Whether the order of a module's columns is stored."""
    return any(role == "g_idx" for role, _ in module.parts)


# -- the config ---------------------------------------------------------------------------------------------------


def _resolved(source: Checkpoint) -> Resolved:
    config, where = source.config, f"{source.where}/{CONFIG}"
    try:
        declared = declared_in(config)
    except SchemeError as e:
        raise SchemeError(f"{where}: {e}") from e
    if declared is None:
        raise SchemeError(f"{where}: no quantization_config: the source is not quantized; see `shardxform quantize`")
    if not isinstance(declared, Mapping):
        raise SchemeError(f"{where}: quantization_config: expected an object, found {declared!r}")
    try:
        resolved = resolve(declared, family_of(config)[0].holders)
        _refuse_beyond(declared, resolved)
    except (AttributeError, TypeError, ValueError) as e:
        raise SchemeError(f"{where}: quantization_config is malformed: {e}") from e
    return resolved


def _refuse_beyond(declared: Mapping[str, Any], resolved: Resolved) -> None:
    """Refuse what a config may say beyond one scheme for all weights: it would be lost on the way."""
    if resolved.format == "compressed-tensors":
        (group,) = declared["config_groups"].values()
        found = {
            **{key: group["weights"].get(key) for key in ("actorder", "dynamic")},
            **{key: group.get(key) for key in ("input_activations", "output_activations")},
            **{key: declared.get(key) for key in ("kv_cache_scheme", "sparsity_config", "transform_config")},
        }
        strategy = group["weights"].get("strategy")
        if strategy not in ("group", "channel") or (strategy == "channel") != (resolved.group_size == -1):
            raise SchemeError(f"quantization_config: strategy {strategy!r} with groups of {resolved.group_size}")
    elif resolved.format == "mlx":
        found = {}
    elif resolved.format == "gptq":
        found = {key: name for key in ("checkpoint_format", "format") if (name := declared.get(key)) != "gptq"}
        found["pack_dtype"] = name if (name := declared.get("pack_dtype")) != "int32" else None
        for rule, item in (declared.get("dynamic") or {}).items():
            if rule[:2] == "+:":
                found |= {f"dynamic[{rule!r}].{key}": value for key, value in _overrides(item, declared)}
            elif rule[:2] != "-:":
                found[f"dynamic[{rule!r}]"] = item
    else:
        found = {"data_type": name if (name := declared.get("data_type")) != "int" else None}
        found["act_bits"] = bits if (bits := declared.get("act_bits")) is not None and bits < 16 else None
        for name, item in (declared.get("extra_config") or {}).items():
            found |= {f"extra_config[{name!r}].{key}": value for key, value in _overrides(item, declared)}
    for key, value in found.items():
        if value:
            raise SchemeError(f"quantization_config: {key} {value!r} is not supported: one scheme for all weights is")


def _overrides(item: Mapping[str, Any], declared: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """What an entry of `extra_config` or `dynamic` says otherwise than the whole; 16-bit entries say nothing more."""
    if item.get("bits", declared["bits"]) < 16:
        for key in ("bits", "group_size", "sym"):
            if (value := item.get(key)) is not None and value != declared[key]:
                yield key, repr(value)


def _scale_grid(source: Checkpoint, resolved: Resolved, groups: Mapping[str, Mapping[str, TensorRef]]) -> ScaleGrid:
    """bf16 when the scales are stored in it, or when our own record says that they were chosen to be exact in it."""
    if resolved.format in ROW_FORMATS:
        last = "scales" if resolved.format == "mlx" else "weight_scale"
        scales = [parts[last].spec.dtype for parts in groups.values() if last in parts]
        if scales and set(scales) == {"BF16"}:
            return "bf16"
    try:
        record: Any = parse_object(source.file(PROVENANCE).read_bytes())
        for key in ("inputs", "scheme", "grid", "scale_grid"):
            record = record[key]
    except (OSError, JsonError, KeyError, TypeError):
        return "fp16"
    return "bf16" if record == "bf16" else "fp16"


# -- modules ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a module is held against; and what was found of its kind, which thousands of experts share.

    `judged` holds, of parts of such dtypes and shapes and of weights that are promised in such shapes, what is right.
    """

    format: Format
    grid: Grid
    layout: Layout
    promised: Mapping[str, Expected]
    judged: dict[object, _Judged] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        return {"compressed-tensors": _ROW, "mlx": _AFFINE}.get(self.format, _GPTQ)

    def shape_of(self, weight: str) -> tuple[int, ...] | Literal["open", "unknown"]:
        """Give the shape that the family promises for a weight, if it knows it and does not leave it open."""
        if item := self.promised.get(weight):
            return item.shape or "open"
        return "open" if weight in self.layout.places else "unknown"


class _Judged(NamedTuple):
    """A kind of module: its encoding, its shape [O, I], and its parts by role and last name part, in order."""

    encoding: Ints
    shape: tuple[int, int]
    parts: tuple[tuple[Role, str], ...]


def _grouped(
    tensors: Mapping[str, TensorRef], *, mlx: bool
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    """Split a table into the parts of quantized modules, by module and last name part, and the rest."""
    groups: dict[str, dict[str, TensorRef]] = {}
    plain: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in TELLING or (mlx and last == "weight" and ref.spec.dtype == "U32"):
            groups.setdefault(stem, {})[last] = ref
        else:
            plain[name] = ref
    return groups, plain


def _module(stem: str, parts: Mapping[str, TensorRef], rules: _Rules, plain: Mapping[str, TensorRef]) -> Storage:
    """One module, checked.

    Raises:
        CheckpointError: a part is missing, is not one of this format, or has another dtype or shape.

    """
    shapes = tuple(map(rules.shape_of, _weight_names(stem)))
    found = [(last, ref.spec.dtype, ref.spec.shape) for last, ref in parts.items()]
    kind = (shapes, f"{stem}.weight" in plain, *found)
    judged = rules.judged.get(kind)
    if judged is None:
        judged = rules.judged[kind] = _judged(stem, parts, rules, shapes, plain)
    return Storage(judged.encoding, tuple((role, parts[last]) for role, last in judged.parts), judged.shape)


def _judged(
    stem: str,
    parts: Mapping[str, TensorRef],
    rules: _Rules,
    shapes: tuple[tuple[int, ...] | str, ...],
    plain: Mapping[str, TensorRef],
) -> _Judged:
    """Judge a module by what others of its kind have too; raises as `_module`."""
    optional = () if rules.format in ROW_FORMATS else ("g_idx",)
    beside = [last for last in parts if last not in (*rules.kinds, *optional)]
    beside += ["weight"] if f"{stem}.weight" in plain else []
    if beside:
        meaning = _MEANINGS.get(beside[0], f"no part of a weight in {rules.format}, which the config declares")
        raise CheckpointError(f"tensor '{stem}.{beside[0]}': {meaning}")
    for last in rules.kinds:
        if last not in parts:
            raise CheckpointError(f"tensor '{stem}.{last}' is missing; {', '.join(parts)} of the same weight are there")
    if "unknown" in shapes:
        raise CheckpointError(
            f"tensor '{stem}.{rules.kinds[0]}' is quantized, but unknown to family {rules.layout.family.name}"
        )
    shape = _shape(shapes, parts[rules.kinds[0]].spec, rules)
    encoding = Ints.of(Scheme(grid=rules.grid, format=rules.format, g_idx="g_idx" in parts))
    roles: list[tuple[Role, str]] = []
    for part in encoding.parts(*shape):
        _refuse_other(parts[part.suffix].spec, part.spec(stem), shape, rules)
        roles.append((part.role, part.suffix))
    scales = dict(roles)["scales"]
    return _Judged(replace(encoding, scale_dtype=parts[scales].spec.dtype), shape, tuple(roles))


def _refuse_other(found: TensorSpec, wanted: TensorSpec, shape: tuple[int, int], rules: _Rules) -> None:
    dtypes = {wanted.dtype}
    if rules.format == "compressed-tensors" and wanted.name.endswith(".weight_scale"):
        dtypes = {"F16", "BF16"}
    elif rules.format == "compressed-tensors" and wanted.name.endswith(".weight_shape"):
        dtypes = {"I32", "I64"}  # the former in releases of Kimi-K2
    if found.shape == wanted.shape and found.dtype in dtypes:
        return
    groups = "one group a row" if rules.grid.group_size == -1 else f"groups of {rules.grid.group_size}"
    raise CheckpointError(
        f"tensor '{found.name}': {found.dtype} {list(found.shape)}, expected {' or '.join(sorted(dtypes))}"
        f" {list(wanted.shape)} for a weight {list(shape)} in {rules.grid.bits} bits, {groups}"
    )


def _shape(shapes: tuple[tuple[int, ...] | str, ...], words: TensorSpec, rules: _Rules) -> tuple[int, int]:
    """Shape of a weight: what the family promises, or, where it leaves it open, what the words hold."""
    known = [shape for shape in shapes if not isinstance(shape, str) and len(shape) == 2]
    if len(known) == len(shapes):
        return sum(shape[0] for shape in known), known[0][1]
    if len(words.shape) != 2:
        raise CheckpointError(f"tensor '{words.name}': shape {list(words.shape)}, expected two dimensions")
    rows, columns = words.shape if rules.format in ROW_FORMATS else words.shape[::-1]
    return rows, columns * rules.grid.codes_per_word


def _spelling(stem: str) -> tuple[ExpertNames | None, str]:
    """How the name of an expert is spelled, and what all experts of its layer begin with; None for other modules."""
    above, _, last = stem.rpartition(".")
    experts, _, expert = above.rpartition(".")
    if experts.endswith(".experts") and _ID.fullmatch(expert) and _PROJECTION.fullmatch(last):
        return "split", experts
    if match := _FUSED_INDEXED.fullmatch(stem):
        return "fused-indexed", match[1]
    return None, ""


def _weight_names(stem: str) -> tuple[str, ...]:
    """Names of the weights that a stored module holds, in the current spelling and in the order of its rows."""
    match = _FUSED_INDEXED.fullmatch(stem) if stem[-1:].isdigit() else None
    if not match:
        return (f"{stem}.weight",)
    experts, projection, expert = match.groups()
    projections = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    return tuple(f"{experts}.{expert}.{each}.weight" for each in projections)


def _weights(stem: str, module: Storage) -> Iterator[Encoded]:
    """Each weight that a module holds; the gate is the upper half of `gate_up_proj`."""
    names = _weight_names(stem)
    if len(names) == 1:
        yield Encoded.of(module, names[0])
        return
    share = module.whole[0] // len(names)
    for number, name in enumerate(names):
        yield Encoded.of(module._replace(cut=Cut(number * share, share)), name)


def _halves(refs: Mapping[str, TensorRef], layout: Layout) -> Iterator[tuple[str, Encoded]]:
    """Gate and up projections as halves of a stack in which their rows take turns; see `matrices.stack_cuts`.

    MLX has each as it is.
    """
    inner = layout.family.experts.inner
    pattern = re.compile(rf"(.*\.{re.escape(layout.family.experts.home)}\.\d+)\.{re.escape(inner[0])}\.(weight|bias)")
    for match in filter(None, map(pattern.fullmatch, refs)):
        names = [f"{match[1]}.{each}.{match[2]}" for each in inner]
        if not all(name in refs for name in names):
            continue
        stored = [storages_of(refs[name])[0] for name in names]
        if len({(each.encoding, each.whole) for each in stored}) == 1:
            rows = stored[0].whole[0]
            for at, name in enumerate(names):
                yield name, Encoded(refs[name].spec, (), (in_turns(stored, at).part(Cut(at * rows, rows)),))


# -- the whole ----------------------------------------------------------------------------------------------------


def _mixed(
    groups: Iterable[str], layout: Layout, weights: Mapping[str, Encoded], plain: Mapping[str, TensorRef]
) -> Iterator[CheckpointError]:
    """Layers that spell their experts in two ways, or that hold only some of them quantized."""
    seen: dict[str, tuple[ExpertNames, str]] = {}
    for stem in groups:
        spelling, experts = _spelling(stem)
        if spelling is None:
            continue
        first = seen.setdefault(experts, (spelling, stem))
        if first[0] != spelling:
            yield CheckpointError(f"{experts}: two spellings of experts in one layer, {first[1]} and {stem}")
            return
    kinds: dict[tuple[str, int | None], tuple[bool, str]] = {}
    for name in (*weights, *plain):
        place = layout.places.get(name)
        if place is None or not place.template.is_expert_weight:
            continue
        kept, other = kinds.setdefault((place.scope, place.layer), (name in plain, name))
        if kept != (name in plain):
            yield CheckpointError(f"experts of one layer must be stored alike: {other} and {name} are not")
            return


def _first_matrices(layout: Layout, weights: Mapping[str, Encoded], plain: Mapping[str, TensorRef]) -> Iterator[Matrix]:
    """Matrices less the other experts of a layer, which have one scheme: a look at the first is enough."""
    firsts: dict[object, tuple[str, TensorRef]] = {}
    for name, ref in (*weights.items(), *plain.items()):
        if place := layout.places.get(name):
            kind = place.scope, place.layer, place.template.name, place.companion, name in weights
            firsts.setdefault(kind, (name, ref))
    seen: set[object] = set()
    for module in matrices_of(layout, dict(firsts.values())):
        matrix = module.place.scope, module.place.layer, module.local, module.sources[0] in weights
        if matrix not in seen:  # as others of the same stack
            yield module
            seen.add(matrix)


def _contradictions(
    resolved: Resolved, layout: Layout, weights: Mapping[str, Encoded], plain: Mapping[str, TensorRef]
) -> Iterator[str]:
    if resolved.format == "mlx":
        return  # the scales tell
    for module in _first_matrices(layout, weights, plain):
        ref = weights.get(module.sources[0])
        if ref is not None:
            name = ref.sources[0].name
            if resolved.bits_of(name) != resolved.bits:
                yield f"quantization_config declares {name} 16-bit, but it is stored in {resolved.bits} bits"
        elif (
            module.place.scope == "block"
            and module.place.template.role in LINEAR_ROLES
            and resolved.bits_of(module.name) != 16
        ):
            yield f"quantization_config declares {module.name} quantized, but it is stored in 16 bits"


Float = Literal["bf16", "fp16"]
"""16-bit types that weights are dequantized to."""


HALF_DTYPES: Final[Mapping[str, str]] = {"bf16": "BF16", "fp16": "F16"}
"""What safetensors calls them."""


def config_of_half(config: Mapping[str, object]) -> dict[str, Any]:
    """The config of weights that became float16: clients that load what it says would round them to bfloat16."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(keys, "float16")}


def released(refs: Mapping[str, TensorRef], layout: Layout) -> list[TensorRef]:
    """The same tensors in the release's layout: the experts of a block as one tensor where releases fuse them."""
    out: list[TensorRef] = []
    fused: dict[str, dict[int, dict[str, TensorRef]]] = {}
    for name, ref in refs.items():
        place = layout.places.get(name)
        if place is None or place.expert is None or place.scope != "block" or not layout.family.fused_release:
            out.append(ref)
            continue
        parts = name.split(".")
        stem, projection = ".".join(parts[: place.expert_at]), parts[place.expert_at + 1]
        fused.setdefault(stem, {}).setdefault(place.expert, {})[projection] = ref
    lying = layout.family.experts
    for stem, experts in fused.items():
        order = [experts[expert] for expert in sorted(experts)]  # complete: `pruned_view` saw every expert
        for stack in lying.stacks:
            name, inside = stem.removesuffix(lying.home) + lying.stacked(stack), lying.held(stack)
            out.append(_stacked(name, [[each[part] for part in inside] for each in order]))
    return out


def _stacked(name: str, experts: list[list[TensorRef]]) -> TensorRef:
    """Weights one below the other, and those of each expert as one slab of a tensor [E, O, I]."""
    first = experts[0][0].spec
    for ref in (ref for refs in experts for ref in refs):
        if ref.spec.dtype != first.dtype:
            raise SchemeError(
                f"tensor '{ref.name}' is {ref.spec.dtype}, but '{first.name}' is {first.dtype}; cannot fuse"
            )
    refs = [ref for refs in experts for ref in refs]
    spec = TensorSpec(name, first.dtype, (len(experts), sum(ref.spec.shape[0] for ref in experts[0]), first.shape[1]))
    if any(isinstance(ref, Encoded) for ref in refs):
        return Encoded(spec, (), tuple(source for ref in refs for source in storages_of(ref)))
    return TensorRef(spec, coalesce(piece for ref in refs for piece in ref.ranges))
