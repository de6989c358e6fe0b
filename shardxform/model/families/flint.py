"""Flint: grouped-query attention with norms of heads and sinks, a shared expert, a sigmoid router without a bias.

Names and shapes from transformers' `flint`.
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
    Template,
    Wrapper,
    conditions,
    experts,
    merged,
    mlp,
    types,
)

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers")
    return layer not in ([0, 1] if dense is None else dense) and (layer + 1) % step == 0


FAMILY: Final = Family(
    name="flint",
    wrappers=(Wrapper("FlintForCausalLM", "flint", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION,
        *QK_NORMS,
        Template("self_attn.softmax_offset", "Q", "attention"),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_expert", "S", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    renames=(("softmax_offset", "sinks"),),
    symbols={
        **HEADS,
        "F": "intermediate_size",
        "I": "moe_intermediate_size",
        "S": "shared_expert_intermediate_size",
    },
    types=types(
        decoder_sparse_step="int",
        head_dim="int",
        intermediate_size="int",
        layer_types="list of str or null",
        mlp_only_layers="list of int or null",
        norm_topk_prob="bool",
        num_experts="int",
        router_aux_loss_coef="float",
        shared_expert_intermediate_size="int",
        sliding_window="int",
    ),
    conditions=conditions(_is_moe),
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged=merged("mlp", "mlp.shared_expert"),
)
