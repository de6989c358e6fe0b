"""Verification of quantization: what config.json declares against what the shards hold, module by module.

Names and dtypes, and how much of a row is stored where clients merge rows; scales of FP8, of the shape and type that
clients read; other shapes are looked at in `parts`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, NamedTuple

from shardxform.base.tensors import FLOATS, FP8, ID_DTYPES, TensorRef, TensorSpec
from shardxform.checkpoint.table import CONFIG
from shardxform.errors import SchemeError
from shardxform.formats.config_names import ASYMMETRIC, declares, method_of
from shardxform.model.families.base import LINEAR_ROLES, Config, Scope, Template
from shardxform.model.layout import SCALES, Layout, Place
from shardxform.model.tied_head import is_tied
from shardxform.verification.declared import said_against_itself, stored_against_algorithm
from shardxform.verification.findings import Findings, Item, place_of, spans

if TYPE_CHECKING:
    from shardxform.formats.fp8 import ScaleRule

__all__ = ["BLOCKS_KEY", "Asked", "Reader", "blocks_of", "check_quantization", "readers_of"]

_PLAIN: Final = "16-bit"
_KINDS: Final = {
    "qweight": "gptq",
    "qzeros": "gptq",
    "scales": "gptq",
    "weight_packed": "compressed-tensors",
    "weight_shape": "compressed-tensors",
}
_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "auto-round": ("bits", "group_size", "sym", "packing_format"),
    "compressed-tensors": ("config_groups", "format"),
    "gptq": ("bits", "group_size", "desc_act", "sym"),
    "mlx": ("bits", "group_size"),
}
_INTEGERS: Final = frozenset({*_KINDS.values(), "mlx"})
_PACKINGS: Final = ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:llm_compressor")  # vLLM's list
_FLOAT_ROLES: Final = frozenset({"router", "embeddings", "norms"})
_FLOAT_MODULES: Final = ("*conv1d", "*shared_expert_gate", "*.A_log", "*.dt_bias")
_BESIDE: Final = ("activation_scale", "input_scale", "qscale_act", "qscale_weight")
_SECOND: Final = ("input_global_scale", "scale", "weight_global_scale", "weight_scale_2")
_NAMES_EXPERTS: Final = re.compile(r"experts\W{1,9}\d")  # a config that tells experts of a layer apart

_Block = tuple[Scope, int]


class _Module(NamedTuple):
    """A weight without its last name part, and how it is stored: 16-bit, gptq, compressed-tensors, mlx or a dtype.

    `linear` is for what clients run quantized unless the config leaves it out: linear layers of blocks, of the vision
    tower, the output head, and experts; and for embeddings, which a config may name.
    """

    name: str
    tensor: str
    place: Place
    kind: str
    linear: bool

    @property
    def local(self) -> str:
        """Name within its block."""
        return self.place.template.name.removesuffix(".weight")

    @property
    def asked(self) -> Asked:
        """The module as clients ask about it: experts one by one, the first of them for a stack of all."""
        kind = "Embedding" if self.place.template.role == "embeddings" else "Linear"
        if not self.place.template.variant:
            return Asked(self.name, kind=kind)
        home, _, rest = self.name.rpartition(".experts.")
        home += ".experts"
        projection = "gate_proj" if rest == "gate_up_proj" else rest
        return Asked(f"{home}.0.{projection}" if self.place.expert is None else self.name, home)

    def is_expert_of(self, blocks: Set[_Block]) -> bool:
        """Whether it belongs to a routed expert of one of `blocks`."""
        return bool(self.place.template.variant) and (self.place.scope, self.place.layer) in blocks


def check_quantization(layout: Layout, tensors: Mapping[str, TensorRef], findings: Findings) -> None:
    """Report contradictions between `quantization_config` and the kinds of tensors, and between merged modules."""
    modules = list(_modules(layout, tensors))
    declared = layout.config.get("quantization_config") or layout.text.get("quantization_config")
    _check_float(layout, modules, findings)
    above, below = layout.config.get("quantization_config"), layout.text.get("quantization_config")
    if layout.wrapper.text_key and above and below and above != below:
        findings.problem("quantization-config", CONFIG, "quantization_config and that of the text config differ")
    if _scales_tell(layout, findings):
        _check_scales(layout, tensors, findings)
    mixed = _check_merged(layout, modules, findings)
    if declared in (None, {}):
        _check_undeclared(modules, findings)
    elif not isinstance(declared, Mapping):
        findings.problem("quantization-config", CONFIG, f"quantization_config: expected an object, found {declared!r}")
    else:
        known = len(findings.problems)
        _check_config(layout, declared, findings)
        for fault in stored_against_algorithm(declared, tensors):
            findings.problem("quantization-config", CONFIG, f"quantization_config.{fault}")
        if len(findings.problems) == known:  # or clients stop before they look at a module
            untold = [m for m in modules if not (m.is_expert_of(mixed) or m.tensor in findings.named)]
            _check_declared(layout, declared, untold, findings)


def _scales_tell(layout: Layout, findings: Findings) -> bool:
    """Report a config that does not say how weights are stored; tell whether scales must fit without any rule."""
    if not declares(layout.config):
        return True
    from shardxform.formats.decoding import is_packed, unreadable  # and with it all encodings

    if why := unreadable(layout.config):
        findings.problem("quantization-config", CONFIG, f"quantization_config.{why}")
    return not is_packed(layout.config)


def _modules(layout: Layout, tensors: Mapping[str, TensorRef]) -> Iterator[_Module]:
    found: dict[str, _Module] = {}
    for name, place in layout.places.items():
        if place.template.ids or (place.template.variant and not place.template.is_expert_weight):
            continue
        stem = name.removesuffix(place.companion or "weight").removesuffix(".")
        if not place.companion:
            spec = tensors[name].spec
            if place.template in layout.family.towers and spec.dtype in ID_DTYPES:
                continue  # tables of numbers
            kind_of = _PLAIN if spec.dtype in FLOATS else "mlx" if spec.dtype == "U32" else spec.dtype
            if kind_of == "mlx" and stem in found:
                del found[stem]  # which its scales were taken for
            found.setdefault(stem, _Module(stem, name, place, kind_of, _is_linear(name, spec, place)))
        elif (kind := _KINDS.get(place.companion)) and (stem not in found or found[stem].kind not in _INTEGERS):
            found[stem] = _Module(stem, name, place, kind, linear=True)
    return iter(found.values())


def _is_linear(name: str, spec: TensorSpec, place: Place) -> bool:
    """Whether a plain tensor is the weight of a linear layer, or of an embedding, that a config may call quantized."""
    role = place.template.role
    if place.template.variant == "fused":
        return True
    if not name.endswith(".weight") or len(spec.shape) != 2:
        return False
    return role in LINEAR_ROLES | {"embeddings", "lm head"} or (role == "vision" and "embed" not in name)


def _check_float(layout: Layout, modules: Sequence[_Module], findings: Findings) -> None:
    """Routers, embeddings, norms, convolutions and the family's own exceptions: no client runs them quantized.

    The family's are about integers: releases in FP8 hold some of them so.
    """
    items: list[Item] = []
    decided: dict[tuple[Template, str], bool] = {}
    for m in modules:
        if m.kind == _PLAIN:
            continue
        key = (m.place.template, m.kind)
        if key not in decided:
            decided[key] = _is_float_only(layout, m)
        if decided[key]:
            items.append(Item("quantized", m.tensor, m.place, f"stored as {m.kind}, but clients need it in 16 bits"))
    findings.items(items, layout.num_experts)


def _is_float_only(layout: Layout, m: _Module) -> bool:
    """Whether no client runs a module quantized as it is; its template and kind decide. mlx-lm runs all but norms."""
    if m.kind == "mlx":
        return m.place.template.role == "norms"
    patterns = _FLOAT_MODULES if m.kind in FP8 else (*layout.family.keep_16bit, *_FLOAT_MODULES)
    tied = m.place.template.role == "lm head" and is_tied(layout)
    return tied or m.place.template.role in _FLOAT_ROLES or any(fnmatchcase(m.local, p) for p in patterns)


def _check_merged(layout: Layout, modules: Sequence[_Module], findings: Findings) -> set[_Block]:
    """Modules that clients merge into one, and all experts of a layer, are stored alike.

    Returns:
        blocks whose experts are not.

    """
    blocks: dict[_Block, list[_Module]] = {}
    mixed: set[_Block] = set()
    for m in modules:
        if m.place.layer is not None:
            blocks.setdefault((m.place.scope, m.place.layer), []).append(m)
    found: dict[tuple[Scope, str], list[int]] = {}
    for (scope, layer), members in blocks.items():
        experts = list(_differing_experts(members))
        mixed |= {(scope, layer)} if experts else set()
        for message in (*experts, *_differing_members(layout, members)):
            found.setdefault((scope, message), []).append(layer)
    for (scope, message), layers in found.items():
        findings.problem("merged", place_of(scope, sorted(layers)), message)
    return mixed


def _differing_members(layout: Layout, members: Sequence[_Module]) -> Iterator[str]:
    kinds = {m.local: m.kind for m in members}
    for group in layout.family.merged.values():
        there = [name for name in group if name in kinds]
        if len({kinds[name] for name in there}) > 1:
            yield "clients merge these, so they must be stored alike: " + ", ".join(f"{n} {kinds[n]}" for n in there)


def _differing_experts(members: Sequence[_Module]) -> Iterator[str]:
    experts = [m for m in members if m.place.template.variant]
    kinds = Counter(m.kind for m in experts)
    if len(kinds) < 2:
        return
    usual = kinds.most_common(1)[0][0]
    others = [m for m in experts if m.kind != usual]
    ids = spans(sorted({m.place.expert for m in others if m.place.expert is not None}))
    parts = ", ".join(sorted({m.local.rpartition(".")[2] for m in others}))
    kind = ", ".join(sorted({m.kind for m in others}))
    yield f"experts must be stored alike: {parts} of expert {ids or '(all)'} is {kind}, the others are {usual}"


def _check_undeclared(modules: Sequence[_Module], findings: Findings) -> None:
    modules = [m for m in modules if m.place.template.name.endswith("weight") or m.place.template.variant]
    kinds = Counter(m.kind for m in modules if m.kind != _PLAIN)
    for kind, count in kinds.items():
        first = next(m.tensor for m in modules if m.kind == kind)
        findings.problem(
            "undeclared", first, f"{count} modules are stored as {kind}, but config.json has no quantization_config"
        )


def _check_config(layout: Layout, declared: Mapping[str, object], findings: Findings) -> None:
    def report(message: str) -> None:
        findings.problem("quantization-config", CONFIG, f"quantization_config.{message}")

    method = method_of(declared)
    if not isinstance(method, str) or not method:
        report("quant_method: missing" if method is None else f"quant_method: expected a name, found {method!r}")
        return
    for key in _REQUIRED.get(method, ()):
        if declared.get(key) is None:
            report(f"{key}: missing; clients of {method} refuse to start without it")
    for fault in said_against_itself(declared):
        report(fault)
    if method == "mlx" and not declared.get(ASYMMETRIC):
        from shardxform.formats.dialects import resolve

        try:
            resolve(declared)
        except SchemeError as e:
            report(str(e).partition(": ")[2])
    if method in _REQUIRED and method not in ("mlx", *layout.family.formats):
        family, known = layout.family, " or ".join(layout.family.formats)
        why = f"do not find experts of {family.name}, as those of {known} do" if known else f"fail: {family.unread}"
        report(f"quant_method: {method}, whose loaders {why}")
    bits, packing = declared.get("bits"), declared.get("packing_format")
    if method == "gptq" and declared.get("sym") is False:
        findings.warn(
            "quantization-config",
            CONFIG,
            f"quantization_config.sym: false ({bits} bits), of which vLLM and SGLang run"
            " experts only when told to (quantization moe_wna16)",
        )
    if method == "auto-round" and packing is not None and packing not in _PACKINGS:
        report(f"packing_format: {packing!r}, clients take {' or '.join(_PACKINGS)}")
    blocks = blocks_of(declared)
    here = layout.blocks.removesuffix(".")
    if method == "auto-round" and blocks and here not in blocks:
        report(f"block_name_to_quantize: {', '.join(blocks)}; without {here} clients take everything for 16-bit")


def _check_declared(
    layout: Layout, declared: Mapping[str, object], modules: Sequence[_Module], findings: Findings
) -> None:
    """Hold every module that clients ask about against what each of them reads in the config."""
    method = str(method_of(declared))
    readers = readers_of(declared, layout.text)
    by_name = _NAMES_EXPERTS.search(repr(declared)) is not None
    kinds = _kinds_of(declared)
    decided: dict[object, frozenset[bool]] = {}
    items: list[Item] = []
    doubtful: list[Item] = []
    for m in modules:
        inside = m.place.layer is not None and not by_name
        key = (m.place.scope, m.place.layer, m.local, m.kind) if inside else m.name
        if key not in decided:  # as a rule experts of a layer have one scheme: a look at the first is enough
            decided[key] = _verdicts(m, declared, readers)
        stored, said = m.kind != _PLAIN, decided[key]
        if stored and kinds and m.kind not in (kinds | _FOURS if m.place.template.variant and kinds == FP8 else kinds):
            detail = f"stored as {m.kind}, but config.json declares {method}"
            items.append(Item("quantization-kind", m.tensor, m.place, detail))
        elif said and stored not in said and not (kinds == FP8 and not stored and _stays(layout, m)):
            code = "undeclared" if stored else "not-quantized"
            items.append(Item(code, m.tensor, m.place, _contradiction(m, method)))
        elif len(said) > 1 and m.place.scope != "mtp":
            doubtful.append(Item("quantization-clients", m.tensor, m.place, _disagreement(m, method)))
    findings.items(items, layout.num_experts)
    findings.warn_items(doubtful, layout.num_experts)


def _stays(layout: Layout, m: _Module) -> bool:
    """Whether it is one of those that clients of the family never run quantized, whatever a config says."""
    return any(fnmatchcase(m.local, pattern) for pattern in layout.family.keep_16bit)


def _kinds_of(declared: Mapping[str, object]) -> Set[str]:
    """How a method stores quantized weights; nothing where that is left open."""
    method, packing = method_of(declared), str(declared.get("packing_format"))
    if method == "mlx":
        return {"mlx"}
    if method in ("awq", "gptq") or (method == "auto-round" and "llm_compressor" not in packing):
        return {"gptq"}
    if method in ("fp8", "fbgemm_fp8"):
        return FP8
    return {"compressed-tensors"} if declared.get("format") == "pack-quantized" else frozenset()


def _verdicts(m: _Module, declared: Mapping[str, object], readers: Sequence[Reader]) -> frozenset[bool]:
    """What clients say of a module; nothing of what no client runs quantized, and of routed experts alone elsewhere."""
    if not m.linear and m.kind == _PLAIN:
        return frozenset()
    if method_of(declared) == "mlx":
        return frozenset()  # mlx-lm looks for scales, and at nothing else
    if not readers:
        lenient = m.place.template.variant or m.kind != _PLAIN
        return frozenset({not _left_out(declared, m.name)} if lenient else ())
    return frozenset(reader(m.asked) for reader in readers)


def _contradiction(m: _Module, method: str) -> str:
    if m.kind != _PLAIN:
        return f"stored as {m.kind}, but config.json declares it 16-bit ({method}): clients drop it"
    return f"stored in 16 bits, but config.json declares it quantized ({method}): clients leave it random, or fail"


def _disagreement(m: _Module, method: str) -> str:
    stored = "in 16 bits" if m.kind == _PLAIN else f"as {m.kind}"
    return f"stored {stored}, which some clients do not read in what config.json declares ({method})"


def _left_out(declared: Mapping[str, object], module: str) -> bool:
    """Whether lists of a method whose readers are not known name a module, or what it is part of."""
    parts = module.split(".")
    homes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return any(name in homes or fnmatchcase(module, name) or _matches(name, module) for name in _ignored(declared))


def _matches(name: str, module: str) -> bool:
    try:
        return name.startswith("re:") and re.match(name[3:], module) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _ignored(declared: Mapping[str, object]) -> Iterator[str]:
    for key in ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules"):
        listed = declared.get(key)
        yield from (name for name in (listed if isinstance(listed, list) else ()) if isinstance(name, str))


# -- scales of FP8 ------------------------------------------------------------------------------------------------


def _check_scales(layout: Layout, tensors: Mapping[str, TensorRef], findings: Findings) -> None:
    """Report FP8 weights without scales, scales of another shape or type, and scales beside 16-bit weights."""
    faulty: list[Item] = []
    if any(tensors[name].spec.dtype in FP8 for name in layout.places):
        from shardxform.formats.fp8 import ScaleRule, scale_rule

        declared = layout.config.get("quantization_config") or layout.text.get("quantization_config")
        rule = scale_rule(declared if isinstance(declared, Mapping) else {})
        rule = replace(rule or ScaleRule(SCALES, None), transposed=layout.family.experts.transposed)
        faulty.extend(_faulty_scales(layout, tensors, rule))
    findings.items([*faulty, *_needless_scales(layout, tensors)], layout.num_experts)


def _faulty_scales(layout: Layout, tensors: Mapping[str, TensorRef], rule: ScaleRule) -> Iterator[Item]:
    for name, place in layout.places.items():
        spec = tensors[name].spec
        if place.companion or spec.dtype not in FP8:
            continue
        stem, names = rule.beside(spec)
        there = [last for last in dict.fromkeys((*names, *rule.named(spec))) if stem + last in tensors]
        stored = there[0] if there else None
        if len(there) > 1:
            detail = f"its weight has scales twice: {there[0]} is there too, and which of them holds cannot be told"
            yield Item("scale", stem + there[1], place._replace(companion=there[1]), detail)
        last = stored if stored in names else names[0]
        if stem + last not in tensors:
            found = f", and clients do not read {stored}" if stored else ""
            detail = f"missing: its weight is {spec.dtype}, which means nothing without its scales{found}"
            yield Item("scale", stem + last, place._replace(companion=last), detail)
        elif wrong := rule.fault(tensors[stem + last].spec, spec.shape):
            yield Item("scale", stem + last, place._replace(companion=last), wrong)


def _needless_scales(layout: Layout, tensors: Mapping[str, TensorRef]) -> Iterator[Item]:
    """Scales whose weight needs none: half of a conversion."""
    for name, place in layout.places.items():
        if not place.companion or place.companion not in (*SCALES, *_BESIDE, *_SECOND):
            continue
        weight = tensors.get(name.removesuffix(place.companion) + "weight")
        if weight is not None and weight.spec.dtype in FLOATS:
            yield Item("scale", name, place, f"a scale beside a weight that is {weight.spec.dtype} and needs none")
        elif place.companion in _SECOND:
            yield Item("scale", name, place, "no client looks for it by what config.json declares")


# -- how clients read a config ------------------------------------------------------------------------------------


BLOCKS_KEY: Final = "block_name_to_quantize"

_SPECIAL: Final = re.compile(r"[*+?^$()\[\]{}|\\]")  # without one of these, vLLM takes a name for no pattern
_LM_HEAD: Final = "lm_head"
_FOURS: Final = frozenset({"I8"})  # experts in FP4, two codes a byte, beside weights in FP8
_MOST_BITS: Final = 8  # of a quantized weight


@dataclass(frozen=True, slots=True)
class Asked:
    """A module that a client asks about.

    Attributes:
        name: as in the checkpoint, experts one by one.
        experts: name of the module that holds all experts of its layer; empty for other modules.
        kind: name of its class: `Linear`, or `Embedding`.

    """

    name: str
    experts: str = ""
    kind: str = "Linear"

    @property
    def is_head(self) -> bool:
        """Whether it is the output head, which vLLM keeps apart from linear layers."""
        return self.name in (_LM_HEAD, "head")

    @property
    def whole(self) -> str:
        """The name by which clients ask that hold the experts of a layer as one module."""
        return self.experts or self.name


Reader = Callable[[Asked], bool]
"""Tells whether a client takes a module for quantized."""


def readers_of(declared: Mapping[str, object], text: Config) -> tuple[Reader, ...]:
    """Give the ways in which clients read a quantization_config, that of transformers first; none for other methods.

    Args:
        declared: the quantization_config.
        text: config of the decoder, which says whether the head is tied.

    """
    makers: Mapping[object, Callable[[Mapping[str, object], bool], tuple[Reader, ...]]] = {
        "auto-round": _auto_round,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "gptq": _gptq,
    }
    method = declared.get("quant_method")
    maker = makers.get(method) if isinstance(method, str) else None
    return maker(declared, bool(text.get("tie_word_embeddings"))) if maker else ()


def blocks_of(declared: Mapping[str, object]) -> list[str]:
    """Names of the blocks that auto-round's config says are quantized; none for all."""
    value = declared.get(BLOCKS_KEY)
    listed = value.split(",") if isinstance(value, str) else list(_flat(value))
    return [name.strip() for name in listed if name.strip()]


# -- compressed-tensors -----------------------------------------------------------------------------------------------


def _compressed_tensors(declared: Mapping[str, object], _tied: bool) -> tuple[Reader, ...]:
    """Read targets and ignore lists: exact names, classes, and `re:` patterns from the start of a name."""
    groups = [_mapping(group) for group in _mapping(declared.get("config_groups")).values()]
    targets = _Names(name for group in groups if group.get("weights") for name in _flat(group.get("targets")))
    ignored = _Names(_flat(declared.get("ignore")))
    return (lambda asked: targets.match(asked) and not ignored.match(asked),)


class _Names:
    """Names, classes and patterns, as compressed-tensors matches them."""

    def __init__(self, listed: Iterable[str]) -> None:
        names = list(listed)
        self._exact = {name for name in names if not name.startswith("re:")}
        self._patterns = [p for name in names if name.startswith("re:") and (p := _compiled(name[3:]))]

    def match(self, asked: Asked) -> bool:
        """Whether one of them means the module; every class of torch is a `Module`."""
        exact = not self._exact.isdisjoint((asked.name, asked.kind, "Module"))
        return exact or any(pattern.match(asked.name) for pattern in self._patterns)


# -- auto-round, gptq -------------------------------------------------------------------------------------------------


def _auto_round(declared: Mapping[str, object], _tied: bool) -> tuple[Reader, ...]:
    return _loader_of_auto_round(declared), _vllm_auto_round(declared)


def _loader_of_auto_round(declared: Mapping[str, object]) -> Reader:
    """Read blocks, then what leaves modules of them out, then exact names, then patterns found anywhere in a name.

    It reads configs of gptq too: `dynamic`, whose exact names it skips, and `modules_in_block_to_quantize`.
    """
    blocks, extra = tuple(blocks_of(declared)), dict(_extra_bits(declared))
    inside = _compiled_all(_flat(declared.get("modules_in_block_to_quantize")))
    left_out = _compiled_all(_flat(declared.get("modules_to_not_convert")))
    patterns = [(p, bits) for name, bits in (*_dynamic_bits(declared), *extra.items()) if (p := _compiled(name))]

    def quantizes(asked: Asked) -> bool:
        if asked.kind != "Linear":
            return False
        in_blocks = not asked.is_head and (not blocks or asked.name.startswith(blocks))
        if in_blocks and any(p.search(asked.name) for p in left_out):
            return False
        if in_blocks and inside and not any(p.search(asked.name) for p in inside):
            return False
        if asked.name in extra:
            return extra[asked.name] <= _MOST_BITS
        found = next((bits for p, bits in patterns if p.pattern != asked.name and p.search(asked.name)), None)
        return in_blocks if found is None else found <= _MOST_BITS

    return quantizes


def _vllm_auto_round(declared: Mapping[str, object]) -> Reader:
    """Read exact names, then blocks by what a name begins with, then names with special characters as patterns."""
    blocks, extra = tuple(blocks_of(declared)), dict(_extra_bits(declared))
    patterns = [(p, bits) for name, bits in extra.items() if _SPECIAL.search(name) and (p := _compiled(name))]

    def quantizes(asked: Asked) -> bool:
        if asked.kind != "Linear":
            return False
        if named := [extra[name] for name in (asked.name, asked.whole) if name in extra]:
            return named[0] <= _MOST_BITS
        quantized = not asked.is_head and (not blocks or asked.name.startswith(blocks))
        found = next((bits for p, bits in patterns if p.search(asked.name)), None)
        return quantized if found is None else found <= _MOST_BITS

    return quantizes


def _gptq(declared: Mapping[str, object], _tied: bool) -> tuple[Reader, ...]:
    """Read `lm_head`, the modules of a block, and `dynamic` from the start of a name; or the head by its flag alone."""
    inside = list(_flat(declared.get("modules_in_block_to_quantize")))
    rules = [(re.sub(r"^[-+]:", "", name), name[:2] != "-:") for name in _mapping(declared.get("dynamic"))]
    dynamic = [(p, quantized) for name, quantized in rules if (p := _compiled(name))]
    head = declared.get("lm_head") is True

    def vllm(asked: Asked) -> bool:
        if asked.kind != "Linear" or (asked.is_head and not head):
            return False
        named = asked.is_head or not inside or any(part in asked.name or asked.name in part for part in inside)
        return named and next((quantized for p, quantized in dynamic if p.match(asked.name)), True)

    loader = _loader_of_auto_round(declared)
    return vllm, lambda asked: head if asked.is_head else loader(asked)


def _extra_bits(declared: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Names and patterns in auto-round's `extra_config`, with the width that they say."""
    for name, scheme in _mapping(declared.get("extra_config")).items():
        bits = _mapping(scheme).get("bits", declared.get("bits"))
        if type(bits) is int:
            yield name, bits


def _dynamic_bits(declared: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Patterns in gptq's `dynamic`, with the width that auto-round's loader gives them."""
    for name, rule in _mapping(declared.get("dynamic")).items():
        bits = 16 if name.startswith("-:") else _mapping(rule).get("bits", declared.get("bits"))
        if type(bits) is int and name[:2] in ("-:", "+:") and (rule or bits == 16):
            yield name[2:], bits


# -- fp8, awq ---------------------------------------------------------------------------------------------------------


def _fp8(declared: Mapping[str, object], tied: bool) -> tuple[Reader, ...]:
    listed = declared.get("modules_to_not_convert")
    skipped = list(_flat(listed)) if listed is not None else _default_skips(tied)
    ignored = list(_flat(declared.get("ignored_layers"))) or list(_flat(listed))
    names = set(ignored)

    def vllm(asked: Asked) -> bool:
        of_experts = bool(asked.experts) and any(asked.experts in name for name in ignored if "experts" in name)
        return asked.kind == "Linear" and not (asked.is_head or asked.name in names or of_experts)

    return _transformers_skips(skipped, of_experts=True), vllm


def _awq(declared: Mapping[str, object], tied: bool) -> tuple[Reader, ...]:
    listed = list(_flat(declared.get("modules_to_not_convert")))

    def vllm(asked: Asked) -> bool:
        return asked.kind == "Linear" and not (asked.is_head or any(part in asked.name for part in listed))

    return _transformers_skips([*_default_skips(tied), *listed], of_experts=False), vllm


def _default_skips(tied: bool) -> list[str]:
    """What transformers leaves out by itself: the head, and what it is tied to."""
    return [_LM_HEAD, "model.embed_tokens"] if tied else [_LM_HEAD]


def _transformers_skips(listed: Sequence[str], *, of_experts: bool) -> Reader:
    """Read a list of modules as transformers does: by the start of a name up to a dot, as a pattern, or as its end."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    patterns = [p for key in listed if (p := _compiled(rf"(?:{key}){boundary}"))]
    ends = tuple(listed)

    def quantizes(asked: Asked) -> bool:
        name = asked.whole if of_experts else asked.name
        return asked.kind == "Linear" and not (name.endswith(ends) or any(p.match(name) for p in patterns))

    return quantizes


# -- values of a stranger's -------------------------------------------------------------------------------------------


def _compiled(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return None


def _compiled_all(texts: Iterable[str]) -> list[re.Pattern[str]]:
    return [pattern for text in texts if (pattern := _compiled(text))]


def _flat(value: object) -> Iterator[str]:
    """Strings of a list, or of lists in it."""
    for item in value if isinstance(value, list) else ():
        yield from _flat(item) if isinstance(item, list) else (item,) if isinstance(item, str) else ()


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
