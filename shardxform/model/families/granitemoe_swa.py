"""Granite MoE with sliding windows: sinks in attention, stacked experts under the names of modules, shared experts.

Names and shapes from transformers' `granitemoe_swa`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    HEADS,
    NORMS,
    ExpertLayout,
    Template,
    Wrapper,
    conditions,
    experts,
)
from shardxform.model.families.granitemoe import FAMILY as GRANITEMOE
from shardxform.model.families.granitemoe import SHARED_MLP

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="block_sparse_moe.experts")

FAMILY: Final = replace(
    GRANITEMOE,
    name="granitemoe_swa",
    wrappers=(Wrapper("GraniteMoeSWAForCausalLM", "granitemoe_swa", None, "model."),),
    block=(
        *NORMS,
        *ATTENTION,
        Template("self_attn.sinks", "Q", "attention"),
        Template("block_sparse_moe.router.weight", "E,H", "router"),
        *experts(layout=_EXPERTS),
        *SHARED_MLP,
    ),
    experts=_EXPERTS,
    renames=(),
    symbols={**HEADS, "I": "intermediate_size", "S": "shared_intermediate_size"},
    types={
        **GRANITEMOE.types,
        "layer_rope_theta": "list of float or list of int or null",
        "layer_types": "list of str or null",
        "shared_intermediate_size": "int",
        "sliding_window": "int or null",
    },
    conditions=conditions(shared=lambda config, _layer: bool(config.get("shared_intermediate_size"))),
    keep_16bit=("block_sparse_moe.router",),
    formats=("auto-round", "gptq", "compressed-tensors"),
)
