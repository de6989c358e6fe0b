"""Verification of names and shapes: every tensor that the family demands for this config, and none besides.

vLLM loads a quantized checkpoint without an expert, and SGLang any, without a word; so the whole table is enumerated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from shardxform.base.strict_json import parse_config
from shardxform.base.tensors import ID_DTYPES, ByteRange, TensorRef, TensorSpec, uncollected
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import FamilyError
from shardxform.formats.config_names import QUANTIZATION, declares, tells_experts_apart
from shardxform.formats.scheme import FORMATS
from shardxform.model.expected import Expected, expected, first_of_alike
from shardxform.model.families import family_of
from shardxform.model.families.base import Config, Scope, Slicing
from shardxform.model.layout import (
    Layout,
    Place,
    is_shape,
    layout_of,
    looks_like,
    variants_found,
)
from shardxform.plan.plan import Plan
from shardxform.runtimes import as_family
from shardxform.verification.config_values import config_faults
from shardxform.verification.findings import Findings, Item, place_of
from shardxform.verification.quantized import check_quantization

if TYPE_CHECKING:
    from shardxform.formats.stored import Stored

__all__ = [
    "PARTS",
    "Structure",
    "check_mlx",
    "check_structure",
    "check_unknown",
    "firsts_planned",
    "refuse_unsound",
    "seed_weights",
    "stored_form",
]

# -- structure ---------------------------------------------------------------------------------------------------------

PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "qweight": ("qweight", "qzeros", "scales"),
    "weight_packed": ("weight_packed", "weight_scale", "weight_shape"),
    "biases": ("weight", "scales", "biases"),
}
"""What must be stored instead of a quantized `weight`, by the part that holds its integers."""

_SIGNS: Final = {
    "biases": ("biases",),
    "qweight": ("qweight", "qzeros", "scales"),
    "weight_packed": ("weight_packed", "weight_shape"),
}
_FORM_OF: Final = {sign: form for form, signs in _SIGNS.items() for sign in signs}
_MAX_TENSORS: Final = 1_000_000  # four times the largest checkpoint known, before quantization: Kimi-K3
_CONFIG_FAULTS: Final = (
    FamilyError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_BLOCK: Final[tuple[Scope, ...]] = ("block", "mtp")

Table = dict[str, Expected]


@dataclass(frozen=True, slots=True)
class Structure:
    """What is known of a checkpoint once its names were looked at.

    Attributes:
        layout: of its names.
        experts: how many routed experts are there.
        stored: its quantized weights, where they are understood.

    """

    layout: Layout
    experts: int
    stored: Stored | None


def check_structure(
    checkpoint: Checkpoint,
    lost: frozenset[str],
    findings: Findings,
    *,
    sampled: bool = False,
) -> Structure | None:
    """Report every tensor that is missing, misshapen or unexpected, and every contradiction of the config.

    Args:
        checkpoint: to look at.
        lost: tensors that the index names in shards that cannot be read; reported elsewhere.
        findings: added to.
        sampled: whether of the routed experts of each block the first alone is there, since all are alike. Then there
            is a problem exactly where a look at all of them would find one.

    """
    layout = _layout(checkpoint, findings)
    if layout is None:
        return None
    layout = replace(layout, sampled=sampled)
    _check_groups(layout, findings)
    _check_dtype(layout, findings)
    for fault in config_faults(layout):
        findings.problem("config", CONFIG, f"{fault}; transformers refuses it")
    check_quantization(layout, checkpoint.tensors, findings)
    if decoded := _decoded(checkpoint, layout, findings):
        checkpoint = decoded
        layout = replace(layout_of(checkpoint.config, checkpoint.tensors), sampled=layout.sampled)
    seed = layout_of(layout.config, seed_weights(layout)).places
    parts: Stored | None = None
    if checkpoint.tensors:
        excused = check_unknown(layout, findings)
        variants = _variants(layout, seed)
        table = _table(layout, variants, findings)
        if table is not None:
            _check_mtp(layout, findings)
            gone = lost | excused | set(_all_forms(seed))
            forms = forms_of(table, checkpoint.tensors)
            _check_table(layout, table, forms, checkpoint.tensors, gone, findings)
            _check_unexpected(layout, table, forms, variants, findings)
            outside = {name: place for name, place in seed.items() if (place.expert or 0) >= layout.num_experts}
            findings.items([_beyond(layout, *each) for each in outside.items()], layout.num_experts)
            parts = None if decoded else _check_parts(checkpoint, layout, findings)
    return Structure(layout, _count_experts(layout, checkpoint.tensors, seed), parts)


def _decoded(checkpoint: Checkpoint, layout: Layout, findings: Findings) -> Checkpoint | None:
    """The 16-bit checkpoint that small floats stand for; what is not stored as the config says is reported."""
    if not declares(checkpoint.config):
        return None
    from shardxform.formats.decoding import is_packed, scan_decoded  # and with it all encodings

    if not is_packed(checkpoint.config):
        return None
    _check_merged_rows(checkpoint, layout, findings)
    plain, faults = scan_decoded(checkpoint)
    known = [(name, why, layout.places[name]) for name, why in faults if name in layout.places]
    findings.items([Item("parts", name, place, why) for name, why, place in known], layout.num_experts)
    return plain


def _check_merged_rows(checkpoint: Checkpoint, layout: Layout, findings: Findings) -> None:
    """Hold merged modules against each other, where weights are words of integers of any width."""
    words = (ref.spec for name, ref in checkpoint.tensors.items() if name.endswith(tuple(PARTS)))
    if any(spec.dtype == "I32" for spec in words):
        from shardxform.verification.parts import check_merged_rows

        check_merged_rows(checkpoint, layout, findings)


def _check_parts(checkpoint: Checkpoint, layout: Layout, findings: Findings) -> Stored | None:
    if not declares(checkpoint.config):
        return None
    from shardxform.verification.parts import check_parts  # and with it all that is known of encodings

    return check_parts(checkpoint, layout, findings)


def forms_of(table: Table, tensors: Mapping[str, TensorRef]) -> Mapping[str, str]:
    """How the weights of a 16-bit table are stored that are not as they are: keys of `PARTS`.

    One that is not there at all would be stored as others of its template are.
    """
    found: dict[str, str] = {}
    for name, ref in tensors.items():
        stem, _, last = name.rpartition(".")
        if form := _FORM_OF.get(last):
            weight = f"{stem}.weight"
            found[weight] = min(form, found.get(weight, form))
        if ref.spec.dtype == "U32":  # words of MLX
            found[name] = "biases"
    forms = {name: found[name] for name in table if name in found} if found else {}
    usual: dict[str, str] = {}
    for name, form in forms.items():
        usual.setdefault(table[name].place.template.name, form)
    absent = (name for name, item in table.items() if name not in tensors and item.place.template.name in usual)
    return {**{name: usual[table[name].place.template.name] for name in absent}, **forms} if usual else forms


def stored_form(name: str, tensors: Mapping[str, object]) -> str:
    """How the weight `name` is stored: a key of `PARTS`, or empty for as it is."""
    if not name.endswith(".weight"):
        return ""
    stem = name.removesuffix("weight")
    return next((form for form, signs in _SIGNS.items() if any(stem + sign in tensors for sign in signs)), "")


def check_mlx(checkpoint: Checkpoint, findings: Findings) -> None:
    """Report what mlx-lm does not take of a config that is one of its own, as it lies in config.json."""
    config = checkpoint.config
    if as_family(checkpoint) is checkpoint:
        return
    from shardxform.runtimes.mlx import unrun

    declared, beside = config[QUANTIZATION], config.get("quantization_config")
    if beside is not None and beside != declared:
        findings.problem("quantization-config", CONFIG, f"{QUANTIZATION} and quantization_config differ; expected one")
    for why in unrun(config):
        findings.problem("class", CONFIG, why)


def _layout(checkpoint: Checkpoint, findings: Findings) -> Layout | None:
    config = checkpoint.config
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        findings.problem("class", CONFIG, f"architectures: expected a list of names, found {architectures!r}")
        return None
    try:
        family_of(config)
    except FamilyError as e:
        findings.problem("class", CONFIG, _message(e))
        return None
    if not architectures:
        findings.warn("class", CONFIG, "architectures is missing; vLLM and SGLang choose the class by it")
    try:
        return layout_of(config, checkpoint.tensors)
    except _CONFIG_FAULTS as e:
        findings.problem("config", CONFIG, _message(e))
        return None


def _table(layout: Layout, variants: Mapping[tuple[Scope, int], str], findings: Findings) -> Table | None:
    """Every tensor that the config promises; None when it promises nonsense."""
    table: Table = {}
    promised = expected(layout, variants)
    try:
        for name, item in islice(promised, _MAX_TENSORS):
            if name not in table or table[name].optional:
                table[name] = item
        endless = next(promised, None) is not None
    except _CONFIG_FAULTS as e:
        findings.problem("config", CONFIG, _message(e))
        return None
    if endless:
        findings.problem("config", CONFIG, f"promises more than {_MAX_TENSORS} tensors: absurd counts")
        return None
    return table


def _message(error: Exception) -> str:
    if isinstance(error, FamilyError):
        return str(error).removeprefix(f"{CONFIG}: ")
    return f"a value that is no fit for its key: {error!r}"


def _check_groups(layout: Layout, findings: Findings) -> None:
    """What a router that picks groups first needs (DeepSeek): groups large enough for top-k."""
    key, groups = layout.family.group_key, layout.groups
    if not key or groups == 1:
        return
    picked = layout.text.get("topk_group")
    size = layout.num_experts // groups
    if size < 2:
        findings.problem("groups", CONFIG, f"{key}: {size} expert per group, the router needs two to score a group")
    if type(picked) is int and not 1 <= picked <= groups:
        findings.problem("groups", CONFIG, f"topk_group is {picked}, but there are {groups} groups ({key})")
    elif type(picked) is int and layout.top_k > picked * size:
        findings.problem(
            "groups",
            CONFIG,
            f"{layout.family.top_k_key} is {layout.top_k}, but {picked} groups hold {picked * size} experts",
        )


def _check_dtype(layout: Layout, findings: Findings) -> None:
    if not layout.family.bfloat16_only:
        return
    parts: tuple[tuple[str, Mapping[str, Any]], ...] = (("", layout.config),)
    if layout.wrapper.text_key:
        parts += ((f"{layout.wrapper.text_key}.", layout.text),)
    for home, part in parts:
        for key in ("dtype", "torch_dtype"):
            if isinstance(value := part.get(key), str) and value.removeprefix("torch.") in ("float16", "half"):
                findings.problem("float16", CONFIG, f"{home}{key} is {value}, which overflows in this family: bfloat16")


def _variants(layout: Layout, seed: Mapping[str, Place]) -> dict[tuple[Scope, int], str]:
    """Spelling of the experts of every block: where it mixes both the whole one, where it has none the usual one.

    Blocks in the seed-era spelling, of which `seed` has the experts as they should be named, count as per-expert.
    """
    respelled = {(place.scope, place.layer): "per-expert" for place in seed.values() if place.layer is not None}
    variants = {**respelled, **variants_found(layout)}
    spellings: dict[tuple[Scope, int], dict[str, set[str]]] = {}
    for place in layout.places.values():
        if place.template.variant and place.layer is not None:
            block = spellings.setdefault((place.scope, place.layer), {})
            block.setdefault(place.template.variant, set()).add(place.template.name)
    for key, found in spellings.items():
        if len(found) > 1:
            variants[key] = "fused" if len(found["fused"]) > 1 else "per-expert"
    others = [variant for (scope, _), variant in variants.items() if scope == "block"]
    usual = max(sorted(set(others)), key=others.count, default="fused")
    return {**{("block", layer): usual for layer in layout.moe_layers}, **variants}


def _all_forms(weights: Iterable[str]) -> Iterator[str]:
    """Names of weights, and of all parts that may stand for them."""
    for name in weights:
        yield name
        yield from (name.removesuffix("weight") + part for parts in PARTS.values() for part in parts)


def _check_mtp(layout: Layout, findings: Findings) -> None:
    mtp = layout.family.mtp
    if mtp and layout.mtp_layers and not layout.has_mtp:
        findings.warn("mtp-absent", CONFIG, f"{mtp.count_key} is {layout.mtp_layers}, but no tensor of an MTP layer")
    elif mtp and layout.has_mtp and not layout.mtp_layers:
        names = [name for name, place in layout.places.items() if place.scope == "mtp"]
        findings.problem(
            "mtp", names[0], f"{len(names)} tensors of MTP layers, but config.json has no {mtp.count_key} for them"
        )


def _check_table(
    layout: Layout,
    table: Table,
    forms: Mapping[str, str],
    tensors: Mapping[str, TensorRef],
    gone: frozenset[str] | set[str],
    findings: Findings,
) -> None:
    """Every tensor of `table` is there in its shape, or in its form; the absence of `gone` is reported elsewhere."""
    found: list[Item] = []
    for name, item in table.items():
        in_mtp = item.place.scope == "mtp"
        if in_mtp and not layout.has_mtp:
            continue
        if name in forms:
            found += _missing_parts(name, item, forms[name], tensors, gone)
            continue
        ref = tensors.get(name)
        if ref is None:
            if not item.optional and name not in gone:
                detail = "all experts missing" if item.place.template.variant == "fused" else "missing"
                found.append(Item("mtp" if in_mtp else "missing", name, item.place, detail))
        elif item.shape is not None and not is_shape(ref.spec, item.shape):
            counts = _counts_otherwise(item.place.template.slicing, ref.spec.shape, item.shape)
            code = "mtp" if in_mtp else "expert-count" if counts else "shape"
            found.append(Item(code, name, item.place, counts or _misshapen(ref.spec.shape, item.shape)))
        elif item.place.template.ids and ref.spec.dtype not in ID_DTYPES:
            found.append(Item("expert-id", name, item.place, f"{ref.spec.dtype}, expected ids of experts as integers"))
    findings.items(found, layout.num_experts)


def _missing_parts(
    name: str, item: Expected, form: str, tensors: Mapping[str, TensorRef], gone: frozenset[str] | set[str]
) -> Iterator[Item]:
    """Parts that are not there of a weight that is stored quantized; their shapes are left open here."""
    stem = name.removesuffix("weight")
    for part in () if item.optional else PARTS[form]:
        if stem + part not in tensors and stem + part not in gone:
            place = item.place._replace(companion="" if part == "weight" else part)
            detail = "all experts missing" if place.template.variant == "fused" else "missing"
            yield Item("mtp" if place.scope == "mtp" else "missing", stem + part, place, detail)


def _counts_otherwise(slicing: Slicing | None, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Say that a shape is right but for the number of experts; empty where it is not."""
    if slicing is None or len(found) != len(wanted):
        return ""
    axis = slicing.axis
    if found[:axis] + found[axis + 1 :] != wanted[:axis] + wanted[axis + 1 :]:
        return ""
    what = "experts" if slicing == Slicing(axis) else "positions of experts and others"
    return f"{found[axis]} {what}, but config.json says {wanted[axis]}"


def _misshapen(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"shape {list(found)}, expected {list(wanted)}"


def _check_unexpected(
    layout: Layout,
    table: Table,
    forms: Mapping[str, str],
    variants: Mapping[tuple[Scope, int], str],
    findings: Findings,
) -> None:
    """No tensor with a name that the family knows stands where the config gives none."""
    found: list[Item] = []
    for name, place in layout.places.items():
        if place.scope == "mtp" and not layout.mtp_layers:
            continue
        whole = "" if place.companion.startswith("_") or not place.companion else "weight"
        base = name.removesuffix(place.companion) + whole
        template = place.template
        if template in layout.family.towers:
            continue
        if base in table:
            form = stored_form(name, layout.places) if name in forms and not place.companion else ""
            if "weight" not in PARTS.get(form, ("weight",)):
                found.append(Item("stray", name, place, "a 16-bit weight beside its quantized form"))
            continue
        code, detail = "stray", "config.json gives this place no such tensor"
        if place.scope in _BLOCK and place.layer is not None:
            variant = variants.get((place.scope, place.layer), template.variant)
            if place.expert is not None and place.expert >= layout.num_experts:
                found.append(_beyond(layout, name, place))
                continue
            if template.variant and template.variant != variant:
                code, detail = "spelling", f"a {template.variant} expert in a block with {variant} experts"
        found.append(Item("mtp" if place.scope == "mtp" else code, name, place, detail))
    findings.items(found, layout.num_experts)


def _beyond(layout: Layout, name: str, place: Place) -> Item:
    code = "mtp" if place.scope == "mtp" else "expert-range"
    return Item(code, name, place, f"beyond the {layout.num_experts} experts of config.json")


def _count_experts(layout: Layout, tensors: Mapping[str, TensorRef], seed: Mapping[str, Place]) -> int:
    """Routed experts that have any tensor, over all layers."""
    single: set[tuple[Scope, int | None, int]] = set()
    fused: dict[tuple[Scope, int | None], int] = {}
    for name, place in (*layout.places.items(), *seed.items()):
        if place.expert is not None:
            single.add((place.scope, place.layer, place.expert))
        elif place.template.variant == "fused" and (shape := tensors[name].spec.shape):
            fused[place.scope, place.layer] = shape[0] if place.template.slicing == Slicing(0) else layout.num_experts
    return len(single) + sum(fused.values())


# -- names that the family does not know --------------------------------------------------------------------------


_SEED: Final = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)\.(\d+)\..*")
_MERGED: Final = re.compile(r"(.*\.experts)\.(\d+)\.gate_up_proj(\..*)?")
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


def check_unknown(layout: Layout, findings: Findings) -> set[str]:
    """Report names that the family does not know, those that mean the same in one problem.

    What means nothing to any client, and looks like no part of an expert, a router or a quantized weight, is a warning.

    Returns:
        tensors that are there under a name of another wrapper class, and so are not missing.

    """
    renamed = dict(_of_other_wrapper(layout))
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in layout.unknown:
        code, detail = ("prefix", _prefix_detail(layout)) if name in renamed else _meaning(layout, name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name) if code in ("stray", "unknown") else ""
        groups.setdefault((code, detail, pattern), []).append(name)
    for (code, detail, pattern), names in groups.items():
        count = f" ({len(names)} tensors: {pattern or 'such as ' + names[0]})" if len(names) > 1 else ""
        report = findings.warn if code == "unknown" else findings.problem
        report(code, _where(layout, names), detail + count)
    findings.named.update(layout.unknown)
    return set(renamed.values())


def seed_weights(layout: Layout) -> dict[str, str]:
    """Experts that are there in a spelling that no client takes: names of their weights as they should be spelled.

    Each with the name of a tensor that holds it.
    """
    found: dict[str, str] = {}
    for name in layout.unknown:
        if match := _SEED.fullmatch(name):
            experts, projection, expert = match.groups()
        elif match := _MERGED.fullmatch(name):
            experts, expert, projection = match[1], match[2], "gate_up_proj"
        else:
            continue
        for each in ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,):
            found.setdefault(f"{experts}.{expert}.{each}.weight", name)
    return found


def _meaning(layout: Layout, name: str) -> tuple[str, str]:
    vision = layout.family.vision_prefix
    if _SEED.fullmatch(name):
        era = "written by auto-round before 0.12; current clients refuse it or serve garbage"
        return "seed-spelling", era + _way_out(layout)
    if _MERGED.fullmatch(name):
        return "seed-spelling", "a gate_up_proj per expert, which no client loads; expected gate_proj and up_proj"
    if vision and name.startswith(vision) and not layout.wrapper.vision:
        return "vision", f"vision tower under {layout.wrapper.architecture}, which refuses it"
    layer = _LAYER.search(name)
    if layer and name.startswith(layout.wrapper.prefix) and int(layer[1]) >= layout.num_layers:
        mtp = layout.family.mtp
        declared = f" and {layout.mtp_layers} MTP layers" if mtp and mtp.follows_blocks else ""
        return "layer-range", f"beyond the {layout.num_layers} layers{declared} of config.json"
    if what := looks_like(layout, name):
        return "stray", f"unknown to family {layout.family.name}, and looks like {what}, which clients would drop"
    return "unknown", f"unknown to family {layout.family.name}: clients pass over it, or refuse it"


def _way_out(layout: Layout) -> str:
    declared = layout.config.get("quantization_config") or layout.text.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    if method not in FORMATS:
        return ""
    return f"; `shardxform convert` to {method} with `expert_names` split respells it"


def _of_other_wrapper(layout: Layout) -> Iterator[tuple[str, str]]:
    """Names that would be known under another wrapper's decoder prefix, with their names under this one."""
    here = layout.wrapper.prefix
    for other in sorted({w.prefix for w in layout.family.wrappers} - {here}, key=len, reverse=True):
        names = {name: here + name[len(other) :] for name in layout.unknown if name.startswith(other)}
        places = layout_of(layout.config, names.values()).places
        yield from ((old, new) for old, new in names.items() if new in places)


def _prefix_detail(layout: Layout) -> str:
    return f"the decoder of {layout.wrapper.architecture} is {layout.wrapper.prefix}*, this is another class's prefix"


def _block(layout: Layout, name: str) -> tuple[Scope, int] | None:
    """The decoder block or MTP layer that a name claims to be of."""
    layer = _LAYER.search(name)
    mtp = layout.family.mtp
    if not layer:
        return None
    number = int(layer[1])
    if mtp and not mtp.follows_blocks and name.startswith(layout.mtp_prefixes):
        return "mtp", number // layout.mtp_blocks
    if not name.startswith(layout.blocks):
        return None
    if name.startswith(layout.mtp_prefixes or "\0"):
        return "mtp", (number - layout.num_layers) // layout.mtp_blocks
    return "block", number


def _where(layout: Layout, names: list[str]) -> str:
    """Layers when all names lie in layers of one kind, else the first name."""
    blocks = {_block(layout, name) for name in names}
    scopes = {block[0] for block in blocks if block}
    if len(names) == 1 or None in blocks or len(scopes) > 1:
        return names[0]
    return place_of(scopes.pop(), sorted(block[1] for block in blocks if block))


# -- planned -----------------------------------------------------------------------------------------------------------
# An output that is only planned, held to what verification will say of its names, shapes and config when it is made.
#
# What a command would write and then call unsound is refused before its first byte, and before the first hour of
# work.


@uncollected()
def refuse_unsound(plan: Plan, but: Collection[str] = ()) -> None:
    """Refuse a plan whose output would not be sound, by what headers and config tell.

    Args:
        plan: of any command.
        but: codes of problems that are wanted, such as a spelling for old clients.

    Raises:
        PlanError: says what verification would find first, and how much more.

    """
    specs = [spec for shard in plan.shards for spec, _, _ in shard.entries]
    config = parse_config(plan.config)
    firsts = firsts_planned(config, specs)
    findings = _findings(plan, config, specs if firsts is None else firsts, sampled=firsts is not None)
    if findings.problems and firsts is not None:  # which are better told of all experts
        findings = _findings(plan, config, specs, sampled=False)
    findings.refuse(plan.origin, but)


def firsts_planned(config: Config, specs: Sequence[TensorSpec]) -> list[TensorSpec] | None:
    """What tells of all tensors whether they are sound, see `first_of_alike`; None where all must be looked at."""
    try:
        return None if tells_experts_apart(config) else first_of_alike(layout_of(config, ()), specs)
    except _CONFIG_FAULTS:  # which are found again, and reported
        return None


def _findings(plan: Plan, config: Config, specs: Iterable[TensorSpec], *, sampled: bool) -> Findings:
    """What verification finds in the structure of an output."""
    tensors = {spec.name: TensorRef(spec, (ByteRange("", 0, spec.nbytes),)) for spec in specs}  # nothing reads them
    planned, findings = as_family(Checkpoint(plan.source, config, tensors, ())), Findings()
    check_structure(planned, frozenset(), findings, sampled=sampled)
    return findings
