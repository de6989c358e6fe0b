"""OLMoE: attention with norms over all heads, one tensor per expert, no shared expert, no dense layer.

Names and shapes from transformers' `olmoe`.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    NORMS,
    TYPES,
    Config,
    Family,
    Template,
    Wrapper,
    experts,
    size,
    tied,
    untied,
)

__all__ = ["FAMILY"]


def _head_dim(config: Config) -> int:
    return size(config, "hidden_size") // size(config, "num_attention_heads")


FAMILY: Final = Family(
    name="olmoe",
    wrappers=(Wrapper("OlmoeForCausalLM", "olmoe", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.o_proj.weight", "H,Q*D", "attention"),
        Template("self_attn.q_proj.bias", "Q*D", "attention", "attention bias"),
        Template("self_attn.k_proj.bias", "KV*D", "attention", "attention bias"),
        Template("self_attn.v_proj.bias", "KV*D", "attention", "attention bias"),
        Template("self_attn.o_proj.bias", "H", "attention", "attention bias"),
        Template("self_attn.q_norm.weight", "H", "norms"),
        Template("self_attn.k_norm.weight", "KV*D", "norms"),
        Template("mlp.gate.weight", "E,H", "router"),
        *experts(),
    ),
    symbols={
        "D": _head_dim,
        "H": "hidden_size",
        "I": "intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    types={
        **{key: value for key, value in TYPES.items() if key != "moe_intermediate_size"},
        "clip_qkv": "float or null",
        "intermediate_size": "int",
        "norm_topk_prob": "bool",
        "num_experts": "int",
        "num_key_value_heads": "int or null",
        "router_aux_loss_coef": "float",
    },
    conditions={
        "attention bias": lambda config, _layer: bool(config.get("attention_bias")),
        "tied": tied,
        "untied": untied,
    },
    keep_16bit=("mlp.gate",),
    merged={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
)
