"""Quantized checkpoints, seen as the 16-bit ones that they stand for: what a config says is stored, and how.

Here are small floats, and integers beyond what `stored` knows. A rule says how one kind of such weights is stored; a
config may give several, since experts are often smaller than the rest. Which of them holds for a weight is told by its
own tensors; where two would read it differently it is refused. Bytes of them are copied, and values are rounded to what
a weight was read from; no config of such weights is made anew, but modules can be named in it that are in 16 bits from
now on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import CheckpointError, FamilyError, SchemeError
from shardxform.formats.affine import AffineRule
from shardxform.formats.asymmetric import IntegerRule, Order, StatedGrid, Zeros
from shardxform.formats.config_names import ASYMMETRIC, declared_in, method_of, undeclared
from shardxform.formats.encoding import Encoded
from shardxform.formats.fp8 import ScaleRule, scale_rule
from shardxform.formats.int8 import Int8Rule
from shardxform.formats.microscaling import MXFP4, MXFP8, NVFP4, Microscaled, MicroscalingRule, StackRule
from shardxform.formats.picking import Picked
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import GROUP_SIZES
from shardxform.model.families import family_of
from shardxform.model.layout import SCALES

__all__ = [
    "DECODED",
    "decoded",
    "decoded_in_part",
    "encoded_weights",
    "encodings_of",
    "is_packed",
    "is_read",
    "scan_decoded",
    "unreadable",
]

_BESIDE: Final = ("expert_dtype",)
"""What DeepSeek-V4's releases say at the top level of the config, and others in the quantization_config."""

_UNSAID: Final[Mapping[str, Mapping[str, str]]] = {"deepseek_v4": {"expert_dtype": "fp4"}}
"""What holds for a model type whose config does not say it: as its first releases, whose dtypes tell all the same."""

_UNUSED: Final = ("activation_scale", "input_scale", "input_global_scale", "qscale_act")
"""Scales of activations, which stand beside a weight and say nothing of it."""

_MODELOPT: Final = Microscaled(
    "E2M1", 16, "multiplied", ("weight", "weight_scale", "weight_scale_2"), ("U8", "F8_E4M3", "F32")
)
_DEEPSEEK_V4: Final = Microscaled("E2M1", 32, "", ("weight", "scale"), ("I8", "F8_E8M0"))


class Reading(Protocol):
    """How one kind of weight is stored."""

    def encoded(self, weight: TensorRef, tensors: Mapping[str, TensorRef]) -> Encoded | None:
        """The weight, or stack of them, whose codes are `weight`; None where it is not of this kind.

        Raises:
            CheckpointError: it is, and its other parts are missing or are none of it.

        """
        ...


Declared = Mapping[str, Any]


def _fp8_rules(declared: Declared) -> Iterator[Reading]:
    rule = scale_rule(declared)
    if rule is None:
        raise SchemeError(
            f"weight_block_size: expected two sizes of blocks, found {declared.get('weight_block_size')!r}"
        )
    yield replace(rule, names=("scale",)) if declared.get("expert_dtype") else rule
    if declared.get("expert_dtype") == "fp4":
        yield MicroscalingRule(_DEEPSEEK_V4)


def _modelopt_rules(_: Declared) -> Iterator[Reading]:
    yield MicroscalingRule(_MODELOPT)
    yield ScaleRule(("weight_scale",), ())


def _mxfp4_rules(_: Declared) -> Iterator[Reading]:
    yield StackRule()


def _mxfp8_rules(_: Declared) -> Iterator[Reading]:
    for suffix in SCALES:
        yield MicroscalingRule(replace(MXFP8, suffixes=("weight", suffix)))


def _compressed_rules(declared: Declared) -> Iterator[Reading]:
    """One rule for each group of floats; for integers one that knows their groups."""
    weights_of = [group.get("weights") for group in _groups(declared)]
    floats = [each for each in weights_of if isinstance(each, Mapping) and each.get("type") == "float"]
    if floats and len(floats) < len(weights_of):
        raise SchemeError("config_groups: floats beside integers, of which only the one or the other is read")
    if not floats and (plain := [group for group in _groups(declared) if _form(group, declared) == "int-quantized"]):
        yield from _plain_integers(plain, declared)
        return
    if not floats:
        yield from _compressed_integers(declared)
        return
    for group in _groups(declared):
        weights = group["weights"]
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if bits == 8 and size is None:
            rule = scale_rule({**declared, "config_groups": {"group": group}})
            if rule is None or rule.block is None:
                raise SchemeError(f"config_groups: strategy {weights.get('strategy')!r} of 8-bit floats is not read")
            yield rule
        elif (bits, size) in _SMALL:
            yield MicroscalingRule(_SMALL[bits, size])
        else:
            raise SchemeError(f"config_groups: floats of {bits} bits in groups of {size} are not read")


def _mlx_rules(declared: Declared) -> Iterator[Reading]:
    """One rule where biases are not determined by scales, as far as headers tell; `stored` reads the others."""
    if declared.get(ASYMMETRIC):
        if declared.get("mode") != "affine" or type(declared.get("bits")) is not int:
            raise SchemeError(f"mode {declared.get('mode')!r} of {declared.get('bits')!r} bits is not read")
        others = {path: own.get("bits") for path, own in declared.items() if isinstance(own, Mapping)}
        yield AffineRule(declared["bits"], {path: bits for path, bits in others.items() if type(bits) is int})


_SMALL: Final[Mapping[tuple[object, object], Microscaled]] = {(4, 32): MXFP4, (4, 16): NVFP4, (8, 32): MXFP8}


def _groups(declared: Declared) -> list[Mapping[str, Any]]:
    groups = declared.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


# -- integers ---------------------------------------------------------------------------------------------------------
# Where one symmetric scheme in usual groups holds for all weights, `stored` reads them, and there is no rule here.

_PACKINGS: Final[Mapping[str, tuple[Order, Zeros]]] = {
    "auto_round": ("gptq", "stored"),
    "auto_round:auto_awq": ("awq", "stored"),
    "auto_round:auto_gptq": ("gptq", "less one"),
    "auto_round:awq": ("awq", "stored"),
    "auto_round:gptq": ("gptq", "less one"),
    "auto_round:gptqmodel": ("gptq", "stored"),
}
_CHECKPOINTS: Final[Mapping[str, Zeros]] = {"gptq": "less one", "gptq_v2": "stored"}
_MOST_BITS: Final = 8

WidthOf = Callable[[str], StatedGrid | None]


def _awq_rules(declared: Declared) -> Iterator[Reading]:
    version = declared.get("version", declared.get("format", "gemm"))
    if str(version).lower() != "gemm" or declared.get("zero_point") is not True:
        found = f"version {version!r} with zero_point {declared.get('zero_point')!r}"
        raise SchemeError(f"version: expected 'gemm' with zero_point true, found {found}")
    width = _width(declared, {"bits": declared.get("bits", declared.get("w_bit"))})
    _refuse_wide(width)
    yield IntegerRule("awq", "stored", lambda _: width)


def _refuse_wide(width: StatedGrid) -> None:
    if width.bits != 4:
        raise SchemeError(f"bits: expected 4 in the order of AWQ, found {width.bits}")


def _gptq_rules(declared: Declared) -> Iterator[Reading]:
    form = str(declared.get("checkpoint_format") or declared.get("format") or "gptq")
    rules = [(name, item) for name, item in _object(declared, "dynamic").items() if isinstance(item, Mapping)]
    wider = [item for name, item in rules if name[:2] != "-:" and _differs(item, declared)]
    unusual = declared.get("sym") is False or declared.get("desc_act") is True or form == "gptq_v2" or wider
    if not unusual and declared.get("group_size") in GROUP_SIZES:
        return
    if form not in _CHECKPOINTS or declared.get("pack_dtype", "int32") != "int32":
        raise SchemeError(f"checkpoint_format {form!r} of {declared.get('pack_dtype', 'int32')} is not read")
    patterns = [(_compiled(re.sub(r"^[-+]:", "", name)), name[:2] != "-:", item) for name, item in rules]
    widths = [(pattern, _width(declared, item) if quantized else None) for pattern, quantized, item in patterns]
    usual = _width(declared)

    def width_of(module: str) -> StatedGrid | None:
        return next((width for pattern, width in widths if pattern.match(module)), usual)

    yield IntegerRule("gptq", _CHECKPOINTS[form], width_of)


def _auto_round_rules(declared: Declared) -> Iterator[Reading]:
    packing, extra = str(declared.get("packing_format")), _object(declared, "extra_config")
    items = {name: item for name, item in extra.items() if isinstance(item, Mapping)}
    wider = [item for item in items.values() if _is_narrow(item, declared) and _differs(item, declared)]
    usual_packing = _PACKINGS.get(packing) in (("gptq", "less one"), None)
    if usual_packing and declared.get("sym") is not False and not wider and declared.get("group_size") in GROUP_SIZES:
        return
    if packing not in _PACKINGS or declared.get("data_type") != "int":
        raise SchemeError(f"packing_format {packing!r} of data_type {declared.get('data_type')!r} is not read")
    order, zeros = _PACKINGS[packing]
    widths = {name: _width(declared, item) if _is_narrow(item, declared) else None for name, item in items.items()}
    patterns = [(_compiled(name), width) for name, width in widths.items()]
    usual = _width(declared)
    for width in (usual, *widths.values()) if order == "awq" else ():
        _refuse_wide(width or usual)

    def width_of(module: str) -> StatedGrid | None:
        if module in widths:
            return widths[module]
        return next((width for pattern, width in patterns if pattern.search(module)), usual)

    yield IntegerRule(order, zeros, width_of)


def _form(group: Declared, declared: Declared) -> object:
    return group.get("format") or declared.get("format")


def _plain_integers(groups: Sequence[Declared], declared: Declared) -> Iterator[Reading]:
    """Rules for bytes as they are, one for each way in which they share scales."""
    if len(groups) < len(_groups(declared)):
        raise SchemeError("config_groups: int-quantized beside other formats is not read")
    found: set[int] = set()
    for group in groups:
        weights = group.get("weights")
        said = weights if isinstance(weights, Mapping) else {}
        strategy, size = said.get("strategy"), said.get("group_size")
        usual = {"channel": -1, "tensor": 0, "group": size if type(size) is int and size > 0 else None}.get(
            str(strategy)
        )
        if said.get("num_bits") != 8 or said.get("symmetric") is False or usual is None:
            raise SchemeError(
                f"config_groups: int-quantized weights of {said.get('num_bits')} bits, strategy {strategy!r}, symmetric"
                f" {said.get('symmetric')} are not read; 8 bits without zero points are, by row, by group and whole"
            )
        found.add(usual)
    yield from (Int8Rule(size) for size in sorted(found))


def _compressed_integers(declared: Declared) -> Iterator[Reading]:
    weights = [(group, group["weights"]) for group in _groups(declared) if isinstance(group.get("weights"), Mapping)]
    if not any(each.get("type") == "int" for _, each in weights):
        return
    plain = [each.get("symmetric") and each.get("group_size") in (*GROUP_SIZES, None) for _, each in weights]
    if len(weights) == 1 and all(plain) and not any(each.get("actorder") for _, each in weights):
        return
    for key in ("transform_config", "sparsity_config"):
        if declared.get(key):
            raise SchemeError(f"{key} beside integers is not read")
    groups: list[tuple[list[str], StatedGrid]] = []
    for group, each in weights:
        form, strategy = _form(group, declared), each.get("strategy")
        if form != "pack-quantized" or strategy not in ("group", "channel"):
            raise SchemeError(f"config_groups: integers of format {form!r} and strategy {strategy!r} are not read")
        size = each.get("group_size") if strategy == "group" else -1
        said = {"bits": each.get("num_bits"), "group_size": size, "sym": each.get("symmetric")}
        targets = group.get("targets")
        names = targets if isinstance(targets, list) else []
        groups.append(([name for name in names if isinstance(name, str)], _width(said)))
    yield IntegerRule("row", "stored", _target_of(groups))


def _target_of(groups: list[tuple[list[str], StatedGrid]]) -> WidthOf:
    """Find the group of a module as compressed-tensors does: by its name, then by patterns, then by its class."""
    patterns = [(_compiled(name[3:]), width) for names, width in groups for name in names if name[:3] == "re:"]
    exact = {name: width for names, width in groups for name in names}

    def width_of(module: str) -> StatedGrid | None:
        if len(groups) == 1:
            return groups[0][1]
        if module in exact:
            return exact[module]
        return next((width for pattern, width in patterns if pattern.match(module)), exact.get("Linear"))

    return width_of


def _width(declared: Declared, also: Declared | None = None) -> StatedGrid:
    """Bits, group and zero points, of the whole or of what an entry says otherwise.

    Raises:
        SchemeError: they are none that are read.

    """
    said = {key: declared.get(key) for key in ("bits", "group_size", "sym")}
    said |= {key: value for key, value in (also or {}).items() if key in said and value is not None}
    bits, size = said["bits"], said["group_size"]
    if type(bits) is not int or bits not in (4, 8):
        raise SchemeError(f"bits: expected 4 or 8, found {bits!r}")
    if type(size) is not int or (size != -1 and size < 1):
        raise SchemeError(f"group_size: expected columns of a group, or -1 for a row, found {size!r}")
    return StatedGrid(bits, size, said["sym"] is not True)


def _differs(item: Declared, declared: Declared) -> bool:
    return any(item.get(key) not in (None, declared.get(key)) for key in ("bits", "group_size", "sym"))


def _is_narrow(item: Declared, declared: Declared) -> bool:
    """Whether an entry says that a module is quantized at all."""
    bits = item.get("bits", declared.get("bits"))
    return type(bits) is not int or bits <= _MOST_BITS


def _object(declared: Declared, key: str) -> Declared:
    value = declared.get(key)
    return value if isinstance(value, Mapping) else {}


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as e:
        raise SchemeError(f"{text!r} is no regular expression: {e}") from e


# -- the table --------------------------------------------------------------------------------------------------------


DECODED: Final[Mapping[str, Callable[[Declared], Iterator[Reading]]]] = {
    "auto-round": _auto_round_rules,
    "awq": _awq_rules,
    "compressed-tensors": _compressed_rules,
    "fbgemm_fp8": _fp8_rules,
    "fp8": _fp8_rules,
    "gptq": _gptq_rules,
    "mlx": _mlx_rules,
    "modelopt": _modelopt_rules,
    "modelopt_fp4": _modelopt_rules,
    "mxfp4": _mxfp4_rules,
    "mxfp8": _mxfp8_rules,
}
"""Methods whose weights are read to be decoded, and what reads their rules from a quantization_config."""


def is_packed(config: Mapping[str, object]) -> bool:
    """Whether a config declares weights of whose tensors a rule alone says which they are, and of what shapes."""
    try:
        return any(isinstance(rule, MicroscalingRule | StackRule | IntegerRule | Int8Rule) for rule in _rules(config))
    except SchemeError:
        return False


def is_read(config: Mapping[str, object]) -> bool:
    """Whether rules say how the weights of a config are stored."""
    try:
        return bool(_rules(config))
    except SchemeError:
        return False


def encodings_of(tensors: Iterable[TensorRef]) -> Counter[str]:
    """Count stored matrices by the name of their encoding, the most frequent first; those of plain numbers aside."""
    stored = (source.encoding for ref in tensors if isinstance(ref, Encoded) for source in ref.sources)
    counts = Counter(str(encoding) for encoding in stored if not isinstance(encoding, Picked | Plain))
    return Counter(dict(counts.most_common()))


def unreadable(config: Mapping[str, object]) -> str:
    """Why a quantization_config does not say how weights are stored; empty where it does, or there is none."""
    try:
        _rules(config)
    except SchemeError as e:
        return str(e)
    return ""


def scan_decoded(source: Checkpoint) -> tuple[Checkpoint, list[tuple[str, str]]]:
    """Give what `decoded` does, weights that are not stored as the config says left out; and these, with the reason.

    Raises:
        SchemeError: the config does not say how weights are stored.

    """
    rules, found, faults = _rules(source.config), dict[str, Encoded](), list[tuple[str, str]]()
    for name, ref in source.tensors.items():
        try:
            if weight := _weight(rules, ref, source.tensors):
                found[name] = weight
        except CheckpointError as e:
            faults.append((name, str(e)))
    faults += [(name, _twice(name, weight)) for name, weight in _doubles(source, found)]
    return _plain(source, found), faults


def decoded(source: Checkpoint) -> Checkpoint | None:
    """Give a checkpoint of weights that are only read, such as FP8 or AWQ, as the 16-bit one that they stand for.

    Its table has `Encoded` tensors in place of weights and their scales, and its config declares no quantization. None
    for any other checkpoint.

    Raises:
        CheckpointError: a weight is not stored as the config says.
        SchemeError: the config does not say how.

    """
    try:
        rules = _rules(source.config)
    except SchemeError as e:
        raise SchemeError(f"{source.where}/{CONFIG}: quantization_config.{e}") from e
    tensors = source.tensors if rules else {}
    found = {name: weight for name, ref in tensors.items() if (weight := _weight(rules, ref, tensors))}
    for name, weight in _doubles(source, found):
        raise CheckpointError(_twice(name, weight))
    return _plain(source, found) if found else None


def _doubles(source: Checkpoint, found: Mapping[str, Encoded]) -> Iterator[tuple[str, Encoded]]:
    """Weights that stand in the checkpoint under their own name too, beside their codes."""
    names = ((name, weight) for name, weight in found.items() if name != weight.name)
    yield from ((name, weight) for name, weight in names if weight.name in source.tensors)


def _twice(name: str, weight: Encoded) -> str:
    encoding = weight.sources[0].encoding
    return f"tensor '{weight.name}' is there as it is, and in {encoding} as '{name}': expected one of them"


def encoded_weights(source: Checkpoint) -> dict[str, Encoded]:
    """Weights that `decoded` gives, by the names of the tensors that hold their codes; raises like it."""
    rules = _rules(source.config)
    tensors = source.tensors if rules else {}
    return {name: weight for name, ref in tensors.items() if (weight := _weight(rules, ref, tensors))}


def decoded_in_part(
    source: Checkpoint,
    found: Mapping[str, Encoded],
    names: Collection[str],
    modules: Sequence[str],
    homes: Sequence[str],
) -> Checkpoint:
    """Give a quantized checkpoint with the weights `names` as values, and a config that says so.

    Args:
        source: the checkpoint.
        found: all quantized weights, by the names of the tensors that hold their codes.
        names: of weights.
        modules: linear ones among them, less routed experts.
        homes: modules of which routed experts are a part, all of which are among them.

    Raises:
        SchemeError: clients have no way to be told.

    """
    part = {name: weight for name, weight in found.items() if weight.name in names}
    plain = _plain(source, part)
    if not part or len(part) == len(found):
        return plain if part else source
    said = declared_in(source.config)
    if source.config.get("quantization_config") != said:
        raise SchemeError("the quantization is declared inside of config.json's parts, where it is not rewritten")
    beside = next((key for key in _BESIDE if key in {**source.config, **said}), "")
    if beside:
        raise SchemeError(f"clients read all routed experts as {beside} says, and some would be in 16 bits")
    declared = _sparing(said, modules, homes)
    return replace(plain, config={**source.config, "quantization_config": declared})


def _sparing(declared: Declared, modules: Sequence[str], homes: Sequence[str]) -> Declared:
    """A quantization_config that says of these modules that they are in 16 bits, as clients of its method read it.

    transformers and vLLM skip a module of experts by its own name, or what begins with it; where names must match as a
    whole, as in compressed-tensors, a pattern has those of single experts too.
    """
    method = str(declared.get("quant_method"))
    keys: tuple[str, ...]
    if method == "compressed-tensors":
        keys, entries = ("ignore",), [*modules, *(rf"re:(.*\.)?{_escaped(home)}(\..*)?$" for home in homes)]
    elif method.startswith("modelopt"):
        keys, entries = ("ignore", "exclude_modules"), [*modules, *(f"{home}*" for home in homes)]
    elif method == "gptq":
        rules = [f"-:{re.escape(module)}$" for module in modules] + [f"-:{re.escape(home)}\\..*" for home in homes]
        return {**declared, "dynamic": {**{rule: {} for rule in rules}, **_object(declared, "dynamic")}}
    elif method == "auto-round":
        wide = {"bits": 16, "data_type": "float"}
        names = [*modules, *(f"{re.escape(home)}\\..*" for home in homes)]
        return {**declared, "extra_config": {**_object(declared, "extra_config"), **dict.fromkeys(names, wide)}}
    else:
        keys, entries = ("modules_to_not_convert", "ignored_layers"), [*modules, *homes]
    there = [key for key in keys if declared.get(key)] or keys[:1]
    return {**declared, **{key: _with(declared.get(key) or [], entries) for key in there}}


def _with(listed: Sequence[object], entries: Iterable[str]) -> list[object]:
    """A list, and what is not in it."""
    return [*listed, *(entry for entry in dict.fromkeys(entries) if entry not in listed)]


def _escaped(home: str) -> str:
    """The name as a pattern; that of a language model in a larger one is turned round by vLLM."""
    either = r"(model\.language_model|language_model\.model)"
    return re.escape(home).replace(r"model\.language_model", either, 1)


def _plain(source: Checkpoint, found: Mapping[str, Encoded]) -> Checkpoint:
    """The checkpoint with weights in place of their codes; `found` has them by the names of these."""
    parts = {ref.spec.name for weight in found.values() for storage in weight.sources for _, ref in storage.parts}
    if any(name.endswith(_UNUSED) for name in source.tensors):
        parts |= {f"{weight.name.removesuffix('.weight')}.{last}" for weight in found.values() for last in _UNUSED}
        parts |= {f"{weight.name}_activation_scale" for weight in found.values()}
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        if weight := found.get(name):
            tensors[weight.spec.name] = weight
        elif name not in parts:
            tensors[name] = ref
    config = {key: value for key, value in undeclared(source.config).items() if key not in _BESIDE}
    return replace(source, tensors=tensors, config=config)


def _rules(config: Mapping[str, object]) -> list[Reading]:
    declared = declared_in(config)
    if not isinstance(declared, Mapping):
        return []
    read = DECODED.get(str(method_of(declared)))
    unsaid = _UNSAID.get(str(config.get("model_type")), {})
    beside = {**unsaid, **{key: config[key] for key in _BESIDE if key in config}}
    try:
        rules = list(read({**beside, **declared})) if read else []
    except (AttributeError, TypeError, ValueError) as e:
        raise SchemeError(f"malformed: {e}") from e
    if not any(isinstance(rule, ScaleRule) for rule in rules):
        return rules
    turned = _are_stacks_transposed(config)
    return [replace(rule, transposed=turned) if isinstance(rule, ScaleRule) else rule for rule in rules]


def _are_stacks_transposed(config: Mapping[str, object]) -> bool:
    """Whether stacks of the family hold matrices [I, O]; of one that is not known, whose layout is refused, no."""
    try:
        return family_of(config)[0].experts.transposed
    except FamilyError:
        return False


def _weight(rules: Sequence[Reading], ref: TensorRef, tensors: Mapping[str, TensorRef]) -> Encoded | None:
    """The one weight whose codes a tensor is; None for any other tensor.

    Raises:
        CheckpointError: no rule holds for what are codes by their dtype; or several do, and say different things.

    """
    if len(rules) == 1:
        return rules[0].encoded(ref, tensors)
    found: list[Encoded] = []
    errors: list[CheckpointError] = []
    for rule in rules:
        try:
            weight = rule.encoded(ref, tensors)
        except CheckpointError as e:
            errors.append(e)
            continue
        if weight and weight not in found:
            found.append(weight)
    if len(found) > 1:
        one, other = (weight.sources[0].encoding for weight in found[:2])
        raise CheckpointError(f"tensor '{ref.name}': the config has two readings of it: {one}, {other}")
    if not found and errors:
        raise errors[0]
    return found[0] if found else None
