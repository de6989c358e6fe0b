"""Kolibri-1: grouped-query attention with norms of heads, norms after both halves of a block, a shared expert.

Names and shapes from transformers' `kolibri1`. The router's bias, of a sigmoid, lies apart from the router.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
    QK_NORMS,
    Family,
    Template,
    Wrapper,
    conditions,
    experts,
    merged,
    mlp,
    types,
)

__all__ = ["FAMILY"]

FAMILY: Final = Family(
    name="kolibri1",
    wrappers=(Wrapper("Kolibri1ForCausalLM", "kolibri1", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *(each for each in ATTENTION if not each.when),
        *QK_NORMS,
        Template("post_attn_norm.weight", "H", "norms"),
        Template("post_ffn_norm.weight", "H", "norms"),
        Template("mlp.gate.weight", "E,H", "router"),
        Template("moe.router.expert_bias", "E", "router"),
        *experts(),
        *mlp("mlp.shared_experts", "S", "shared experts"),
    ),
    renames=(
        ("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
        ("post_attn_norm", "post_self_attn_layernorm"),
        ("post_ffn_norm", "post_mlp_layernorm"),
    ),
    symbols={**HEADS, "I": "moe_intermediate_size", "S": "shared_expert_intermediate_size"},
    types=types(
        "attention_bias",
        head_dim="int",
        layer_types="list of str or null",
        norm_topk_prob="bool",
        num_experts="int",
        shared_expert_intermediate_size="int",
        sliding_window="int or null",
    ),
    conditions=conditions(),
    keep_16bit=("mlp.gate",),
    merged=merged("mlp.shared_experts"),
)
