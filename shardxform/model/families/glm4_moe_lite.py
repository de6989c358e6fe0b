"""GLM-4.7-Flash: the tensors of DeepSeek-V3 under another class, with a list that says which layers are dense.

Names and shapes from transformers' `glm4_moe_lite`, those of the MTP layer from vLLM's `glm4_moe_lite_mtp`: it follows
the decoder blocks under the next layer number.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import EMBEDDINGS, TYPES, Config, Family, Wrapper, listed_as_sparse
from shardxform.model.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from shardxform.model.families.key_types import LATENT, ROUTED

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    return listed_as_sparse(config, layer, int(config.get("first_k_dense_replace", 1)))


FAMILY: Final = Family(
    name="glm4_moe_lite",
    wrappers=(Wrapper("Glm4MoeLiteForCausalLM", "glm4_moe_lite", None, "model."),),
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=DEEPSEEK_V3.block,
    mtp=DEEPSEEK_V3.mtp,
    symbols=DEEPSEEK_V3.symbols,
    types={
        **TYPES,
        **LATENT,
        **ROUTED,
        "intermediate_size": "int",
        "mlp_layer_types": "list of str or null",
        "pretraining_tp": "int",
        "q_lora_rank": "int or null",
        "rope_interleave": "bool",
        "v_head_dim": "int",
    },
    conditions={
        **DEEPSEEK_V3.conditions,
        "dense": lambda config, layer: not _is_moe(config, layer),
        "moe": _is_moe,
    },
    moe="moe",
    keep_16bit=DEEPSEEK_V3.keep_16bit,
    merged=DEEPSEEK_V3.merged,
)
