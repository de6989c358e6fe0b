"""Mistral-Small-4: latent attention, stacked experts, softmax over groups of experts.

Names and shapes from transformers' `mistral4`; Mistral's own layout of files (`consolidated`) is not read.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families import deepseek_v3
from shardxform.model.families.base import NORMS, TYPES, Family, Template, Wrapper, experts, mlp
from shardxform.model.families.key_types import LATENT

__all__ = ["FAMILY"]

_LIKE: Final = deepseek_v3.FAMILY

FAMILY: Final = Family(
    name="mistral4",
    wrappers=(Wrapper("Mistral4ForCausalLM", "mistral4", None, "model."),),
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    root=_LIKE.root,
    block=(
        *NORMS,
        *(each for each in _LIKE.block if each.name.startswith("self_attn.")),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols=_LIKE.symbols,
    types={
        **TYPES,
        **LATENT,
        "attention_dropout": "float or int or null",
        "first_k_dense_replace": "int or null",
        "intermediate_size": "int",
        "n_group": "int or null",
        "n_routed_experts": "int",
        "n_shared_experts": "int",
        "norm_topk_prob": "bool or null",
        "num_experts_per_tok": "int or null",
        "num_key_value_heads": "int or null",
        "pretraining_tp": "int or null",
        "q_lora_rank": "int or null",
        "rope_interleave": "bool or null",
        "routed_scaling_factor": "float",
        "topk_group": "int or null",
        "v_head_dim": "int or null",
    },
    conditions=_LIKE.conditions,
    moe="moe",
    keep_16bit=_LIKE.keep_16bit,
    merged=_LIKE.merged,
    formats=("auto-round", "gptq"),  # that of compressed-tensors wants stacks
    fused_release=True,
)
