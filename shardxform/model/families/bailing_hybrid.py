"""Ling 3: Kimi delta attention and some layers of gated latent attention, grouped routing with a bias, MTP layers.

Names and shapes from the release's own code (`BailingMoeV3ForCausalLM`) and transformers' `bailing_hybrid`. That knows
`q_lora_rank` from 5.24 on, so that Ling-3.0-tiny cannot be run with an older one, and saves some config keys, and the
output projection of delta attention, under names of its own. Ling 2.5 shares the model_type, but has another
architecture, by which it is refused.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    NORMS,
    Config,
    Decoder,
    Family,
    Mtp,
    Symbol,
    Template,
    Wrapper,
    experts,
    mlp,
    size,
)
from shardxform.model.families.delta import LATENT_SYMBOLS, LATENT_TYPES, UNREAD, delta_conditions

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    if kinds is not None and layer < len(kinds):
        return bool(kinds[layer] == "sparse")
    return layer >= int(config.get("first_k_dense_replace", 2))


def _is_latent(config: Config, layer: int) -> bool:
    """Whether a block has latent attention: the last of each group, those of a group that is cut short, MTP layers."""
    kinds, group, blocks = (
        config.get("layer_types"),
        config.get("layer_group_size", 6),
        size(config, "num_hidden_layers"),
    )
    if kinds is not None and layer < len(kinds):
        return bool(kinds[layer] == "full_attention")
    return bool((layer + 1) % group == 0 or layer >= blocks // group * group)


def _either(*keys: str) -> Symbol:
    """Size under the first of the keys that is there: transformers saves some under names of its own."""
    return lambda config: size(config, next((key for key in keys if config.get(key) is not None), keys[-1]))


_DELTA: Final = tuple(
    Template(f"attention.{name}", shape, "linear attention", "delta")
    for name, shape in (
        ("A_log", "LQ"),
        ("b_proj.weight", "LQ,H"),
        ("dt_bias", "LQ*LD"),
        *((f"{name}_conv1d.weight", "LQ*LD,1,C") for name in "qkv"),
        *((f"{name}_proj.weight", "LQ*LD,H") for name in "fgkqv"),
        ("o_norm.weight", "LD"),
        ("o_proj.weight", "H,LQ*LD"),
    )
)
_LATENT: Final = (
    Template("attention.dense.bias", "H", "attention", "latent bias"),
    Template("attention.dense.weight", "H,Q*VD", "attention", "latent"),
    Template("attention.g_proj.weight", "Q,H", "attention", "latent"),
    Template("attention.kv_a_layernorm.weight", "KA", "norms", "latent"),
    Template("attention.kv_a_proj_with_mqa.bias", "KA+R", "attention", "latent bias"),
    Template("attention.kv_a_proj_with_mqa.weight", "KA+R,H", "attention", "latent"),
    Template("attention.kv_b_proj.weight", "Q*N+Q*VD,KA", "attention", "latent"),
    Template("attention.q_a_layernorm.weight", "QA", "norms", "query rank"),
    Template("attention.q_a_proj.weight", "QA,H", "attention", "query rank"),
    Template("attention.q_b_proj.weight", "Q*N+Q*R,QA", "attention", "query rank"),
    Template("attention.q_proj.weight", "Q*N+Q*R,H", "attention", "full query"),
)

FAMILY: Final = Family(
    name="bailing_hybrid",
    wrappers=(
        Wrapper("BailingHybridForCausalLM", "bailing_hybrid", None, "model."),
        Wrapper("BailingMoeV3ForCausalLM", "bailing_hybrid", None, "model."),
    ),
    count_keys=("num_experts", "num_local_experts"),
    group_key="n_group",
    aliases={"num_expert_group": "n_group", "num_experts_per_token": "num_experts_per_tok"},
    decoder=Decoder(embeddings="word_embeddings", attributes=(("word_embeddings", "embed_tokens"),)),
    root=(
        Template("{decoder}word_embeddings.weight", "V,H", "embeddings"),
        Template("{decoder}norm.weight", "H", "norms"),
        Template("{head}.weight", "V,H", "lm head", "untied"),
        Template("{head}.weight", "V,H", "lm head", "tied", optional=True),
    ),
    block=(
        *NORMS,
        *_DELTA,
        Template("attention.dense.weight", "H,LQ*LD", "linear attention", "delta", instead="attention.o_proj.weight"),
        *_LATENT,
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.gate.expert_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*S", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    renames=(
        ("attention.A_log", "self_attn.forget_gate.A_log"),
        ("attention.dt_bias", "self_attn.forget_gate.dt_bias"),
        ("attention.f_proj", "self_attn.forget_gate.f_proj"),
        ("attention.dense", "self_attn.o_proj"),
        ("attention.", "self_attn."),
        ("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),
    ),
    joined={"self_attn.conv1d.weight": tuple(f"attention.{name}_conv1d.weight" for name in "qkv")},
    mtp=Mtp(
        count_key="num_nextn_predict_layers",
        prefix="{decoder}layers.{l}.",
        follows_blocks=True,
        like=lambda config: size(config, "num_hidden_layers"),  # it is numbered as the block after the last
        inputs=(
            "{decoder}layers.{l}.enorm.weight",
            "{decoder}layers.{l}.hnorm.weight",
            "{decoder}layers.{l}.eh_proj.weight",
            "{decoder}layers.{l}.final_layernorm.weight",
        ),
        layer=(
            Template("eh_proj.weight", "H,2*H", "mtp"),
            Template("enorm.weight", "H", "mtp"),
            Template("hnorm.weight", "H", "mtp"),
            Template("final_layernorm.weight", "H", "mtp"),
        ),
    ),
    symbols={
        **LATENT_SYMBOLS,
        "C": _either("linear_conv_kernel_dim", "short_conv_kernel_size"),
        "LD": _either("linear_head_dim", "head_dim"),
        "LQ": _either("linear_num_heads", "num_attention_heads"),
        "S": _either("moe_shared_expert_intermediate_size", "moe_intermediate_size"),
    },
    types={
        **LATENT_TYPES,
        "attention_dropout": "float",
        "first_k_dense_replace": "int",
        "head_dim": "int",
        "kda_lower_bound": "float",
        "kda_safe_gate": "bool",
        "layer_group_size": "int",
        "mtp_loss_scaling_factor": "float or int",
        "n_group": "int",
        "norm_topk_prob": "bool",
        "num_nextn_predict_layers": "int",
        "q_lora_rank": "int or null",
        "rope_theta": "float or int",
        "short_conv_kernel_size": "int",
        "topk_group": "int",
        "v_head_dim": "int",
    },
    conditions=delta_conditions(_is_latent, _is_moe),
    moe="moe",
    keep_16bit=("mlp.gate", "attention.kv_b_proj"),
    formats=(),
    unread=UNREAD,
    merged={
        "attention.qkvb_proj": tuple(f"attention.{name}_proj" for name in "qkvb"),
        "attention.fused_qkv_a_proj": ("attention.q_a_proj", "attention.kv_a_proj_with_mqa"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.shared_experts.gate_up_proj": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    },
)
