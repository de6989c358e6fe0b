"""GLM-4.5 to GLM-4.7: grouped-query attention with biases, dense first layers, routing as DeepSeek-V3, one MTP layer.

Names and shapes from transformers' `glm4_moe`, those of the MTP layer from its `MtpModel` and from vLLM's
`glm4_moe_mtp`: it follows the decoder blocks under the next layer number. Only GLM-4.5, 4.6 and 4.7 have norms of
queries and keys, not Air.
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
from shardxform.model.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from shardxform.model.families.key_types import ROUTED

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    return layer >= int(config.get("first_k_dense_replace", 1))


FAMILY: Final = Family(
    name="glm4_moe",
    wrappers=(Wrapper("Glm4MoeForCausalLM", "glm4_moe", None, "model."),),
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION[:-1],  # its last projection has no bias
        Template("self_attn.q_norm.weight", "D", "norms", "head norms"),
        Template("self_attn.k_norm.weight", "D", "norms", "head norms"),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.gate.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    mtp=DEEPSEEK_V3.mtp,
    symbols={
        **HEADS,
        "KV": "num_key_value_heads",
        "F": "intermediate_size",
        "I": "moe_intermediate_size",
        "NS": "n_shared_experts",
    },
    types=types(
        **ROUTED,
        first_k_dense_replace="int",
        intermediate_size="int",
        num_nextn_predict_layers="int",
        use_qk_norm="bool",
    ),
    conditions={**conditions(_is_moe), "head norms": lambda config, _layer: bool(config.get("use_qk_norm"))},
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged=merged("mlp.shared_experts", "mlp"),
)
