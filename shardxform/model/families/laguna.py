"""Laguna: gated attention with a number of heads of each layer's own, a shared expert, a sigmoid router with a bias.

Names and shapes from the release; transformers' `laguna` calls the bias and the shared expert otherwise. It multiplies
the sum over experts with `moe_routed_scaling_factor`, the same in all layers: scores, which leave it out, rank alike.
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
    head_dim,
    is_sparse,
    merged,
    mlp,
    size,
    types,
)

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    return is_sparse(config, layer, dense=1)


def _heads(config: Config, layer: int) -> int:
    listed = config.get("num_attention_heads_per_layer")
    return size(config, "num_attention_heads") if listed is None else int(listed[layer])


def _gates(config: Config, layer: int) -> int:
    """Rows of the gate of attention: one per head, or per channel of each."""
    per_head = config.get("gating", True) in (True, "per-head")
    return _heads(config, layer) * (1 if per_head else head_dim(config))


FAMILY: Final = Family(
    name="laguna",
    wrappers=(Wrapper("LagunaForCausalLM", "laguna", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION,
        *QK_NORMS,
        Template("self_attn.g_proj.weight", "G,H", "attention"),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.experts.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_expert", "S", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    renames=(
        ("mlp.experts.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        ("mlp.shared_expert.", "mlp.shared_experts."),
    ),
    symbols={
        **{symbol: meaning for symbol, meaning in HEADS.items() if symbol != "Q"},
        "F": "intermediate_size",
        "I": "moe_intermediate_size",
        "S": "shared_expert_intermediate_size",
    },
    layer_symbols={"G": _gates, "Q": _heads},
    types=types(
        gating="bool or str",
        head_dim="int",
        intermediate_size="int",
        layer_types="list of str or null",
        mlp_layer_types="list of str or null",
        moe_apply_router_weight_on_input="bool",
        moe_routed_scaling_factor="float",
        moe_router_logit_softcapping="float",
        num_attention_heads_per_layer="list of int or null",
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
