"""Qwen3-MoE: grouped-query attention, one tensor per expert, no shared expert.

Names and shapes from the release of Qwen3-30B-A3B and transformers' `qwen3_moe`.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
    QK_NORMS,
    Config,
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


def _is_moe(config: Config, layer: int) -> bool:
    step = int(config.get("decoder_sparse_step", 1))
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


FAMILY: Final = Family(
    name="qwen3_moe",
    wrappers=(Wrapper("Qwen3MoeForCausalLM", "qwen3_moe", None, "model."),),
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
    symbols={**HEADS, "KV": "num_key_value_heads", "F": "intermediate_size", "I": "moe_intermediate_size"},
    types=types(
        decoder_sparse_step="int",
        intermediate_size="int",
        mlp_only_layers="list of int or null",
        norm_topk_prob="bool",
        num_experts="int",
        router_aux_loss_coef="float",
        sliding_window="int or null",
        use_sliding_window="bool",
    ),
    conditions=conditions(_is_moe),
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged=merged("mlp"),
)
