"""Kimi Linear: Kimi delta attention, some layers of latent attention without positions, experts called w1, w3 and w2.

Names and shapes from the release's own code and transformers' `kimi_linear`, whose modules have other names. A release
has its dense layers under `mlp`; transformers saves them under `block_sparse_moe`, as the experts.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    NORMS,
    Config,
    ExpertLayout,
    Family,
    Symbol,
    Template,
    Wrapper,
    experts,
    mlp,
    size,
)
from shardxform.model.families.delta import LATENT_SYMBOLS, LATENT_TYPES, UNREAD, delta_conditions

__all__ = ["FAMILY"]

_ABSENT: Final = ("max_position_embeddings", "num_experts_per_tok", "rope_parameters")
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


def _of_delta(ours: str, theirs: str) -> Symbol:
    """Size of delta attention: in an object of its own in releases, at the top level in what transformers saves."""

    def read(config: Config) -> int:
        nested = config.get("linear_attn_config")
        return size(nested, ours) if nested else size(config, theirs)

    return read


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
        **LATENT_SYMBOLS,
        "C": _of_delta("short_conv_kernel_size", "linear_conv_kernel_dim"),
        "LD": _of_delta("head_dim", "linear_head_dim"),
        "LQ": _of_delta("num_heads", "linear_num_heads"),
    },
    types={
        **{key: value for key, value in LATENT_TYPES.items() if key not in _ABSENT},
        "attention_dropout": "float or int or null",
        "linear_conv_kernel_dim": "int",
        "linear_head_dim": "int",
        "linear_num_heads": "int",
        "model_max_length": "int",
        "moe_renormalize": "bool",
        "num_expert_group": "int",
        "num_experts_per_token": "int or null",
        "q_lora_rank": "int or null",
        "topk_group": "int or null",
        "v_head_dim": "int or null",
    },
    conditions=delta_conditions(_is_latent, _is_moe),
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
