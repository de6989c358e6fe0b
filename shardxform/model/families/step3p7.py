"""Step-3.5-Flash and Step-3.7-Flash: stacks of gate and up projection apart, more heads where attention slides.

Names and shapes from the releases (remote code `step3p5`) and transformers' `step3p7`, which nests the former's config.
MTP layers are numbered on after the decoder blocks, and are dense.
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
    Mtp,
    Template,
    Wrapper,
    experts,
    mlp,
    size,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(stacks=("gate_proj", "up_proj", "down_proj"), stack_home="moe", gate="separate")

_OF_VISION: Final = (
    *("attention_dropout", "hidden_act", "hidden_size", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "rope_parameters"),
)


def _entry(config: Config, key: str, layer: int, default: str) -> str:
    """What a list says of a block, or, beside it or at its end, of an MTP layer, all of which are alike."""
    blocks, layers = config.get(key), size(config, "num_hidden_layers")
    if layer >= layers:
        more = config.get(f"mtp_{key}")
        return str(more[0] if more else blocks[layers] if blocks and len(blocks) > layers else default)
    return str(blocks[layer]) if blocks and layer >= 0 else default


def _is_moe(config: Config, layer: int) -> bool:
    listed = config.get("moe_layers_enum")
    if config.get("mlp_layer_types"):
        return _entry(config, "mlp_layer_types", layer, "dense") == "sparse"
    if listed is None:
        return 3 <= layer < size(config, "num_hidden_layers")
    numbers = listed.split(",") if isinstance(listed, str) else listed
    return layer in {int(each) for each in numbers if str(each).strip()}


def _slides(config: Config, layer: int) -> bool:
    return _entry(config, "layer_types", layer, "full_attention") == "sliding_attention"


def _heads(config: Config) -> int:
    if config.get("num_sliding_attention_heads") is not None:
        return size(config, "num_sliding_attention_heads")
    return size({**config, **(config.get("attention_other_setting") or {})}, "num_attention_heads")


def _either(config: Config, *keys: str) -> int:
    return size(config, next((key for key in keys if config.get(key) is not None), keys[0]))


def _queries(heads: str, when: str) -> tuple[Template, ...]:
    return (
        Template("self_attn.q_proj.weight", f"{heads}*D,H", "attention", when),
        Template("self_attn.g_proj.weight", f"{heads},H", "attention", when),
        Template("self_attn.o_proj.weight", f"H,{heads}*D", "attention", when),
    )


FAMILY: Final = Family(
    name="step3p7",
    wrappers=(
        Wrapper("Step3p7ForConditionalGeneration", "step3p7", "text_config", "model."),
        Wrapper("Step3p5ForCausalLM", "step3p5", None, "model."),
    ),
    count_keys=("moe_num_experts", "n_routed_experts", "num_local_experts"),
    top_k_key="moe_top_k",
    other_top_k_keys=("num_experts_per_tok",),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *_queries("Q", "full"),
        *_queries("QS", "sliding"),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.q_norm.weight", "D", "norms"),
        Template("self_attn.k_norm.weight", "D", "norms"),
        Template("moe.gate.weight", "E,H", "router", "moe"),
        Template("moe.router_bias", "E", "router", "moe"),
        *experts("moe", _EXPERTS),
        *mlp("share_expert", "S", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    experts=_EXPERTS,
    renames=(
        ("moe.gate.", "mlp.gate."),
        ("moe.router_bias", "mlp.gate.e_score_correction_bias"),
        ("share_expert.", "mlp.shared_experts."),
    ),
    mtp=Mtp(
        count_key="num_nextn_predict_layers",
        prefix="{decoder}layers.{l}.",
        follows_blocks=True,
        like=lambda config: size(config, "num_hidden_layers"),
        inputs=(
            "{decoder}layers.{l}.enorm.weight",
            "{decoder}layers.{l}.hnorm.weight",
            "{decoder}layers.{l}.eh_proj.weight",
            "{decoder}layers.{l}.transformer.shared_head.norm.weight",
        ),
        layer=(
            Template("eh_proj.weight", "H,2*H", "mtp"),
            Template("enorm.weight", "H", "mtp"),
            Template("hnorm.weight", "H", "mtp"),
            Template("transformer.shared_head.norm.weight", "H", "mtp"),
            Template("transformer.shared_head.output.weight", "V,H", "mtp", optional=True),
        ),
    ),
    towers=(
        Template("vision_model.*", "?", "vision", optional=True),
        Template("vit_large_projector.*", "?", "vision", optional=True),
    ),
    symbols={
        "D": "head_dim",
        "F": "intermediate_size",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": lambda config: _either(config, "num_key_value_heads", "num_attention_groups"),
        "Q": "num_attention_heads",
        "QS": _heads,
        "S": lambda config: _either(config, "share_expert_dim", "share_expert_dims"),
        "V": "vocab_size",
    },
    types={
        **TYPES,
        "head_dim": "int",
        "intermediate_size": "int",
        "layer_types": "list of str or null",
        "mlp_bias": "bool",
        "mlp_layer_types": "list of str or null",
        "moe_router_scaling_factor": "float",
        "mtp_layer_types": "list of str or null",
        "mtp_mlp_layer_types": "list of str or null",
        "n_routed_experts": "int",
        "num_local_experts": "int",
        "num_sliding_attention_heads": "int or null",
        "pad_token_id": "int",
        "query_pre_attn_scalar": "float or int or null",
        "share_expert_dim": "int",
        "sliding_window": "int or null",
        "swiglu_limits": "list of float or list of int or list of null or null",
        "swiglu_limits_shared": "list of float or list of int or list of null or null",
    },
    vision_types={
        **{key: TYPES[key] for key in _OF_VISION},
        "image_size": "int",
        "intermediate_size": "int",
        "layer_norm_eps": "float",
        "layer_scale_init_value": "float",
        "mlp_ratio": "float",
        "num_channels": "int",
        "patch_size": "int",
    },
    wrapper_types={
        "image_token_id": "int",
        "projector_bias": "bool",
        "text_config": "object or null",
        "vision_config": "object or null",
    },
    conditions={
        "dense": lambda config, layer: not _is_moe(config, layer),
        "full": lambda config, layer: not _slides(config, layer),
        "moe": _is_moe,
        "sliding": _slides,
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    keep_16bit=("moe.gate",),
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "share_expert.gate_up_proj": ("share_expert.gate_proj", "share_expert.up_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    pads_lists=True,
    fused_release=True,
    formats=(),
    unread="neither transformers' loaders nor vLLM's take its experts one by one",
    not_run="transformers has no class of its decoder alone",
)
