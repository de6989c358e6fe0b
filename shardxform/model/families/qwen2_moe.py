"""Qwen1.5-MoE and Qwen2-MoE: attention with biases, one tensor per expert, a shared expert behind a gate.

Names and shapes from transformers' `qwen2_moe`.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    NORMS,
    TYPES,
    Family,
    Template,
    Wrapper,
    experts,
    head_dim,
    mlp,
    tied,
    untied,
)
from shardxform.model.families.qwen3_moe import FAMILY as QWEN3_MOE

__all__ = ["FAMILY"]

FAMILY: Final = Family(
    name="qwen2_moe",
    wrappers=(Wrapper("Qwen2MoeForCausalLM", "qwen2_moe", None, "model."),),
    count_keys=("num_experts",),
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
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_expert", "S", "shared experts", "moe"),
        Template("mlp.shared_expert_gate.weight", "1,H", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols={
        "D": head_dim,
        "F": "intermediate_size",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "S": "shared_expert_intermediate_size",
        "V": "vocab_size",
    },
    types={
        **{key: value for key, value in TYPES.items() if key != "attention_bias"},
        "decoder_sparse_step": "int",
        "intermediate_size": "int",
        "layer_types": "list of str or null",
        "max_window_layers": "int",
        "mlp_only_layers": "list of int or null",
        "norm_topk_prob": "bool",
        "num_experts": "int",
        "num_key_value_heads": "int or null",
        "qkv_bias": "bool",
        "router_aux_loss_coef": "float",
        "shared_expert_intermediate_size": "int",
        "sliding_window": "int or null",
        "use_sliding_window": "bool",
    },
    conditions={
        "attention bias": lambda config, _layer: bool(config.get("qkv_bias", True)),
        "dense": QWEN3_MOE.conditions["dense"],
        "moe": QWEN3_MOE.conditions["moe"],
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    keep_16bit=("mlp.gate", "mlp.shared_expert_gate"),
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.shared_expert.gate_up_proj": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
