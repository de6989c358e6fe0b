"""K-EXAONE: grouped-query attention with norms of heads, a shared expert, DeepSeek-V3's router, a dense MTP layer.

Names and shapes from transformers' `exaone_moe`, which puts the router's bias elsewhere, and vLLM's `exaone_moe_mtp`.
Releases write the architecture with a capital E.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
    QK_NORMS,
    Config,
    Family,
    Mtp,
    Template,
    Wrapper,
    conditions,
    experts,
    is_sparse,
    merged,
    mlp,
    size,
    types,
)

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    if layer >= size(config, "num_hidden_layers"):
        return False  # the MTP layer is dense
    listed = config.get("is_moe_layer")
    if config.get("mlp_layer_types") is None and listed is not None:
        return bool(listed[layer])
    return is_sparse(config, layer, dense=int(config.get("first_last_k_dense_replace", 1)))


FAMILY: Final = Family(
    name="exaone_moe",
    wrappers=(
        Wrapper("ExaoneMoeForCausalLM", "exaone_moe", None, "model."),
        Wrapper("ExaoneMoEForCausalLM", "exaone_moe", None, "model."),
    ),
    count_keys=("num_experts", "num_local_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *(each for each in ATTENTION if not each.when),
        *QK_NORMS,
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    renames=(("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),),
    mtp=Mtp(
        count_key="num_nextn_predict_layers",
        prefix="mtp.layers.{l}.",
        follows_blocks=False,
        like=lambda config: size(config, "num_hidden_layers"),
        inputs=(
            "mtp.pre_fc_norm_embedding.weight",
            "mtp.pre_fc_norm_hidden.weight",
            "mtp.fc.weight",
            "mtp.norm.weight",
        ),
        root=(
            Template("mtp.fc.weight", "H,2*H", "mtp"),
            Template("mtp.norm.weight", "H", "mtp"),
            Template("mtp.pre_fc_norm_embedding.weight", "H", "mtp"),
            Template("mtp.pre_fc_norm_hidden.weight", "H", "mtp"),
        ),
        uncounted=True,
    ),
    symbols={**HEADS, "F": "intermediate_size", "I": "moe_intermediate_size", "NS": "num_shared_experts"},
    types=types(
        "attention_bias",
        first_k_dense_replace="int",
        intermediate_size="int",
        layer_types="list of str or null",
        mlp_layer_types="list of str or null",
        n_group="int",
        norm_topk_prob="bool",
        num_experts="int",
        num_shared_experts="int",
        routed_scaling_factor="float",
        sliding_window="int",
        sliding_window_pattern="int or str or null",
        topk_group="int",
    ),
    conditions=conditions(_is_moe),
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged=merged("mlp", "mlp.shared_experts"),
)
