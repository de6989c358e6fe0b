"""Jamba: Mamba and attention blocks, MoE in every second one under `feed_forward`, one tensor per expert.

Names and shapes from the releases of Jamba 1.5 and transformers' `jamba`, whose decoder has no rotary embedding, and a
`final_layernorm`. The router's weights are a softmax over all experts, not normalised.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    TYPES,
    Config,
    Decoder,
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

_EXPERTS: Final = ExpertLayout(home="feed_forward.experts", stacks=())


def _is_moe(config: Config, layer: int) -> bool:
    return layer % int(config.get("expert_layer_period", 2)) == int(config.get("expert_layer_offset", 1))


def _is_attention(config: Config, layer: int) -> bool:
    return layer % int(config.get("attn_layer_period", 8)) == int(config.get("attn_layer_offset", 4))


def _rank(config: Config) -> int:
    rank = config.get("mamba_dt_rank", "auto")
    return -(-size(config, "hidden_size") // 16) if rank == "auto" else size(config, "mamba_dt_rank")


_MAMBA: Final = tuple(
    Template(f"mamba.{name}", shape, "norms" if "norm" in name else "linear attention", when)
    for name, shape, when in (
        ("A_log", "M,N", "mamba"),
        ("D", "M", "mamba"),
        ("conv1d.weight", "M,1,C", "mamba"),
        ("conv1d.bias", "M", "conv bias"),
        ("in_proj.weight", "2*M,H", "mamba"),
        ("in_proj.bias", "2*M", "mamba bias"),
        ("x_proj.weight", "R+2*N,M", "mamba"),
        ("dt_proj.weight", "M,R", "mamba"),
        ("dt_proj.bias", "M", "mamba"),
        ("out_proj.weight", "H,M", "mamba"),
        ("out_proj.bias", "H", "mamba bias"),
        ("dt_layernorm.weight", "R", "mamba"),
        ("b_layernorm.weight", "N", "mamba"),
        ("c_layernorm.weight", "N", "mamba"),
    )
)

FAMILY: Final = Family(
    name="jamba",
    wrappers=(Wrapper("JambaForCausalLM", "jamba", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    root=tuple(
        Template("{decoder}final_layernorm.weight", "H", "norms") if each.name == "{decoder}norm.weight" else each
        for each in EMBEDDINGS
    ),
    block=(
        Template("input_layernorm.weight", "H", "norms"),
        Template("pre_ff_layernorm.weight", "H", "norms"),
        *_MAMBA,
        Template("self_attn.q_proj.weight", "Q*D,H", "attention", "attention"),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention", "attention"),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention", "attention"),
        Template("self_attn.o_proj.weight", "H,Q*D", "attention", "attention"),
        Template("feed_forward.router.weight", "E,H", "router", "moe"),
        *experts("moe", _EXPERTS),
        *mlp("feed_forward", "I", "dense mlp", "dense"),
    ),
    decoder=Decoder(norm="final_layernorm"),
    experts=_EXPERTS,
    symbols={
        "C": "mamba_d_conv",
        "D": lambda config: size(config, "hidden_size") // size(config, "num_attention_heads"),
        "H": "hidden_size",
        "I": "intermediate_size",
        "KV": "num_key_value_heads",
        "M": lambda config: size(config, "mamba_expand") * size(config, "hidden_size"),
        "N": "mamba_d_state",
        "Q": "num_attention_heads",
        "R": _rank,
        "V": "vocab_size",
    },
    types={
        **{
            key: TYPES[key]
            for key in TYPES
            if key not in ("attention_bias", "moe_intermediate_size", "rope_parameters")
        },
        **dict.fromkeys(
            ("attn_layer_offset", "attn_layer_period", "expert_layer_offset", "expert_layer_period"), "int"
        ),
        "intermediate_size": "int",
        "mamba_conv_bias": "bool",
        "mamba_d_conv": "int",
        "mamba_d_state": "int",
        "mamba_dt_rank": "int or str",
        "mamba_expand": "int",
        "mamba_proj_bias": "bool",
        "num_experts": "int",
        "router_aux_loss_coef": "float",
        "use_associative_scan": "bool",
        "use_mamba_kernels": "bool",
        "use_mambapy": "bool",
    },
    conditions={
        "attention": _is_attention,
        "conv bias": lambda config, layer: (
            bool(config.get("mamba_conv_bias", True)) and not _is_attention(config, layer)
        ),
        "dense": lambda config, layer: not _is_moe(config, layer),
        "mamba": lambda config, layer: not _is_attention(config, layer),
        "mamba bias": lambda config, layer: bool(config.get("mamba_proj_bias")) and not _is_attention(config, layer),
        "moe": _is_moe,
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    experts_norm="pre_ff_layernorm.weight",
    keep_16bit=("feed_forward.router", "mamba.conv1d", "mamba.x_proj", "mamba.dt_proj", "mamba.A_log"),
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "feed_forward.gate_up_proj": ("feed_forward.gate_proj", "feed_forward.up_proj"),
    },
)
