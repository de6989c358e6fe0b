"""AFMoE (Trinity): gated attention with norms of heads, four norms a block, shared experts, dense first layers.

Names and shapes from transformers' `afmoe`. The router's bias stands beside it, `mlp.expert_bias`. Releases multiply
the embeddings with the root of their width (`mup_enabled`) where they enter the first block.
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
    is_sparse,
    merged,
    mlp,
    types,
)

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    return is_sparse(config, layer, "num_dense_layers", 1)


FAMILY: Final = Family(
    name="afmoe",
    wrappers=(Wrapper("AfmoeForCausalLM", "afmoe", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        Template("pre_mlp_layernorm.weight", "H", "norms"),
        Template("post_mlp_layernorm.weight", "H", "norms"),
        *ATTENTION,
        *QK_NORMS,
        Template("self_attn.gate_proj.weight", "Q*D,H", "attention"),
        Template("mlp.router.gate.weight", "E,H", "router", "moe"),
        Template("mlp.expert_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols={**HEADS, "F": "intermediate_size", "I": "moe_intermediate_size", "NS": "num_shared_experts"},
    types=types(
        attention_dropout="float or int or null",
        global_attn_every_n_layers="int or null",
        head_dim="int or null",
        intermediate_size="int",
        layer_types="list of str or null",
        mup_enabled="bool or null",
        num_dense_layers="int or null",
        num_experts="int or null",
        num_experts_per_tok="int or null",
        num_key_value_heads="int or null",
        num_shared_experts="int or null",
        route_scale="float or null",
        sliding_window="int or null",
    ),
    conditions=conditions(_is_moe),
    moe="moe",
    keep_16bit=("mlp.router.gate",),
    merged=merged("mlp", "mlp.shared_experts"),
)
