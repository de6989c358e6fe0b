"""Verification of FP8 as releases store it: every such weight has its scales, of the shape and type that clients read.

Names, dtypes and shapes only, by the rule of `formats.fp8`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from shardxform.base.tensors import FLOATS, TensorRef
from shardxform.formats.fp8 import FP8, SCALES, ScaleRule, scale_rule
from shardxform.model.layout import Layout
from shardxform.verification.findings import Findings, Item

__all__ = ["check_scales"]


def check_scales(layout: Layout, tensors: Mapping[str, TensorRef], findings: Findings) -> None:
    """Report FP8 weights without scales, scales of another shape or type, and scales beside 16-bit weights."""
    declared = layout.config.get("quantization_config")
    rule = scale_rule(declared if isinstance(declared, Mapping) else {})
    if isinstance(declared, Mapping) and rule is None:
        text = f"weight_block_size: expected two sizes of blocks, found {declared.get('weight_block_size')!r}"
        findings.problem("quantization-config", "config.json", f"quantization_config.{text}")
    rule = rule or ScaleRule(SCALES, None)
    findings.items([*_of_weights(layout, tensors, rule), *_alone(layout, tensors)], layout.num_experts)


def _of_weights(layout: Layout, tensors: Mapping[str, TensorRef], rule: ScaleRule) -> Iterator[Item]:
    for name, place in layout.places.items():
        spec = tensors[name].spec
        if place.companion or spec.dtype not in FP8:
            continue
        stem = name.removesuffix("weight")
        stored = next((last for last in SCALES if stem + last in tensors), None)
        last = stored if stored in rule.names else rule.names[0]
        if stem + last not in tensors:
            found = f", and clients do not read {stored}" if stored else ""
            detail = f"missing: its weight is {spec.dtype}, which means nothing without its scales{found}"
            yield Item("scale", stem + last, replace(place, companion=last), detail)
        elif wrong := rule.fault(tensors[stem + last].spec, spec.shape):
            yield Item("scale", stem + last, replace(place, companion=last), wrong)


def _alone(layout: Layout, tensors: Mapping[str, TensorRef]) -> Iterator[Item]:
    """Scales whose weight needs none: half of a conversion."""
    for name, place in layout.places.items():
        if place.companion not in (*SCALES, "input_scale"):
            continue
        weight = tensors.get(name.removesuffix(place.companion) + "weight")
        if weight is not None and weight.spec.dtype in FLOATS:
            yield Item("scale", name, place, f"a scale beside a weight that is {weight.spec.dtype} and needs none")
