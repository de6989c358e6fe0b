"""DeepSeek-V3, Kimi-K2 and their kin: latent attention, dense first layers, grouped routing with a bias, MTP layers.

Names and shapes from the release of DeepSeek-V3 and transformers' `deepseek_v3`. The MTP layer follows the decoder
blocks under the next layer number. Releases in FP8 carry a `weight_scale_inv` beside each weight; see
`layout.COMPANIONS`. Kimi-K2 is the same class under a `model_type` that transformers does not know, and is run as the
first one.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    NORMS,
    TYPES,
    Config,
    Family,
    Mtp,
    Template,
    Wrapper,
    experts,
    mlp,
    size,
    tied,
    untied,
)
from shardxform.model.families.key_types import LATENT

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    return layer >= int(config.get("first_k_dense_replace", 0)) and layer % int(config.get("moe_layer_freq", 1)) == 0


def _has_query_rank(config: Config, _layer: int) -> bool:
    return config.get("q_lora_rank") is not None


_ATTENTION: Final = (
    Template("self_attn.q_proj.weight", "Q*N+Q*R,H", "attention", "full query"),
    Template("self_attn.q_a_proj.weight", "QA,H", "attention", "query rank"),
    Template("self_attn.q_a_proj.bias", "QA", "attention", "query rank", optional=True),
    Template("self_attn.q_a_layernorm.weight", "QA", "norms", "query rank"),
    Template("self_attn.q_b_proj.weight", "Q*N+Q*R,QA", "attention", "query rank"),
    Template("self_attn.kv_a_proj_with_mqa.weight", "KA+R,H", "attention"),
    Template("self_attn.kv_a_proj_with_mqa.bias", "KA+R", "attention", optional=True),
    Template("self_attn.kv_a_layernorm.weight", "KA", "norms"),
    Template("self_attn.kv_b_proj.weight", "Q*N+Q*VD,KA", "attention"),
    Template("self_attn.o_proj.weight", "H,Q*VD", "attention"),
    Template("self_attn.o_proj.bias", "H", "attention", optional=True),
    Template("self_attn.rotary_emb.inv_freq", "?", "attention", optional=True),
)

FAMILY: Final = Family(
    name="deepseek_v3",
    wrappers=(
        Wrapper("DeepseekV3ForCausalLM", "deepseek_v3", None, "model."),
        Wrapper("DeepseekV3ForCausalLM", "kimi_k2", None, "model."),
    ),
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *_ATTENTION,
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.gate.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    mtp=Mtp(
        count_key="num_nextn_predict_layers",
        prefix="{decoder}layers.{l}.",
        follows_blocks=True,
        like=lambda config: size(config, "num_hidden_layers"),  # it is numbered as the block after the last
        inputs=(
            "{decoder}layers.{l}.enorm.weight",
            "{decoder}layers.{l}.hnorm.weight",
            "{decoder}layers.{l}.eh_proj.weight",
            "{decoder}layers.{l}.shared_head.norm.weight",
        ),
        layer=(
            Template("eh_proj.weight", "H,2*H", "mtp"),
            Template("enorm.weight", "H", "mtp"),
            Template("hnorm.weight", "H", "mtp"),
            Template("embed_tokens.weight", "V,H", "mtp", optional=True),
            Template("shared_head.norm.weight", "H", "mtp"),
            Template("shared_head.head.weight", "V,H", "mtp", optional=True),
        ),
    ),
    symbols={
        "F": "intermediate_size",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KA": "kv_lora_rank",
        "N": "qk_nope_head_dim",
        "NS": "n_shared_experts",
        "Q": "num_attention_heads",
        "QA": "q_lora_rank",
        "R": "qk_rope_head_dim",
        "V": "vocab_size",
        "VD": "v_head_dim",
    },
    types={
        **TYPES,
        **LATENT,
        "attention_dropout": "float or int or null",
        "first_k_dense_replace": "int or null",
        "intermediate_size": "int",
        "n_group": "int or null",
        "n_routed_experts": "int",
        "n_shared_experts": "int",
        "norm_topk_prob": "bool or null",
        "num_experts_per_tok": "int or null",
        "num_key_value_heads": "int or null",
        "num_nextn_predict_layers": "int",
        "pretraining_tp": "int or null",
        "q_lora_rank": "int or null",
        "rope_interleave": "bool or null",
        "routed_scaling_factor": "float",
        "topk_group": "int or null",
        "v_head_dim": "int or null",
    },
    conditions={
        "dense": lambda config, layer: not _is_moe(config, layer),
        "full query": lambda config, layer: not _has_query_rank(config, layer),
        "moe": _is_moe,
        "query rank": _has_query_rank,
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    keep_16bit=("mlp.gate", "self_attn.kv_b_proj"),  # SGLang unpacks kv_b_proj as AWQ, which it is not
    merged={
        "self_attn.fused_qkv_a_proj_with_mqa": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "self_attn.fused_qkv_a_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "mlp.shared_experts.gate_up_proj": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
