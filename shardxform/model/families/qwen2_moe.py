"""Qwen1.5-MoE and Qwen2-MoE: attention with biases, one tensor per expert, a shared expert behind a gate.

Names and shapes from transformers' `qwen2_moe`.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
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
from shardxform.model.families.qwen3_moe import FAMILY as QWEN3_MOE

__all__ = ["FAMILY"]


def _has_bias(config: Config, _layer: int) -> bool:
    return bool(config.get("qkv_bias", True))


FAMILY: Final = Family(
    name="qwen2_moe",
    wrappers=(Wrapper("Qwen2MoeForCausalLM", "qwen2_moe", None, "model."),),
    count_keys=("num_experts",),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION[:-1],  # its last projection has no bias
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_expert", "S", "shared experts", "moe"),
        Template("mlp.shared_expert_gate.weight", "1,H", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols={
        **HEADS,
        "KV": "num_key_value_heads",
        "F": "intermediate_size",
        "I": "moe_intermediate_size",
        "S": "shared_expert_intermediate_size",
    },
    types=types(
        "attention_bias",
        decoder_sparse_step="int",
        intermediate_size="int",
        layer_types="list of str or null",
        max_window_layers="int",
        mlp_only_layers="list of int or null",
        norm_topk_prob="bool",
        num_experts="int",
        num_key_value_heads="int or null",
        qkv_bias="bool",
        router_aux_loss_coef="float",
        shared_expert_intermediate_size="int",
        sliding_window="int or null",
        use_sliding_window="bool",
    ),
    conditions={**conditions(QWEN3_MOE.conditions["moe"]), "attention bias": _has_bias},
    moe="moe",
    keep_16bit=("mlp.gate", "mlp.shared_expert_gate"),
    merged=merged("mlp.shared_expert", "mlp"),
)
