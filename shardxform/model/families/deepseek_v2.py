"""DeepSeek-V2 and its kin: the attention and experts of DeepSeek-V3, softmax routing without a bias, no MTP layer.

Names and shapes from transformers' `deepseek_v2`. The router looks at groups only where `topk_method` is
`group_limited_greedy`; pruning keeps as many of each wherever `n_group` says that there are some.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import EMBEDDINGS, TYPES, Family, Wrapper
from shardxform.model.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from shardxform.model.families.key_types import LATENT

__all__ = ["FAMILY"]

FAMILY: Final = Family(
    name="deepseek_v2",
    wrappers=(Wrapper("DeepseekV2ForCausalLM", "deepseek_v2", None, "model."),),
    count_keys=("n_routed_experts", "num_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=tuple(template for template in DEEPSEEK_V3.block if not template.name.endswith("correction_bias")),
    symbols=DEEPSEEK_V3.symbols,
    types={
        **TYPES,
        **LATENT,
        "attention_dropout": "float or null",
        "first_k_dense_replace": "int",
        "head_dim": "int or null",
        "intermediate_size": "int",
        "mlp_bias": "bool",
        "n_group": "int or null",
        "n_routed_experts": "int",
        "n_shared_experts": "int",
        "norm_topk_prob": "bool or null",
        "num_experts_per_tok": "int or null",
        "num_key_value_heads": "int or null",
        "pretraining_tp": "int or null",
        "q_lora_rank": "int or null",
        "routed_scaling_factor": "float",
        "topk_group": "int or null",
        "topk_method": "str or null",
        "v_head_dim": "int",
    },
    conditions=DEEPSEEK_V3.conditions,
    moe="moe",
    keep_16bit=DEEPSEEK_V3.keep_16bit,
    merged=DEEPSEEK_V3.merged,
)
