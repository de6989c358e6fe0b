"""Checkpoints in small floats, seen as the 16-bit ones that they stand for: what a config says is stored, and how.

A rule says how one kind of such weights is stored; a config may give several, since experts are often smaller than the
rest. Which of them holds for a weight is told by its own tensors; where two would read it differently it is refused.
Bytes of them are copied, and values are rounded to what a weight was read from; no config of such weights is made anew,
but modules can be named in it that are in 16 bits from now on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import CheckpointError, SchemeError
from shardxform.formats.affine import AffineRule
from shardxform.formats.dialects import ASYMMETRIC, method_of
from shardxform.formats.encoding import Encoded
from shardxform.formats.fp8 import SCALES, ScaleRule, scale_rule
from shardxform.formats.microscaling import MXFP4, MXFP8, NVFP4, Microscaled, MicroscalingRule, StackRule

__all__ = ["DECODED", "decoded", "decoded_in_part", "is_microscaled", "scan_decoded", "unreadable"]

_BESIDE: Final = ("expert_dtype",)
"""What DeepSeek-V4's releases say at the top level of the config, and others in the quantization_config."""

_UNUSED: Final = ("input_scale", "input_global_scale")
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
    """One rule for each group of floats; none where all groups are integers, which `stored` reads."""
    weights_of = [group.get("weights") for group in _groups(declared)]
    floats = [each for each in weights_of if isinstance(each, Mapping) and each.get("type") == "float"]
    if floats and len(floats) < len(weights_of):
        raise SchemeError("config_groups: floats beside integers, of which only the one or the other is read")
    for group in _groups(declared) if floats else ():
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


DECODED: Final[Mapping[str, Callable[[Declared], Iterator[Reading]]]] = {
    "compressed-tensors": _compressed_rules,
    "fbgemm_fp8": _fp8_rules,
    "fp8": _fp8_rules,
    "mlx": _mlx_rules,
    "modelopt": _modelopt_rules,
    "modelopt_fp4": _modelopt_rules,
    "mxfp4": _mxfp4_rules,
    "mxfp8": _mxfp8_rules,
}
"""Methods whose weights are read to be decoded, and what reads their rules from a quantization_config."""


def is_microscaled(config: Mapping[str, Any]) -> bool:
    """Whether a config declares weights with scales for blocks along their rows."""
    try:
        return any(isinstance(rule, MicroscalingRule | StackRule) for rule in _rules(config))
    except SchemeError:
        return False


def unreadable(config: Mapping[str, Any]) -> str:
    """Why a quantization_config does not say how its small floats are stored; empty where it does, or has none."""
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
    return _plain(source, found), faults


def decoded(source: Checkpoint) -> Checkpoint | None:
    """Give a checkpoint of weights that are only read, such as FP8, as the 16-bit one that they stand for.

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
    return _plain(source, found) if found else None


def decoded_in_part(
    source: Checkpoint, names: Collection[str], modules: Sequence[str], homes: Sequence[str]
) -> Checkpoint:
    """Give a checkpoint of small floats with the weights `names` as `decoded` has them, and a config that says so.

    Args:
        source: the checkpoint.
        names: of weights, as `decoded` calls them.
        modules: linear ones among them, less routed experts.
        homes: modules of which routed experts are a part, all of which are among them.

    Raises:
        SchemeError: clients have no way to be told.

    """
    rules = _rules(source.config)
    found = {name: weight for name, ref in source.tensors.items() if (weight := _weight(rules, ref, source.tensors))}
    part = {name: weight for name, weight in found.items() if weight.name in names}
    plain = _plain(source, part)
    if not part or len(part) == len(found):
        return plain if part else source
    beside = next((key for key in _BESIDE if key in {**source.config, **source.config["quantization_config"]}), "")
    if beside:
        raise SchemeError(f"clients read all routed experts as {beside} says, and some would be in 16 bits")
    declared = _sparing(source.config["quantization_config"], modules, homes)
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
    else:
        keys, entries = ("modules_to_not_convert", "ignored_layers"), [*modules, *homes]
    there = [key for key in keys if declared.get(key)] or keys[:1]
    return {**declared, **{key: list(dict.fromkeys((*(declared.get(key) or ()), *entries))) for key in there}}


def _escaped(home: str) -> str:
    """The name as a pattern; that of a language model in a larger one is turned round by vLLM."""
    either = r"(model\.language_model|language_model\.model)"
    return re.escape(home).replace(r"model\.language_model", either, 1)


def _plain(source: Checkpoint, found: Mapping[str, Encoded]) -> Checkpoint:
    """The checkpoint with weights in place of their codes; `found` has them by the names of these."""
    parts = {ref.spec.name for weight in found.values() for storage in weight.sources for _, ref in storage.parts}
    if any(name.endswith(_UNUSED) for name in source.tensors):
        parts |= {f"{weight.name.removesuffix('.weight')}.{last}" for weight in found.values() for last in _UNUSED}
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        if weight := found.get(name):
            tensors[weight.spec.name] = weight
        elif name not in parts:
            tensors[name] = ref
    config = {key: value for key, value in source.config.items() if key not in ("quantization_config", *_BESIDE)}
    return replace(source, tensors=tensors, config=config)


def _rules(config: Mapping[str, Any]) -> list[Reading]:
    declared = config.get("quantization_config")
    if not isinstance(declared, Mapping):
        return []
    read = DECODED.get(str(method_of(declared)))
    beside = {key: config[key] for key in _BESIDE if key in config}
    return list(read({**beside, **declared})) if read else []


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
