"""FlexOlmo: norms after attention and MLP instead of before, norms over all heads, no shared expert, no dense layer.

Names and shapes from transformers' `flex_olmo`; a release merges models that were trained apart, one expert of each.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    Family,
    Template,
    Wrapper,
    conditions,
    experts,
    merged,
    types,
)

__all__ = ["FAMILY"]

FAMILY: Final = Family(
    name="flex_olmo",
    wrappers=(Wrapper("FlexOlmoForCausalLM", "flex_olmo", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    root=EMBEDDINGS,
    block=(
        Template("post_attention_layernorm.weight", "H", "norms"),
        Template("post_feedforward_layernorm.weight", "H", "norms"),
        *ATTENTION,
        Template("self_attn.q_norm.weight", "Q*D", "norms"),
        Template("self_attn.k_norm.weight", "KV*D", "norms"),
        Template("mlp.gate.weight", "E,H", "router"),
        *experts(),
    ),
    symbols={**HEADS, "I": "intermediate_size"},
    types=types(
        "moe_intermediate_size",
        attention_dropout="float or null",
        intermediate_size="int",
        norm_topk_prob="bool",
        num_experts="int",
        num_key_value_heads="int or null",
        router_aux_loss_coef="float",
    ),
    conditions=conditions(),
    keep_16bit=("mlp.gate",),
    merged=merged(),
)
