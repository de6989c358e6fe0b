"""Qwen3-MoE: grouped-query attention, one tensor per expert, no shared expert.

Names and shapes from the release of Qwen3-30B-A3B and transformers' `qwen3_moe`.
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
    mlp,
    size,
    tied,
    untied,
)

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    step = int(config.get("decoder_sparse_step", 1))
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _head_dim(config: Config) -> int:
    if config.get("head_dim") is not None:
        return size(config, "head_dim")
    return size(config, "hidden_size") // size(config, "num_attention_heads")


FAMILY: Final = Family(
    name="qwen3_moe",
    wrappers=(Wrapper("Qwen3MoeForCausalLM", "qwen3_moe", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),  # transformers 5 saves the second name
    root=EMBEDDINGS,
    block=(
        *NORMS,
        Template("self_attn.q_proj.weight", "Q*D,H", "attention", "attention"),
        *GROUPED_ATTENTION,
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        *experts("moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols={
        "D": _head_dim,
        "F": "intermediate_size",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    types={
        **TYPES,
        "decoder_sparse_step": "int",
        "intermediate_size": "int",
        "mlp_only_layers": "list of int or null",
        "norm_topk_prob": "bool",
        "num_experts": "int",
        "router_aux_loss_coef": "float",
        "sliding_window": "int or null",
        "use_sliding_window": "bool",
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
