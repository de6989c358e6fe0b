"""Kimi Linear: Kimi delta attention, some layers of latent attention without positions, experts called w1, w3 and w2.

Names and shapes from the release's own code and transformers' `kimi_linear`, whose modules have other names. A release
has its dense layers under `mlp`; transformers saves them under `block_sparse_moe`, as the experts.
"""

from __future__ import annotations

from typing import Any, Final

from shardxform.model.families.bailing_hybrid import UNREAD
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
    mlp,
    size,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="block_sparse_moe.experts", stacks=(), projections=("w1", "w3", "w2"))


def _is_moe(config: Config, layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    if kinds is not None:
        return bool(kinds[layer] == "sparse")
    return layer >= int(config.get("first_k_dense_replace", 1)) and layer % int(config.get("moe_layer_freq", 1)) == 0


def _is_latent(config: Config, layer: int) -> bool:
    """Whether a block has latent attention; releases list those blocks, counted from 1."""
    kinds, listed = config.get("layer_types"), config.get("linear_attn_config")
    if kinds is not None:
        return bool(kinds[layer] == "full_attention")
    return layer + 1 in listed["full_attn_layers"] if listed else layer > 0 and layer % 4 == 0


def _has_query_rank(config: Config, layer: int) -> bool:
    return _is_latent(config, layer) and config.get("q_lora_rank") is not None


def _of_delta(ours: str, theirs: str) -> Any:  # noqa: ANN401
    """Size of delta attention: in an object of its own in releases, which comes first."""
    return lambda config: size(
        {**config, **(config.get("linear_attn_config") or {})}, ours if _nested(config) else theirs
    )


def _nested(config: Config) -> bool:
    return bool(config.get("linear_attn_config"))


_DELTA: Final = tuple(
    Template(f"self_attn.{name}", shape, "linear attention", "delta")
    for name, shape in (
        ("A_log", "1,1,LQ,1"),
        ("b_proj.weight", "LQ,H"),
        ("dt_bias", "LQ*LD"),
        ("f_a_proj.weight", "LD,H"),
        ("f_b_proj.weight", "LQ*LD,LD"),
        ("g_a_proj.weight", "LD,H"),
        ("g_b_proj.weight", "LQ*LD,LD"),
        *((f"{name}_conv1d.weight", "LQ*LD,1,C") for name in "qkv"),
        *((f"{name}_proj.weight", "LQ*LD,H") for name in "qkv"),
        ("o_norm.weight", "LD"),
        ("o_proj.weight", "H,LQ*LD"),
    )
)
_LATENT: Final = (
    Template("self_attn.kv_a_layernorm.weight", "KA", "norms", "latent"),
    Template("self_attn.kv_a_proj_with_mqa.bias", "KA+R", "attention", "latent bias"),
    Template("self_attn.kv_a_proj_with_mqa.weight", "KA+R,H", "attention", "latent"),
    Template("self_attn.kv_b_proj.weight", "Q*N+Q*VD,KA", "attention", "latent"),
    Template("self_attn.o_proj.bias", "H", "attention", "latent bias"),
    Template("self_attn.o_proj.weight", "H,Q*VD", "attention", "latent"),
    Template("self_attn.q_a_layernorm.weight", "QA", "norms", "query rank"),
    Template("self_attn.q_a_proj.bias", "QA", "attention", "query rank bias"),
    Template("self_attn.q_a_proj.weight", "QA,H", "attention", "query rank"),
    Template("self_attn.q_b_proj.weight", "Q*N+Q*R,QA", "attention", "query rank"),
    Template("self_attn.q_proj.weight", "Q*N+Q*R,H", "attention", "full query"),
)
_DENSE: Final = mlp("mlp", "F", "dense mlp", "dense")

FAMILY: Final = Family(
    name="kimi_linear",
    wrappers=(Wrapper("KimiLinearForCausalLM", "kimi_linear", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    top_k_key="num_experts_per_token",
    group_key="num_expert_group",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *_DELTA,
        *_LATENT,
        Template("block_sparse_moe.gate.weight", "E,H", "router", "moe"),
        Template("block_sparse_moe.gate.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe", _EXPERTS),
        *mlp("block_sparse_moe.shared_experts", "NS*I", "shared experts", "moe"),
        *_DENSE,
        *(
            Template(
                f"block_sparse_moe.{each.name.removeprefix('mlp.')}",
                each.shape,
                each.role,
                each.when,
                instead=each.name,
            )
            for each in _DENSE
        ),
    ),
    experts=_EXPERTS,
    renames=(
        ("self_attn.A_log", "self_attn.forget_gate.A_log"),
        ("self_attn.dt_bias", "self_attn.forget_gate.dt_bias"),
        ("self_attn.f_a_proj", "self_attn.forget_gate.f_a_proj"),
        ("self_attn.f_b_proj", "self_attn.forget_gate.f_b_proj"),
        ("block_sparse_moe.", "mlp."),
    ),
    joined={"self_attn.conv1d.weight": tuple(f"self_attn.{name}_conv1d.weight" for name in "qkv")},
    symbols={
        "C": _of_delta("short_conv_kernel_size", "linear_conv_kernel_dim"),
        "F": "intermediate_size",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KA": "kv_lora_rank",
        "LD": _of_delta("head_dim", "linear_head_dim"),
        "LQ": _of_delta("num_heads", "linear_num_heads"),
        "N": "qk_nope_head_dim",
        "NS": "num_shared_experts",
        "Q": "num_attention_heads",
        "QA": "q_lora_rank",
        "R": "qk_rope_head_dim",
        "V": "vocab_size",
        "VD": "v_head_dim",
    },
    types={
        **{
            key: value
            for key, value in TYPES.items()
            if key not in ("max_position_embeddings", "num_experts_per_tok", "rope_parameters")
        },
        "attention_dropout": "float or int or null",
        "intermediate_size": "int",
        "kv_lora_rank": "int",
        "layer_types": "list of str or null",
        "linear_conv_kernel_dim": "int",
        "linear_head_dim": "int",
        "linear_num_heads": "int",
        "mlp_layer_types": "list of str or null",
        "model_max_length": "int",
        "moe_renormalize": "bool",
        "num_expert_group": "int",
        "num_experts": "int",
        "num_experts_per_token": "int or null",
        "num_key_value_heads": "int or null",
        "num_shared_experts": "int",
        "pretraining_tp": "int or null",
        "q_lora_rank": "int or null",
        "qk_nope_head_dim": "int",
        "qk_rope_head_dim": "int",
        "routed_scaling_factor": "float",
        "topk_group": "int or null",
        "v_head_dim": "int or null",
    },
    conditions={
        "delta": lambda config, layer: not _is_latent(config, layer),
        "dense": lambda config, layer: not _is_moe(config, layer),
        "full query": lambda config, layer: _is_latent(config, layer) and not _has_query_rank(config, layer),
        "latent": _is_latent,
        "latent bias": lambda config, layer: _is_latent(config, layer) and bool(config.get("attention_bias")),
        "moe": _is_moe,
        "query rank": _has_query_rank,
        "query rank bias": lambda config, layer: _has_query_rank(config, layer) and bool(config.get("attention_bias")),
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    keep_16bit=("block_sparse_moe.gate", "self_attn.kv_b_proj"),
    formats=(),
    unread=UNREAD,
    merged={
        "self_attn.in_proj_qkvgfab": tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "b", "f_a")),
        "self_attn.fused_qkv_a_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "block_sparse_moe.gate_up_proj": ("block_sparse_moe.gate_proj", "block_sparse_moe.up_proj"),
        "block_sparse_moe.shared_experts.gate_up_proj": (
            "block_sparse_moe.shared_experts.gate_proj",
            "block_sparse_moe.shared_experts.up_proj",
        ),
    },
)
