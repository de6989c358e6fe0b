"""Qwen3-Next and Qwen3-Coder-Next: the layers of Qwen3.5-MoE with other names in the gated delta-net, no vision tower.

Names and shapes from transformers' `qwen3_next`, those of the MTP layer from vLLM's `qwen3_next_mtp`. Configs of
releases do not count MTP layers: they are known by their tensors.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    GROUPED_ATTENTION,
    NORMS,
    TYPES,
    Config,
    Family,
    Template,
    Wrapper,
    experts,
    mlp,
    size,
)
from shardxform.model.families.key_types import LINEAR
from shardxform.model.families.qwen3_5_moe import FAMILY as QWEN3_5_MOE
from shardxform.model.families.qwen3_moe import FAMILY as QWEN3_MOE

__all__ = ["FAMILY"]


def _query_rows(config: Config) -> int:
    return 2 * size(config, "num_attention_heads") * size(config, "head_dim")  # each head carries an output gate


_LINEAR_ATTENTION: Final = tuple(
    Template(f"linear_attn.{name}", shape, "linear attention", "linear attention")
    for name, shape in (
        ("in_proj_qkvz.weight", "2*LK*DK+2*LV*DV,H"),
        ("in_proj_ba.weight", "2*LV,H"),
        ("out_proj.weight", "H,LV*DV"),
        ("conv1d.weight", "2*LK*DK+LV*DV,1,C"),
        ("A_log", "LV"),
        ("dt_bias", "LV"),
        ("norm.weight", "DV"),
    )
)

assert QWEN3_5_MOE.mtp is not None

FAMILY: Final = Family(
    name="qwen3_next",
    wrappers=(Wrapper("Qwen3NextForCausalLM", "qwen3_next", None, "model."),),
    count_keys=("num_experts",),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *_LINEAR_ATTENTION,
        Template("self_attn.q_proj.weight", "QR,H", "attention", "attention"),
        *GROUPED_ATTENTION,
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_expert", "S", "shared experts", "moe"),
        Template("mlp.shared_expert_gate.weight", "1,H", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    mtp=dataclasses.replace(QWEN3_5_MOE.mtp, count_key="num_nextn_predict_layers", uncounted=True),
    symbols={**QWEN3_5_MOE.symbols, "F": "intermediate_size", "QR": _query_rows},
    types={
        **TYPES,
        **LINEAR,
        "decoder_sparse_step": "int",
        "head_dim": "int",
        "intermediate_size": "int",
        "layer_types": "list of str or null",
        "mlp_only_layers": "list of int or null",
        "norm_topk_prob": "bool",
        "num_experts": "int",
        "router_aux_loss_coef": "float",
        "shared_expert_intermediate_size": "int",
    },
    conditions={
        **QWEN3_5_MOE.conditions,
        "dense": QWEN3_MOE.conditions["dense"],
        "moe": QWEN3_MOE.conditions["moe"],
    },
    moe="moe",
    keep_16bit=("mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_ba"),
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.shared_expert.gate_up_proj": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    bfloat16_only=True,
)
