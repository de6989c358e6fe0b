"""Verification of names and shapes: every tensor that the family demands for this config, and none besides.

vLLM loads a quantized checkpoint without an expert, and SGLang any, without a word; so the whole table is enumerated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import FamilyError
from shardxform.model.config_values import config_faults
from shardxform.model.expectation import Expected, expected
from shardxform.model.families import family_of
from shardxform.model.families.base import Scope
from shardxform.model.layout import Layout, Place, layout_of, variants_found
from shardxform.verification.findings import Findings, Item
from shardxform.verification.quantized import check_quantization
from shardxform.verification.unknown import check_unknown, seed_weights

if TYPE_CHECKING:
    from shardxform.formats.stored import Stored

__all__ = ["PARTS", "Structure", "check_structure", "stored", "stored_form"]

PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "qweight": ("qweight", "qzeros", "scales"),
    "weight_packed": ("weight_packed", "weight_scale", "weight_shape"),
}
"""What must be stored instead of a quantized `weight`, by the part that holds its integers."""

_SIGNS: Final = {"qweight": ("qweight", "qzeros", "scales"), "weight_packed": ("weight_packed", "weight_shape")}
_MAX_TENSORS: Final = 200_000  # three times the largest checkpoint known, before quantization
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
    checkpoint: Checkpoint, lost: frozenset[str], findings: Findings, *, parts_too: bool = True
) -> Structure | None:
    """Report every tensor that is missing, misshapen or unexpected, and every contradiction of the config.

    Args:
        checkpoint: to look at.
        lost: tensors that the index names in shards that cannot be read; reported elsewhere.
        findings: added to.
        parts_too: look at dtypes and shapes of the parts of quantized weights.

    """
    layout = _layout(checkpoint, findings)
    if layout is None:
        return None
    _check_groups(layout, findings)
    _check_dtype(layout, findings)
    for fault in config_faults(layout):
        findings.problem("config", CONFIG, f"{fault}; transformers refuses it")
    check_quantization(layout, checkpoint.tensors, findings)
    seed = layout_of(layout.config, seed_weights(layout)).places
    parts: Stored | None = None
    if checkpoint.tensors:
        excused = check_unknown(layout, findings)
        variants = _variants(layout, seed)
        table = _table(layout, variants, findings)
        if table is not None:
            _check_mtp(layout, findings)
            gone = lost | excused | set(_all_forms(seed))
            _check_table(layout, stored(table, checkpoint.tensors), checkpoint.tensors, gone, findings)
            _check_unexpected(layout, table, variants, findings)
            outside = {name: place for name, place in seed.items() if (place.expert or 0) >= layout.num_experts}
            findings.items([_beyond(layout, *each) for each in outside.items()], layout.num_experts)
            parts = _check_parts(checkpoint, layout, findings) if parts_too else None
    return Structure(layout, _count_experts(layout, checkpoint.tensors, seed), parts)


def _check_parts(checkpoint: Checkpoint, layout: Layout, findings: Findings) -> Stored | None:
    if not checkpoint.config.get("quantization_config"):
        return None
    from shardxform.verification.parts import check_parts  # and with it all that is known of encodings

    return check_parts(checkpoint, layout, findings)


def stored(table: Table, tensors: Mapping[str, TensorRef]) -> Table:
    """What must be in the shards for a 16-bit table: itself, but for weights that are stored quantized.

    Shapes of quantized parts are left open here.
    """
    forms = {name: stored_form(name, tensors) for name in table}
    usual: dict[str, str] = {}  # by template: what a weight that is not there at all would be stored as
    for name, form in forms.items():
        if form:
            usual.setdefault(table[name].place.template.name, form)
    out: Table = {}
    for name, item in table.items():
        form = forms[name] or ("" if name in tensors else usual.get(item.place.template.name, ""))
        if not form:
            out[name] = item
            continue
        stem = name.removesuffix("weight")
        for part in PARTS[form]:
            place = item.place
            place = Place(place.template, place.scope, place.layer, place.expert, place.expert_at, part)
            out[stem + part] = Expected(place, None, item.optional)
    return out


def stored_form(name: str, tensors: Mapping[str, object]) -> str:
    """How the weight `name` is stored: a key of `PARTS`, or empty for as it is."""
    if not name.endswith(".weight"):
        return ""
    stem = name.removesuffix("weight")
    return next((form for form, signs in _SIGNS.items() if any(stem + sign in tensors for sign in signs)), "")


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
    layout: Layout, table: Table, tensors: Mapping[str, TensorRef], gone: frozenset[str] | set[str], findings: Findings
) -> None:
    """Every tensor of `table` is there in its shape; `gone` are those whose absence is reported elsewhere."""
    found: list[Item] = []
    for name, item in table.items():
        if item.place.scope == "mtp" and not layout.has_mtp:
            continue
        in_mtp = item.place.scope == "mtp"
        ref = tensors.get(name)
        if ref is None:
            if not item.optional and name not in gone:
                detail = "all experts missing" if item.place.template.variant == "fused" else "missing"
                found.append(Item("mtp" if in_mtp else "missing", name, item.place, detail))
        elif item.shape is not None and ref.spec.shape != item.shape:
            counts = item.place.template.sliced and ref.spec.shape[1:] == item.shape[1:]
            code = "mtp" if in_mtp else "expert-count" if counts else "shape"
            found.append(Item(code, name, item.place, _misshapen(ref.spec.shape, item.shape, counts)))
    findings.items(found, layout.num_experts)


def _misshapen(found: tuple[int, ...], wanted: tuple[int, ...], counts: bool) -> str:
    if counts and found:
        return f"{found[0]} experts, but config.json says {wanted[0]}"
    return f"shape {list(found)}, expected {list(wanted)}"


def _check_unexpected(
    layout: Layout, table: Table, variants: Mapping[tuple[Scope, int], str], findings: Findings
) -> None:
    """No tensor with a name that the family knows stands where the config gives none."""
    found: list[Item] = []
    for name, place in layout.places.items():
        if place.scope == "mtp" and not layout.mtp_layers:
            continue
        base = name.removesuffix(place.companion) + "weight" if place.companion else name
        template = place.template
        if base in table:
            if not place.companion and stored_form(name, layout.places):
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
            fused[place.scope, place.layer] = shape[0]
    return len(single) + sum(fused.values())
