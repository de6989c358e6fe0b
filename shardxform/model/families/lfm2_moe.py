"""LFM2-MoE: short convolutions and grouped attention, first layers dense, experts called w1, w3 and w2.

Names and shapes from the release of LFM2-8B-A1B and transformers' `lfm2_moe`, whose final norm is `embedding_norm`. The
router is a sigmoid with a bias for the choice alone.
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
    Role,
    Template,
    Wrapper,
    experts,
    size,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="feed_forward.experts", stacks=(), projections=("w1", "w3", "w2"))


def _head_dim(config: Config) -> int:
    if config.get("head_dim") is not None:
        return size(config, "head_dim")
    return size(config, "hidden_size") // size(config, "num_attention_heads")


def _is_attention(config: Config, layer: int) -> bool:
    types = config["layer_types"]
    if not isinstance(types, list):
        raise ValueError(f"layer_types: expected a list, found {types!r}")
    return layer >= 0 and types[layer] != "conv"


def _is_moe(config: Config, layer: int) -> bool:
    return layer >= int(config.get("num_dense_layers", 2))


def _untied(config: Config, layer: int) -> bool:
    tied = config.get("tie_embedding", config.get("tie_word_embeddings", True))
    return untied({"tie_word_embeddings": tied}, layer)


def _group(prefix: str, role: Role, when: str, *shapes: tuple[str, str]) -> tuple[Template, ...]:
    return tuple(Template(f"{prefix}.{name}", shape, role, when) for name, shape in shapes)


FAMILY: Final = Family(
    name="lfm2_moe",
    wrappers=(Wrapper("Lfm2MoeForCausalLM", "lfm2_moe", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    root=tuple(
        Template("{decoder}embedding_norm.weight", "H", "norms") if each.name == "{decoder}norm.weight" else each
        for each in EMBEDDINGS
    ),
    block=(
        Template("operator_norm.weight", "H", "norms"),
        Template("ffn_norm.weight", "H", "norms"),
        *_group("conv", "linear attention", "conv", ("conv.weight", "H,1,C"), ("in_proj.weight", "3*H,H")),
        *_group("conv", "linear attention", "conv", ("out_proj.weight", "H,H")),
        *_group("conv", "linear attention", "conv bias", ("conv.bias", "H"), ("in_proj.bias", "3*H")),
        *_group("conv", "linear attention", "conv bias", ("out_proj.bias", "H")),
        *_group("self_attn", "attention", "attention", ("q_proj.weight", "Q*D,H"), ("k_proj.weight", "KV*D,H")),
        *_group("self_attn", "attention", "attention", ("v_proj.weight", "KV*D,H"), ("out_proj.weight", "H,Q*D")),
        *_group("self_attn", "norms", "attention", ("q_layernorm.weight", "D"), ("k_layernorm.weight", "D")),
        Template("feed_forward.gate.weight", "E,H", "router", "moe"),
        Template("feed_forward.expert_bias", "E", "router", "expert bias"),
        *experts("moe", _EXPERTS),
        *_group("feed_forward", "dense mlp", "dense", ("w1.weight", "F,H"), ("w3.weight", "F,H"), ("w2.weight", "H,F")),
    ),
    decoder=Decoder(norm="embedding_norm"),
    experts=_EXPERTS,
    symbols={
        "C": "conv_L_cache",
        "D": _head_dim,
        "F": "intermediate_size",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    types={
        **{
            key: TYPES[key]
            for key in TYPES
            if key not in ("attention_bias", "attention_dropout", "hidden_act", "rms_norm_eps")
        },
        "conv_L_cache": "int",
        "conv_bias": "bool",
        "intermediate_size": "int",
        "layer_types": "list of str or null",
        "norm_eps": "float",
        "norm_topk_prob": "bool",
        "num_dense_layers": "int",
        "num_experts": "int",
        "routed_scaling_factor": "float",
        "use_expert_bias": "bool",
    },
    conditions={
        "attention": _is_attention,
        "conv": lambda config, layer: not _is_attention(config, layer),
        "conv bias": lambda config, layer: bool(config.get("conv_bias")) and not _is_attention(config, layer),
        "dense": lambda config, layer: not _is_moe(config, layer),
        "expert bias": lambda config, layer: bool(config.get("use_expert_bias", True)) and _is_moe(config, layer),
        "moe": _is_moe,
        "tied": lambda config, layer: not _untied(config, layer),
        "untied": _untied,
    },
    moe="moe",
    experts_norm="ffn_norm.weight",
    keep_16bit=("feed_forward.gate", "conv.conv"),
    formats=("compressed-tensors",),  # that of auto-round wants gate_proj, where vLLM wants w1
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3"),
    },
)
