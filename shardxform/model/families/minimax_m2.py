"""MiniMax-M2: one tensor per expert under `block_sparse_moe`, called w1, w3 and w2, norms over all heads at once.

Names and shapes from the releases of MiniMax-M2 and transformers' `minimax_m2`, whose modules have other names. The
router's choice is by sigmoid and a correction bias, its weights are the sigmoids alone, renormalised. Configs declare
`num_mtp_modules`, but no release holds one.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    NORMS,
    TYPES,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    experts,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="block_sparse_moe.experts", stacks=(), projections=("w1", "w3", "w2"))

FAMILY: Final = Family(
    name="minimax_m2",
    wrappers=(Wrapper("MiniMaxM2ForCausalLM", "minimax_m2", None, "model."),),
    count_keys=("num_local_experts", "num_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.o_proj.weight", "H,Q*D", "attention"),
        Template("self_attn.q_norm.weight", "Q*D", "norms"),
        Template("self_attn.k_norm.weight", "KV*D", "norms"),
        Template("block_sparse_moe.gate.weight", "E,H", "router"),
        Template("block_sparse_moe.e_score_correction_bias", "E", "router"),
        *experts(layout=_EXPERTS),
    ),
    experts=_EXPERTS,
    renames=(("block_sparse_moe.", "mlp."),),
    symbols={
        "D": "head_dim",
        "H": "hidden_size",
        "I": "intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    types={
        **{key: value for key, value in TYPES.items() if key not in ("attention_bias", "moe_intermediate_size")},
        "head_dim": "int",
        "intermediate_size": "int",
        "num_local_experts": "int",
        "router_aux_loss_coef": "float",
        "router_jitter_noise": "float",
    },
    conditions={"tied": tied, "untied": untied},
    keep_16bit=("block_sparse_moe.gate",),
    formats=("compressed-tensors",),  # that of auto-round wants gate_proj, where vLLM wants w1
    merged={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
)
