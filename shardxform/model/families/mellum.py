"""Mellum 2: grouped-query attention with norms of heads, a softmax router, no shared expert.

Names and shapes from transformers' `mellum`. Its config knows an MTP layer, of which no release has shown the names: a
checkpoint that has one is refused.
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
    is_sparse,
    merged,
    mlp,
    types,
)

__all__ = ["FAMILY"]

FAMILY: Final = Family(
    name="mellum",
    wrappers=(Wrapper("MellumForCausalLM", "mellum", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),  # transformers 5 saves the second name
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION,
        *QK_NORMS,
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        *experts("moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols={**HEADS, "F": "intermediate_size", "I": "moe_intermediate_size"},
    types=types(
        head_dim="int",
        intermediate_size="int",
        layer_types="list of str or null",
        mlp_layer_types="list of str or null",
        mtp_layer_types="list of str or null",
        mtp_mlp_layer_types="list of str or null",
        norm_topk_prob="bool",
        num_experts="int",
        num_mtp_layers="int or null",
        router_aux_loss_coef="float",
        sliding_window="int or null",
    ),
    conditions=conditions(is_sparse),
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged=merged("mlp"),
)
