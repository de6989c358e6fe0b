"""dots.llm1: grouped-query attention with norms of heads, shared experts, dense first layers, DeepSeek-V3's router.

Names and shapes from transformers' `dots1`.
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
    name="dots1",
    wrappers=(Wrapper("Dots1ForCausalLM", "dots1", None, "model."),),
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION,
        *QK_NORMS,
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.gate.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols={**HEADS, "F": "intermediate_size", "I": "moe_intermediate_size", "NS": "n_shared_experts"},
    types=types(
        attention_dropout="float or int or null",
        first_k_dense_replace="int or null",
        intermediate_size="int",
        layer_types="list of str or null",
        max_window_layers="int or null",
        n_group="int or null",
        n_routed_experts="int or null",
        n_shared_experts="int or null",
        norm_topk_prob="bool or null",
        num_experts_per_tok="int or null",
        num_key_value_heads="int or null",
        routed_scaling_factor="float",
        sliding_window="int or null",
        topk_group="int or null",
    ),
    conditions=conditions(is_sparse),
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged=merged("mlp", "mlp.shared_experts"),
)
