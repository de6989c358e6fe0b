"""Beam-1.0: gated grouped-query attention, four norms a block, routing in groups as DeepSeek-V3, no shared expert.

Names and shapes from transformers' `beam`. It multiplies the sum over experts by `routed_scaling_factor`, not each
expert's weight: that factor is the same for every expert and in every layer, and scores are without it.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    GROUPED_ATTENTION,
    NORMS,
    TYPES,
    Config,
    Family,
    Template,
    Wrapper,
    experts,
    listed_as_sparse,
    mlp,
    tied,
    untied,
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
        Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
        *GROUPED_ATTENTION,
        Template("self_attn.gate_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.gate_bias", "Q", "attention"),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.gate.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols={
        "D": "head_dim",
        "F": "intermediate_size",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    types={
        **TYPES,
        "final_logit_softcapping": "int or float or null",
        "head_dim": "int",
        "intermediate_size": "int",
        "layer_types": "list of str or null",
        "mlp_layer_types": "list of str or null",
        "n_group": "int or null",
        "norm_topk_prob": "bool",
        "num_experts": "int",
        "routed_scaling_factor": "int or float",
        "sliding_window": "int or null",
        "topk_group": "int or null",
    },
    conditions={
        "attention": lambda _config, _layer: True,
        "attention bias": lambda config, _layer: bool(config.get("attention_bias")),
        "dense": lambda config, layer: not _is_moe(config, layer),
        "moe": _is_moe,
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
