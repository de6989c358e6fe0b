"""Beam-1.0: gated grouped-query attention, four norms a block, routing in groups as DeepSeek-V3, no shared expert.

Names and shapes from transformers' `beam`. It multiplies the sum over experts by `routed_scaling_factor`, not each
expert's weight: that factor is the same for every expert and in every layer, and scores are without it.
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
    listed_as_sparse,
    merged,
    mlp,
    types,
)

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    return listed_as_sparse(config, layer, 3)


FAMILY: Final = Family(
    name="beam",
    wrappers=(Wrapper("BeamForCausalLM", "beam", None, "model."),),
    count_keys=("num_experts",),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        Template("pre_feedforward_layernorm.weight", "H", "norms"),
        Template("post_feedforward_layernorm.weight", "H", "norms"),
        *ATTENTION,
        *QK_NORMS,
        Template("self_attn.gate_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.gate_bias", "Q", "attention"),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.gate.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols={
        **HEADS,
        "KV": "num_key_value_heads",
        "D": "head_dim",
        "F": "intermediate_size",
        "I": "moe_intermediate_size",
    },
    types=types(
        final_logit_softcapping="int or float or null",
        head_dim="int",
        intermediate_size="int",
        layer_types="list of str or null",
        mlp_layer_types="list of str or null",
        n_group="int or null",
        norm_topk_prob="bool",
        num_experts="int",
        routed_scaling_factor="int or float",
        sliding_window="int or null",
        topk_group="int or null",
    ),
    conditions=conditions(_is_moe),
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged=merged("mlp"),
)
