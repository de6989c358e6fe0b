"""Tensors that the family does not know, by what their names look like: those that must not be copied unseen.

A tensor that belongs to no expert and no router means the same in an output, so it is copied and reported. One that
looks like a part of an expert or a router, or of a quantized weight, might have to be sliced, renumbered or converted:
it is refused before anything is written, and makes a checkpoint unsound.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from shardxform.base.tensors import TensorRef
from shardxform.errors import PlanError
from shardxform.model.layout import Layout

__all__ = ["looks_like", "refuse_strays"]

_ROUTER: Final = re.compile(r"(^|\.)(gate|moe_gate|moe_statics)(\.|$)|router|correction_bias")
_PART: Final = re.compile(r"scale|zero|g_idx|qweight|packed|absmax|quant|_shape$|_codebook|lora_")
_OF_CACHE: Final = frozenset({"k_scale", "kv_scale", "output_scale", "q_scale", "v_scale"})  # of keys and values


def looks_like(layout: Layout, name: str) -> str:
    """Say what a tensor that the family does not know looks like; empty for nothing that must be understood."""
    vision = layout.family.vision_prefix
    if vision and name.startswith(vision):
        return ""
    if "expert" in name:
        return "a part of experts"
    if _ROUTER.search(name):
        return "a part of a router"
    stem, _, last = name.rpartition(".")
    known = any(f"{each}.weight" in layout.places or each in layout.places for each in _owners(name))
    if last not in _OF_CACHE and _PART.search(last) and (known or _is_quantized(layout, stem)):
        return "a part of a quantized weight"
    return ""


def refuse_strays(layout: Layout, tensors: Mapping[str, TensorRef], but: Collection[str] = ()) -> None:
    """Refuse tensors that must not be copied unseen, but for those whose names begin with one of `but`.

    Raises:
        PlanError: names the first.

    """
    for name in layout.unknown:
        if not name.startswith(tuple(but)) and (what := looks_like(layout, name)):
            shape = list(tensors[name].spec.shape)
            raise PlanError(
                f"tensor '{name}' {shape} is unknown to family {layout.family.name}, and looks like {what}:"
                " it cannot be copied without being understood"
            )


def _owners(name: str) -> list[str]:
    """Names of which this one may be a part, as `q_proj` of `q_proj.weight.absmax` or of `q_proj_scale_inv`."""
    parts = name.split(".")
    joined = name.rsplit("_", 2)
    return [".".join(parts[:-1]), ".".join(parts[:-2]), joined[0], "_".join(joined[:-1])]


def _is_quantized(layout: Layout, stem: str) -> bool:
    """Whether other parts of the same weight are known."""
    return any(f"{stem}.{part}" in layout.places for part in ("qweight", "weight_packed", "weight_scale"))
