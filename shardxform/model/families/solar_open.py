"""Solar Open: grouped-query attention, one shared expert, DeepSeek-V3's router, no dense layer.

Names and shapes from transformers' `solar_open`.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
    Family,
    Template,
    Wrapper,
    conditions,
    experts,
    merged,
    mlp,
    types,
)
from shardxform.model.families.key_types import ROUTED

__all__ = ["FAMILY"]

FAMILY: Final = Family(
    name="solar_open",
    wrappers=(Wrapper("SolarOpenForCausalLM", "solar_open", None, "model."),),
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *(each for each in ATTENTION if each.name != "self_attn.o_proj.bias"),
        Template("mlp.gate.weight", "E,H", "router"),
        Template("mlp.gate.e_score_correction_bias", "E", "router"),
        *experts(),
        *mlp("mlp.shared_experts", "NS*I", "shared experts"),
    ),
    symbols={**HEADS, "I": "moe_intermediate_size", "NS": "n_shared_experts"},
    types=types(
        **ROUTED,
        head_dim="int",
    ),
    conditions=conditions(),
    keep_16bit=("mlp.gate",),
    merged=merged("mlp.shared_experts"),
)
