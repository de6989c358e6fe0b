"""Cohere2-MoE (Command A+, North): attention and MLP side by side after one norm, a dense prefix.

Names and shapes from transformers' `cohere2_moe`. The head is tied unless the config says otherwise. Where shared
experts are averaged with the routed ones, half of what an expert is weighted with comes out: the same for all of them,
so that scores, which leave it out, rank them alike.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    Config,
    Family,
    Template,
    Wrapper,
    conditions,
    experts,
    is_sparse,
    merged,
    mlp,
    types,
)

__all__ = ["FAMILY"]


def _tied(config: Config, _layer: int) -> bool:
    return config.get("tie_word_embeddings") is not False


FAMILY: Final = Family(
    name="cohere2_moe",
    wrappers=(Wrapper("Cohere2MoeForCausalLM", "cohere2_moe", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    root=EMBEDDINGS,
    block=(
        Template("input_layernorm.weight", "H", "norms"),
        *ATTENTION,
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "shared"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    symbols={
        **HEADS,
        "F": "prefix_dense_intermediate_size",
        "I": "intermediate_size",
        "NS": "num_shared_experts",
    },
    types=types(
        "moe_intermediate_size",
        "rope_parameters",
        attention_dropout="float",
        expert_selection_fn="str",
        head_dim="int",
        intermediate_size="int",
        layer_norm_eps="float",
        layer_types="list of str or null",
        logit_scale="float",
        mlp_layer_types="list or null",
        norm_topk_prob="bool",
        num_experts="int",
        num_key_value_heads="int or null",
        num_shared_experts="int",
        prefix_dense_intermediate_size="int or null",
        prefix_dense_sliding_window_pattern="int",
        rms_norm_eps="float or null",
        rope_scaling="object or null",
        rope_theta="float or int",
        shared_expert_combination_strategy="str",
        sliding_window="int or null",
        sliding_window_pattern="int",
    ),
    conditions={
        **conditions(is_sparse),
        "shared": lambda config, layer: bool(config.get("num_shared_experts")) and is_sparse(config, layer),
        "tied": _tied,
        "untied": lambda config, layer: not _tied(config, layer),
    },
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged=merged("mlp", "mlp.shared_experts"),
)
