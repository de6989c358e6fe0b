"""Granite-MoE with a shared expert, whose gate and up projection are one matrix; see `granitemoe`.

Names and shapes from transformers' `granitemoeshared`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families import granitemoe
from shardxform.model.families.base import Wrapper
from shardxform.model.families.granitemoe import SHARED_MLP

__all__ = ["FAMILY"]

FAMILY: Final = replace(
    granitemoe.FAMILY,
    name="granitemoeshared",
    wrappers=(Wrapper("GraniteMoeSharedForCausalLM", "granitemoeshared", None, "model."),),
    block=(*granitemoe.FAMILY.block, *SHARED_MLP),
    symbols={**granitemoe.FAMILY.symbols, "S": "shared_intermediate_size"},
    types={**granitemoe.FAMILY.types, "shared_intermediate_size": "int"},
    conditions={
        **granitemoe.FAMILY.conditions,
        "shared": lambda config, _layer: bool(config.get("shared_intermediate_size")),
    },
)
