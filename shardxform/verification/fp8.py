"""Verification of FP8 as releases store it: every such weight has its scales, of the shape and type that clients read.

Names, dtypes and shapes only. The scales of a block-wise weight `[O, I]` are `[ceil(O / rows), ceil(I / columns)]`: the
last blocks may be partial (DeepSeek-V3's `kv_a_proj_with_mqa` has 576 rows in blocks of 128).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from shardxform.base.tensors import FLOATS, TensorRef, TensorSpec
from shardxform.model.layout import Layout
from shardxform.verification.findings import Findings, Item

__all__ = ["FP8", "check_scales"]

FP8: Final = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""Dtypes of weights that mean nothing without a scale."""

_SCALES: Final = ("weight_scale_inv", "weight_scale")
_SCALE_DTYPES: Final = frozenset({"F32", "BF16", "F16"})
_POWER_DTYPES: Final = frozenset({"F8_E8M0", "U8"})  # powers of two, where the config says ue8m0

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Rule:
    """How the scales of a weight are stored: `name`s that clients read, and dtypes.

    `block` is rows and columns of a block, empty for one scale a weight or, with `rows`, one a row; None where the
    config does not say.
    """

    names: tuple[str, ...]
    block: tuple[int, ...] | None
    rows: bool = False
    dtypes: frozenset[str] = _SCALE_DTYPES

    def shapes(self, weight: Shape) -> tuple[Shape, ...] | None:
        """Shapes that the scales of a weight may have; None for any."""
        if self.block is None or len(weight) < 2:
            return None
        *stacked, rows, columns = weight
        if self.block:
            return ((*stacked, -(-rows // self.block[0]), -(-columns // self.block[1])),)
        if self.rows:
            return (*stacked, rows, 1), (*stacked, rows)
        return (tuple(stacked), (*stacked, 1), (*stacked, 1, 1))


def check_scales(layout: Layout, tensors: Mapping[str, TensorRef], findings: Findings) -> None:
    """Report FP8 weights without scales, scales of another shape or type, and scales beside 16-bit weights."""
    declared = layout.config.get("quantization_config")
    rule = _rule(declared if isinstance(declared, Mapping) else {})
    if isinstance(declared, Mapping) and rule is None:
        text = f"weight_block_size: expected two sizes of blocks, found {declared.get('weight_block_size')!r}"
        findings.problem("quantization-config", "config.json", f"quantization_config.{text}")
    rule = rule or _Rule(_SCALES, None)
    findings.items([*_of_weights(layout, tensors, rule), *_alone(layout, tensors)], layout.num_experts)


def _rule(declared: Mapping[str, Any]) -> _Rule | None:
    """Read how scales are stored; None for blocks that are none."""
    method = declared.get("quant_method")
    if method == "fp8":
        block = declared.get("weight_block_size")
        power = declared.get("scale_fmt") == "ue8m0"
        dtypes = _SCALE_DTYPES | _POWER_DTYPES if power else _SCALE_DTYPES
        if block is None:
            return _Rule(_SCALES, (), dtypes=dtypes)
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            return _Rule(_SCALES[:1], tuple(block), dtypes=dtypes)
        return None
    if method == "fbgemm_fp8":
        return _Rule(_SCALES[1:], (), rows=True)
    if method == "compressed-tensors":
        return _Rule(_SCALES[1:], *_of_groups(declared.get("config_groups")))
    return _Rule(_SCALES, None)


def _of_groups(groups: object) -> tuple[tuple[int, ...] | None, bool]:
    """Blocks, and whether there is a scale a row, where all groups of compressed-tensors agree on it."""
    listed = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") for group in listed if isinstance(group, Mapping)]
    kinds = {(w.get("strategy"), tuple(w.get("block_structure") or ())) for w in weights if isinstance(w, Mapping)}
    if len(kinds) != 1:
        return None, False
    strategy, block = kinds.pop()
    if strategy == "block":
        return (block if len(block) == 2 and all(type(n) is int and n > 0 for n in block) else None), False
    return (() if strategy in ("tensor", "channel") else None), strategy == "channel"


def _of_weights(layout: Layout, tensors: Mapping[str, TensorRef], rule: _Rule) -> Iterator[Item]:
    for name, place in layout.places.items():
        spec = tensors[name].spec
        if place.companion or spec.dtype not in FP8:
            continue
        stem = name.removesuffix("weight")
        stored = next((last for last in _SCALES if stem + last in tensors), None)
        last = stored if stored in rule.names else rule.names[0]
        if stem + last not in tensors:
            found = f", and clients do not read {stored}" if stored else ""
            detail = f"missing: its weight is {spec.dtype}, which means nothing without its scales{found}"
            yield Item("scale", stem + last, replace(place, companion=last), detail)
        elif wrong := _fault(tensors[stem + last].spec, spec.shape, rule):
            yield Item("scale", stem + last, replace(place, companion=last), wrong)


def _fault(scale: TensorSpec, weight: Shape, rule: _Rule) -> str:
    if scale.dtype not in rule.dtypes:
        return f"{scale.dtype}, expected {' or '.join(sorted(rule.dtypes))} for the scales of an FP8 weight"
    shapes = rule.shapes(weight)
    if shapes is None or scale.shape in shapes:
        return ""
    blocks = f" in blocks of {list(rule.block)}" if rule.block else ""
    return f"shape {list(scale.shape)}, expected {list(shapes[0])} for a weight {list(weight)}{blocks}"


def _alone(layout: Layout, tensors: Mapping[str, TensorRef]) -> Iterator[Item]:
    """Scales whose weight needs none: half of a conversion."""
    for name, place in layout.places.items():
        if place.companion not in (*_SCALES, "input_scale"):
            continue
        weight = tensors.get(name.removesuffix(place.companion) + "weight")
        if weight is not None and weight.spec.dtype in FLOATS:
            yield Item("scale", name, place, f"a scale beside a weight that is {weight.spec.dtype} and needs none")
