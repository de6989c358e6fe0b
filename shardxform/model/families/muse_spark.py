"""Muse-Spark-Open: experts between projections into a narrower space, gates on the residual stream.

Names and shapes from transformers' `muse_spark`.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    TYPES,
    Config,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    experts,
    mlp,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(width="L")


def _is_moe(config: Config, layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    return layer >= 0 and (kinds is None or kinds[layer] == "sparse")


FAMILY: Final = Family(
    name="muse_spark",
    wrappers=(Wrapper("MuseSparkForConditionalGeneration", "muse_spark", "text_config", "model.language_model."),),
    count_keys=("num_local_experts", "num_experts"),
    root=EMBEDDINGS,
    block=(
        Template("input_layernorm.weight", "H", "norms"),
        Template("pre_feedforward_layernorm.weight", "H", "norms"),
        Template("post_feedforward_layernorm.weight", "H", "norms"),
        Template("post_attention_residual_gate.gate", "H", "norms"),
        Template("post_feedforward_residual_gate.gate", "H", "norms"),
        Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.gate_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.o_proj.weight", "H,Q*D", "attention"),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.gate.e_score_correction_bias", "E", "router", "moe"),
        Template("mlp.pre_expert_proj.weight", "L,H", "shared experts", "moe"),
        Template("mlp.pre_expert_norm.weight", "L", "norms", "moe"),
        Template("mlp.experts.post_expert_norm.weight", "L", "norms", "moe"),
        Template("mlp.post_expert_proj.weight", "H,L", "shared experts", "moe"),
        *experts("moe", _EXPERTS),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    experts=_EXPERTS,
    towers=tuple(
        Template(f"model.{part}.*", "?", "vision", optional=True)
        for part in ("audio_tower", "vision_tower", "vision_adapter", "vision_projection")
    ),
    symbols={
        "D": "head_dim",
        "F": "intermediate_size",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": "num_key_value_heads",
        "L": "moe_hidden_size",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    types={
        **TYPES,
        "attention_dropout": "float or int or null",
        "final_logit_softcapping": "float",
        "head_dim": "int",
        "intermediate_size": "int",
        "layer_rope_theta": "list of float or list of int or null",
        "layer_types": "list of str or null",
        "mlp_layer_types": "list of str or null",
        "moe_hidden_size": "int",
        "num_local_experts": "int",
        "output_multiplier": "float",
        "post_norm_eps": "float",
        "qk_scale_factor": "float",
        "residual_gate_temperature": "float",
        "routed_scaling_factor": "float",
        "sliding_window": "int or null",
    },
    vision_types={
        **{
            key: TYPES[key]
            for key in (
                "hidden_act",
                "hidden_size",
                "max_position_embeddings",
                "num_attention_heads",
                "num_hidden_layers",
                "rope_parameters",
            )
        },
        "intermediate_size": "int",
        "layer_norm_eps": "float",
        "layer_types": "list of str or null",
        "merge_size": "int",
        "patch_size": "int",
        "patch_temporal": "int",
        "pos_emb_height": "int",
        "pos_emb_width": "int",
    },
    wrapper_types={
        "audio_config": "object or null",
        "audio_token_id": "int",
        "image_token_id": "int",
        "out_hidden_size": "int",
        "projector_hidden_act": "str",
        "projector_hidden_size": "int",
        "text_config": "object or null",
        "video_token_id": "int",
        "vision_config": "object or null",
    },
    conditions={
        "dense": lambda config, layer: not _is_moe(config, layer),
        "moe": _is_moe,
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    fused_release=True,
    formats=(),
    unread="auto-round's loader leaves the norm after the experts out, that of compressed-tensors the experts",
    not_run="a norm follows each expert, and transformers has no class of its decoder alone",
)
