"""What a quantization_config says against itself, and against the shapes of what is stored.

A loader takes a weight's bits, groups and type from the config alone, so one wrong number there is a wrong model that
loads. Formats of compressed-tensors are those of its `CompressionFormat`; what each holds is that of its presets.
"""

# O: output channels, I: input channels, W: words of a row, G: scales of a row.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from shardxform.base.tensors import FP8, TensorRef
from shardxform.errors import FamilyError
from shardxform.formats.config_names import method_of
from shardxform.model.expected import expected
from shardxform.model.layout import Layout, layout_of, variants_found

__all__ = ["faults_of_words", "said_against_itself", "stored_against_algorithm"]

Declared = Mapping[str, object]


class _Form(NamedTuple):
    """What a format holds: the type of its codes, their bits, strategies, and columns of a group; empty for any."""

    type: str = ""
    bits: tuple[int, ...] = ()
    strategies: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


_FORMS: Final[Mapping[str, _Form]] = {
    "dense": _Form(),
    "float-quantized": _Form("float", (8,), ("tensor", "channel", "block", "group")),
    "int-quantized": _Form("int", (8,), ("tensor", "channel", "group", "block")),
    "marlin-24": _Form("int", (4, 8), ("group", "channel")),
    "mixed-precision": _Form(),
    "mxfp4-pack-quantized": _Form("float", (4,), ("group",), (32,)),
    "mxfp6-pack-quantized": _Form("float", (6,), ("group",), (32,)),
    "mxfp8-quantized": _Form("float", (8,), ("group",), (32,)),
    "naive-quantized": _Form("", (8,)),
    "nvfp4-pack-quantized": _Form("float", (4,), ("tensor_group",), (16,)),
    "pack-quantized": _Form("int", (2, 3, 4, 5, 6, 7, 8), ("group", "channel", "tensor")),
    "sparse-24-bitmask": _Form(),
    "sparse-bitmask": _Form(),
}
_TYPES: Final[Mapping[str, type]] = {
    "bits": int,
    "desc_act": bool,
    "group_size": int,
    "sym": bool,
    "w_bit": int,
    "zero_point": bool,
}
_OF_INTEGERS: Final = ("auto-round", "awq", "gptq")
_GROUPED: Final = ("group", "tensor_group")
_MOST_BITS: Final = 8
_ALGORITHMS: Final[Mapping[str, frozenset[str]]] = {
    "FP8": FP8,
    "FP8_PB_WO": FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8,
    "MXFP8": FP8,
    "NVFP4": frozenset({"U8"}),
    "NVFP4_AWQ": frozenset({"U8"}),
}


def said_against_itself(declared: Declared) -> Iterator[str]:
    """Say what of a config is of no type that a loader takes, is a format that is none, or one of no such weights."""
    for key, kind in _TYPES.items():
        found = declared.get(key)
        if method_of(declared) in _OF_INTEGERS and found is not None and type(found) is not kind:
            yield f"{key}: expected {'true or false' if kind is bool else 'a whole number'}, found {found!r}"
    for key in ("extra_config", "dynamic"):
        if declared.get(key) is not None and not isinstance(declared[key], Mapping):
            yield f"{key}: expected an object, found {declared[key]!r}"
    groups, top = declared.get("config_groups"), declared.get("format")
    if method_of(declared) != "compressed-tensors" or not isinstance(groups, Mapping):
        return
    if top is not None and not (isinstance(top, str) and top in _FORMS):
        yield f"format: {top!r} is no format of compressed-tensors"
        return
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            if weights is not None:
                yield f"config_groups.{name}.weights: expected an object, found {weights!r}"
            continue
        form = group.get("format") or top
        if not (isinstance(form, str) and form in _FORMS):
            yield f"config_groups.{name}.format: {form!r} is no format of compressed-tensors"
        else:
            yield from (f"config_groups.{name}.weights.{fault}" for fault in _of_group(form, weights))


def _of_group(form: str, weights: Declared) -> Iterator[str]:
    """Say which of a group's numbers its format cannot hold."""
    holds, kind, strategy, size = _FORMS[form], *(weights.get(key) for key in ("type", "strategy", "group_size"))
    told: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("type", kind, (holds.type,) if holds.type else ()),
        ("num_bits", weights.get("num_bits"), holds.bits),
        ("strategy", strategy, holds.strategies),
        ("group_size", size, holds.sizes),
    )
    for key, found, wanted in told:
        if wanted and found is None and key in ("type", "num_bits"):
            yield f"{key}: missing; {form} has {' or '.join(str(each) for each in wanted)}"
        elif wanted and found is not None and found not in wanted:
            yield f"{key}: {found!r}, but {form} has {' or '.join(str(each) for each in wanted)}"
    if kind == "float" and weights.get("symmetric") is False:
        yield "symmetric: false, but floats have no zero points"
    grouped = type(size) is int and size > 0
    if strategy in _GROUPED and size is not None and not grouped:
        yield f"group_size: {size!r}, but strategy is {strategy!r}"
    if strategy in ("channel", "tensor", "block") and grouped:
        yield f"strategy: {strategy!r}, but group_size is {size}"


def stored_against_algorithm(declared: Declared, tensors: Mapping[str, TensorRef]) -> Iterator[str]:
    """Say that what ModelOpt's config calls the algorithm has other codes than those that are stored, or is none."""
    name = declared.get("quant_algo")
    if not str(method_of(declared)).startswith("modelopt") or not isinstance(name, str):
        return
    wanted = _ALGORITHMS.get(name)
    codes = {ref.spec.dtype for at, ref in tensors.items() if f"{at}_scale" in tensors}
    if wanted and codes and not codes <= wanted:
        yield f"quant_algo: {name}, but codes are stored as {', '.join(sorted(codes - wanted))}"


# -- words of integers ------------------------------------------------------------------------------------------------


def faults_of_words(declared: Declared, layout: Layout, tensors: Mapping[str, TensorRef]) -> Iterator[tuple[str, str]]:
    """Say which words of integers hold other bits or groups than the one scheme of a config: tensor, and what.

    For schemes that are not read, whose shapes nobody else looks at.
    """
    said = _scheme(declared)
    stems = [name.rpartition(".")[0] for name in tensors if name.endswith((".weight_packed", ".qweight"))]
    if said is None or not stems:
        return
    plain = [name for name in tensors if name.rpartition(".")[0] not in set(stems)]
    try:
        whole = layout_of(layout.config, [*(f"{stem}.weight" for stem in stems), *plain])
        shapes = {name: item.shape for name, item in expected(whole, variants_found(whole))}
    except (FamilyError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return
    for stem in stems:
        shape = shapes.get(f"{stem}.weight")
        if shape and len(shape) == 2 and (found := _against(stem, shape, said, tensors)):
            yield found


def _scheme(declared: Declared) -> tuple[int, int] | None:
    """Bits and columns of a group, -1 for a row, where they hold for all weights."""
    if method_of(declared) == "compressed-tensors":
        groups = declared.get("config_groups")
        if not isinstance(groups, Mapping) or len(groups) != 1:
            return None
        group = next(iter(groups.values()))
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return None
        bits, size = weights.get("num_bits"), weights.get("group_size")
        size = size if weights.get("strategy") == "group" else -1
    else:
        if declared.get("extra_config") or declared.get("dynamic"):
            usual = [declared.get(key) for key in ("bits", "group_size")]
            return (usual[0], 0) if type(usual[0]) is int and _has_one_width(declared) else None
        bits, size = declared.get("bits"), declared.get("group_size")
    return (bits, size) if type(bits) is int and 0 < bits <= _MOST_BITS and type(size) is int else None


def _has_one_width(declared: Declared) -> bool:
    """Whether entries for single modules say nothing of bits but that these are not quantized."""
    entries = [declared.get(key) for key in ("extra_config", "dynamic")]
    items = [item for each in entries if isinstance(each, Mapping) for item in each.values()]
    widths = [item.get("bits") for item in items if isinstance(item, Mapping)]
    return all(bits is None or (type(bits) is int and bits > _MOST_BITS) for bits in widths)


def _against(
    stem: str, shape: tuple[int, ...], said: tuple[int, int], tensors: Mapping[str, TensorRef]
) -> tuple[str, str] | None:
    """Hold words and scales of one weight [O, I] against bits and groups."""
    (bits, size), columns = said, shape[1]
    row = f"{stem}.weight_packed" in tensors
    name = f"{stem}.{'weight_packed' if row else 'qweight'}"
    words, scales = tensors[name].spec, tensors.get(f"{stem}.{'weight_scale' if row else 'scales'}")
    if len(words.shape) != 2:
        return None
    across = words.shape[1 if row else 0]  # AWQ's run along the other side, where a row has as many as columns
    if not row and across == columns:
        across, columns = words.shape[1], shape[0]
    width = next((b for b in range(2, _MOST_BITS + 1) if across == _words(columns, b, row=row)), None)
    if across != _words(columns, bits, row=row) and width is not None:
        return name, f"{across} words for {columns} codes, as of {width} bits; the config says {bits}"
    if scales is None or len(scales.spec.shape) != 2 or not size:
        return None
    found, wanted = scales.spec.shape[1 if row else 0], 1 if size == -1 else math.ceil(shape[1] / size)
    if found != wanted:
        group = "one a row" if size == -1 else f"groups of {size}"
        return scales.name, f"{found} scales a row of {shape[1]}, expected {wanted}: the config says {group}"
    return None


def _words(codes: int, bits: int, *, row: bool) -> int:
    """Words of so many codes: compressed-tensors has no code in two words, GPTQ wastes no bit."""
    return math.ceil(codes / (32 // bits)) if row else math.ceil(codes * bits / 32)
