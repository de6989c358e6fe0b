"""Mixtral: one tensor per expert under `block_sparse_moe`, called w1, w3 and w2; no shared expert, no dense layer.

Names and shapes from the release of Mixtral-8x7B and transformers' `mixtral`, whose modules have other names.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    NORMS,
    TYPES,
    Config,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    experts,
    size,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="block_sparse_moe.experts", stacks=(), projections=("w1", "w3", "w2"))


def _head_dim(config: Config) -> int:
    if config.get("head_dim") is not None:
        return size(config, "head_dim")
    return size(config, "hidden_size") // size(config, "num_attention_heads")


FAMILY: Final = Family(
    name="mixtral",
    wrappers=(Wrapper("MixtralForCausalLM", "mixtral", None, "model."),),
    count_keys=("num_local_experts", "num_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.o_proj.weight", "H,Q*D", "attention"),
        Template("block_sparse_moe.gate.weight", "E,H", "router"),
        *experts(layout=_EXPERTS),
    ),
    experts=_EXPERTS,
    renames=(("block_sparse_moe.", "mlp."),),
    symbols={
        "D": _head_dim,
        "H": "hidden_size",
        "I": "intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    types={
        **{key: value for key, value in TYPES.items() if key not in ("attention_bias", "moe_intermediate_size")},
        "head_dim": "int or null",
        "intermediate_size": "int",
        "num_local_experts": "int",
        "router_aux_loss_coef": "float",
        "router_jitter_noise": "float",
        "sliding_window": "int or null",
    },
    conditions={"tied": tied, "untied": untied},
    keep_16bit=("block_sparse_moe.gate",),
    formats=("compressed-tensors",),  # that of auto-round wants gate_proj, where vLLM wants w1
    merged={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
)
