"""Verification of quantization: what config.json declares against what the shards hold, module by module.

Names and dtypes, and how much of a row is stored where clients merge rows; other shapes are looked at in `parts`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from shardxform.checkpoint import CONFIG
from shardxform.dtypes import FLOATS
from shardxform.errors import SchemeError
from shardxform.families.base import Scope
from shardxform.layout import Layout, Place
from shardxform.modules import LINEAR_ROLES
from shardxform.quantization_config import Resolved, resolve
from shardxform.tensors import TensorRef
from shardxform.verification.findings import Findings, Item, place_of, spans

__all__ = ["check_quantization"]

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
}
_STORED_AS: Final = {"auto-round": "gptq", "gptq": "gptq", "compressed-tensors": "compressed-tensors"}
_PACKINGS: Final = ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:llm_compressor")  # vLLM's list
_FLOAT_ROLES: Final = frozenset({"router", "embeddings", "norms"})
_FLOAT_MODULES: Final = ("*conv1d", "*shared_expert_gate", "*.A_log", "*.dt_bias")
_SPECIAL: Final = re.compile(r"[*+?^$()\[\]{}|\\]")  # without one of these, a name in extra_config is no pattern

_Block = tuple[Scope, int]


@dataclass(frozen=True, slots=True)
class _Module:
    """A weight without its last name part, and how it is stored: 16-bit, gptq, compressed-tensors or a dtype.

    `linear` is for 2-D weights of decoder blocks that clients run quantized unless the config leaves them out.
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

    def is_expert_of(self, blocks: Set[_Block]) -> bool:
        """Whether it belongs to a routed expert of one of `blocks`."""
        return bool(self.place.template.variant) and (self.place.scope, self.place.layer) in blocks


def check_quantization(layout: Layout, tensors: Mapping[str, TensorRef], findings: Findings) -> None:
    """Report contradictions between `quantization_config` and the kinds of tensors, and between merged modules."""
    modules = list(_modules(layout, tensors))
    declared = layout.config.get("quantization_config") or layout.text.get("quantization_config")
    _check_float(layout, modules, findings)
    mixed = _check_merged(layout, modules, findings)
    if declared in (None, {}):
        _check_undeclared(modules, findings)
    elif not isinstance(declared, Mapping):
        findings.problem("quantization-config", CONFIG, f"quantization_config: expected an object, found {declared!r}")
    else:
        _check_config(layout, declared, findings)
        _check_declared(layout, declared, [m for m in modules if not m.is_expert_of(mixed)], findings)


def _modules(layout: Layout, tensors: Mapping[str, TensorRef]) -> Iterator[_Module]:
    found: dict[str, _Module] = {}
    for name, place in layout.places.items():
        stem = name.removesuffix(place.companion or "weight").removesuffix(".")
        if not place.companion:
            dtype = tensors[name].spec.dtype
            linear = place.scope == "block" and place.template.role in LINEAR_ROLES and name.endswith(".weight")
            linear = linear and len(tensors[name].spec.shape) == 2
            found.setdefault(stem, _Module(stem, name, place, _PLAIN if dtype in FLOATS else dtype, linear))
        elif (kind := _KINDS.get(place.companion)) and (
            stem not in found or found[stem].kind not in _STORED_AS.values()
        ):
            found[stem] = _Module(stem, name, place, kind, linear=True)
    return iter(found.values())


def _check_float(layout: Layout, modules: Sequence[_Module], findings: Findings) -> None:
    """Routers, embeddings, norms, convolutions and the family's own exceptions: no client runs them quantized."""
    patterns = (*layout.family.keep_16bit, *_FLOAT_MODULES)
    items = [
        Item("quantized", m.tensor, m.place, f"stored as {m.kind}, but clients need it in 16 bits")
        for m in modules
        if m.kind != _PLAIN
        and (m.place.template.role in _FLOAT_ROLES or any(fnmatchcase(m.local, pattern) for pattern in patterns))
    ]
    findings.items(items, layout.num_experts)


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


def _check_config(layout: Layout, declared: Mapping[str, Any], findings: Findings) -> None:
    def report(message: str) -> None:
        findings.problem("quantization-config", CONFIG, f"quantization_config.{message}")

    method = declared.get("quant_method")
    if not isinstance(method, str):
        report("quant_method: missing" if method is None else f"quant_method: expected a name, found {method!r}")
        return
    for key in _REQUIRED.get(method, ()):
        if declared.get(key) is None:
            report(f"{key}: missing; clients of {method} refuse to start without it")
    bits, packing = declared.get("bits"), declared.get("packing_format")
    if method == "gptq" and declared.get("sym") is False:
        report(f"sym: false, which vLLM and SGLang refuse for experts (bits={bits}, sym=False)")
    if method == "auto-round" and packing is not None and packing not in _PACKINGS:
        report(f"packing_format: {packing!r}, clients take {' or '.join(_PACKINGS)}")
    blocks = _blocks(declared)
    here = layout.wrapper.prefix + "layers"
    if method == "auto-round" and blocks and here not in blocks:
        report(f"block_name_to_quantize: {', '.join(blocks)}; without {here} clients take everything for 16-bit")


def _check_declared(
    layout: Layout, declared: Mapping[str, Any], modules: Sequence[_Module], findings: Findings
) -> None:
    """Hold linear modules, and whatever is stored quantized, against what the config says of them.

    A module that is stored plain is left out when any client takes it so: names in `extra_config` and `ignore` cover
    what is below them for some, and patterns may have to match all of a name or a part of it.
    """
    method = str(declared.get("quant_method"))
    left_out = _resolver(declared)
    strict = _as_clients_read(declared)
    decided: dict[tuple[Scope, int | None, str, str], tuple[bool, int | None]] = {}
    items: list[Item] = []
    for m in modules:
        key = (m.place.scope, m.place.layer, m.local, m.kind)
        if key not in decided:  # experts of a layer have one scheme: a look at the first is enough
            decided[key] = left_out(m.name), strict.bits_of(m.name) if strict else None
        plain, bits = decided[key]
        if m.kind == _PLAIN and not plain and (m.place.template.variant or (m.linear and bits not in (None, 16))):
            detail = f"stored in 16 bits, but config.json declares it quantized ({method})"
            items.append(Item("not-quantized", m.tensor, m.place, detail))
        elif m.kind != _PLAIN and (plain or bits == 16):
            detail = f"stored as {m.kind}, but config.json declares it 16-bit"
            items.append(Item("undeclared", m.tensor, m.place, detail))
        elif m.kind in _STORED_AS.values() and _STORED_AS.get(method, m.kind) != m.kind:
            detail = f"stored as {m.kind}, but config.json declares {method}"
            items.append(Item("quantization-kind", m.tensor, m.place, detail))
    findings.items(items, layout.num_experts)


def _as_clients_read(declared: Mapping[str, Any]) -> Resolved | None:
    """The reading that all clients share; None for other methods, and for what some of them refuse."""
    try:
        return resolve(declared)
    except (SchemeError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None


def _resolver(declared: Mapping[str, Any]) -> Callable[[str], bool]:
    """A predicate: whether `quantization_config` leaves a module in 16 bits."""
    names = set(_plain_names(declared))
    quantized = {name for name, bits in _extra_bits(declared) if bits < 16}
    patterns: list[Callable[[str], object]] = []
    for text, anchored in _patterns(declared):
        try:
            pattern = re.compile(text)
        except (re.error, OverflowError, RecursionError):
            continue
        patterns.append(pattern.match if anchored else pattern.search)
    blocks = _blocks(declared) if declared.get("quant_method") == "auto-round" else []

    def left_out(module: str) -> bool:
        if module in quantized:
            return False
        if blocks and not any(block in module for block in blocks):
            return True
        parts = module.split(".")
        homes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return any(home in names for home in homes) or any(pattern(module) for pattern in patterns)

    return left_out


def _plain_names(declared: Mapping[str, Any]) -> Iterator[str]:
    """Modules that are left out by their names."""
    yield from (name for name, bits in _extra_bits(declared) if bits >= 16 and not _SPECIAL.search(name))
    yield from (name for name in _ignored(declared) if not name.startswith("re:"))


def _patterns(declared: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Patterns of modules that are left out, each with whether it must match from the start."""
    yield from ((name, False) for name, bits in _extra_bits(declared) if bits >= 16 and _SPECIAL.search(name))
    yield from ((name[2:], True) for name in _mapping(declared.get("dynamic")) if name.startswith("-:"))
    yield from ((name[3:], True) for name in _ignored(declared) if name.startswith("re:"))


def _extra_bits(declared: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Names and patterns in auto-round's `extra_config`, with the width that they say."""
    for name, scheme in _mapping(declared.get("extra_config")).items():
        bits = scheme.get("bits") if isinstance(scheme, Mapping) else None
        if type(bits) is int:
            yield name, bits


def _ignored(declared: Mapping[str, Any]) -> Iterator[str]:
    for key in ("ignore", "modules_to_not_convert", "ignored_layers"):
        listed = declared.get(key)
        yield from (name for name in (listed if isinstance(listed, list) else ()) if isinstance(name, str))


def _blocks(declared: Mapping[str, Any]) -> list[str]:
    value = declared.get("block_name_to_quantize")
    listed = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [name.strip() for name in listed if isinstance(name, str) and name.strip()]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
