"""A.X-K1: DeepSeek-V3's latent attention, experts and router, and a norm after those experts.

Names and shapes from transformers' `axk1`, whose module of experts holds that norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families.base import (
    Family,
    Template,
    Wrapper,
    attention_bias,
    conditions,
    is_sparse,
    types,
)
from shardxform.model.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from shardxform.model.families.key_types import LATENT, ROUTED

__all__ = ["FAMILY", "biased"]

_BIASED: Final = ("self_attn.q_a_proj.bias", "self_attn.kv_a_proj_with_mqa.bias", "self_attn.o_proj.bias")


def biased(family: Family) -> tuple[Template, ...]:
    """Templates of blocks with queries of a low rank alone, whose biases the config announces."""
    kept = (each for each in family.block if each.when != "full query" and not each.name.endswith("inv_freq"))
    every = (replace(each, when="") if each.when == "query rank" else each for each in kept)
    return tuple(
        replace(each, when="attention bias", optional=False) if each.name in _BIASED else each for each in every
    )


FAMILY: Final = replace(
    DEEPSEEK_V3,
    name="axk1",
    wrappers=(Wrapper("AXK1ForCausalLM", "axk1", None, "model."),),
    block=(*biased(DEEPSEEK_V3), Template("post_mlp_layernorm.weight", "H", "norms", "moe")),
    renames=(("post_mlp_layernorm", "mlp.post_mlp_layernorm"),),
    mtp=None,
    types={
        **types(
            attention_dropout="float or int or null",
            intermediate_size="int",
            mlp_layer_types="list of str or null",
            pretraining_tp="int or null",
            q_lora_rank="int",
            rope_interleave="bool or null",
            v_head_dim="int",
        ),
        **LATENT,
        **ROUTED,
        "norm_topk_prob": "bool or null",
    },
    conditions={
        **conditions(lambda config, layer: is_sparse(config, layer, dense=1)),
        "attention bias": attention_bias,
    },
)
