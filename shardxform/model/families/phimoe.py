"""Phi-3.5-MoE: one tensor per expert under `block_sparse_moe`, norms with biases, a router that picks two in turn.

Names and shapes from the release of Phi-3.5-MoE, whose config names a class of its own code, and from transformers'
`phimoe`, whose modules have other names. The router's weights are those of its two choices, each a softmax over the
experts that come near it, and are what transformers passes to the experts.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    conditions,
    experts,
    merged,
    types,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="block_sparse_moe.experts", stacks=(), projections=("w1", "w3", "w2"))

FAMILY: Final = Family(
    name="phimoe",
    wrappers=(
        Wrapper("PhimoeForCausalLM", "phimoe", None, "model."),
        Wrapper("PhiMoEForCausalLM", "phimoe", None, "model."),
    ),
    count_keys=("num_local_experts",),
    root=(
        *EMBEDDINGS,
        Template("{decoder}norm.bias", "H", "norms"),
        Template("{head}.bias", "V", "lm head", "head bias"),
    ),
    block=(
        *NORMS,
        Template("input_layernorm.bias", "H", "norms"),
        Template("post_attention_layernorm.bias", "H", "norms"),
        *ATTENTION,
        Template("block_sparse_moe.gate.weight", "E,H", "router"),
        *experts(layout=_EXPERTS),
    ),
    experts=_EXPERTS,
    renames=(("block_sparse_moe.gate", "mlp.router"), ("block_sparse_moe.", "mlp.")),
    symbols={**HEADS, "KV": "num_key_value_heads", "I": "intermediate_size"},
    types=types(
        "moe_intermediate_size",
        input_jitter_noise="float",
        intermediate_size="int",
        lm_head_bias="bool",
        num_local_experts="int",
        router_aux_loss_coef="float",
        router_jitter_noise="float",
        sliding_window="int or null",
    ),
    conditions={**conditions(), "head bias": lambda config, _layer: bool(config.get("lm_head_bias"))},
    keep_16bit=("block_sparse_moe.gate",),
    formats=("compressed-tensors",),  # that of auto-round wants gate_proj, where vLLM wants w1
    merged=merged(),
)
