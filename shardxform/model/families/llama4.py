"""Llama 4: experts stacked and transposed, one a token beside a shared one, dense blocks between, a vision tower.

Names and shapes from the releases and transformers' `llama4`. The router's weight multiplies what goes into an expert,
so that what comes out is added as it is: scores are made of it, with a weight of one.
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
    linear,
    mlp,
    normed,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="feed_forward.experts", transposed=True, weighs_inputs=True)


def _is_moe(config: Config, layer: int) -> bool:
    if config.get("moe_layers") is not None:
        return layer in config["moe_layers"]
    return (layer + 1) % int(config.get("interleave_moe_layer_step", 1)) == 0


_LAYER: Final = "vision_model.model.layers.{b}"
_VISION: Final = (
    *(each for name in "qkvo" for each in linear(f"{_LAYER}.self_attn.{name}_proj", "VH,VH")),
    *linear(f"{_LAYER}.mlp.fc1", "VI,VH"),
    *linear(f"{_LAYER}.mlp.fc2", "VH,VI"),
    *normed(f"{_LAYER}.input_layernorm", "VH"),
    *normed(f"{_LAYER}.post_attention_layernorm", "VH"),
    *normed("vision_model.layernorm_pre", "VH"),
    *normed("vision_model.layernorm_post", "VH"),
    Template("vision_model.class_embedding", "VH", "vision"),
    Template("vision_model.positional_embedding_vlm", "?", "vision"),
    Template("vision_model.patch_embedding.linear.weight", "?", "vision"),
    Template("vision_model.vision_adapter.mlp.fc1.weight", "?", "vision"),
    Template("vision_model.vision_adapter.mlp.fc2.weight", "?", "vision"),
    Template("multi_modal_projector.linear_1.weight", "?", "vision"),
)

FAMILY: Final = Family(
    name="llama4",
    wrappers=(
        Wrapper(
            "Llama4ForConditionalGeneration",
            "llama4",
            "text_config",
            "language_model.model.",
            vision=True,
            head="language_model.lm_head",
        ),
        Wrapper("Llama4ForCausalLM", "llama4_text", None, "model."),
    ),
    count_keys=("num_local_experts", "num_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.o_proj.weight", "H,Q*D", "attention"),
        Template("self_attn.q_proj.bias", "Q*D", "attention", "attention bias"),
        Template("self_attn.k_proj.bias", "KV*D", "attention", "attention bias"),
        Template("self_attn.v_proj.bias", "KV*D", "attention", "attention bias"),
        Template("self_attn.o_proj.bias", "H", "attention", "attention bias"),
        Template("feed_forward.router.weight", "E,H", "router", "moe"),
        *experts("moe", _EXPERTS),
        *mlp("feed_forward.shared_expert", "I", "shared experts", "moe"),
        *mlp("feed_forward", "F", "dense mlp", "dense"),
    ),
    experts=_EXPERTS,
    vision=_VISION,
    vision_prefix=("vision_model.", "multi_modal_projector."),
    vision_depth_key="num_hidden_layers",
    vision_sidecars=("preprocessor_config.json", "processor_config.json"),
    symbols={
        "D": "head_dim",
        "F": "intermediate_size_mlp",
        "H": "hidden_size",
        "I": "intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    vision_symbols={"VH": "hidden_size", "VI": "intermediate_size"},
    types={
        **{key: value for key, value in TYPES.items() if key != "moe_intermediate_size"},
        "attention_chunk_size": "int or null",
        **dict.fromkeys(("attn_scale", "router_aux_loss_coef", "router_jitter_noise"), "float"),
        **dict.fromkeys(("attn_temperature_tuning", "use_qk_norm"), "bool"),
        **dict.fromkeys(("floor_scale", "head_dim", "interleave_moe_layer_step", "no_rope_layer_interval"), "int"),
        **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "num_local_experts"), "int"),
        "layer_types": "list of str or null",
        **dict.fromkeys(("moe_layers", "no_rope_layers"), "list of int or null"),
    },
    vision_types={
        "attention_dropout": "float or int",
        **dict.fromkeys(("hidden_act", "vision_feature_select_strategy"), "str"),
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_channels"), "int"),
        **dict.fromkeys(("image_size", "patch_size"), "int or list of int"),
        **dict.fromkeys(("initializer_range", "norm_eps", "pixel_shuffle_ratio"), "float"),
        "multi_modal_projector_bias": "bool",
        **dict.fromkeys(("num_hidden_layers", "projector_input_dim", "projector_output_dim"), "int"),
        "projector_dropout": "float or int",
        "rope_parameters": "object or null",
        "vision_output_dim": "int",
    },
    wrapper_types={
        **dict.fromkeys(("boi_token_index", "eoi_token_index", "image_token_index"), "int"),
        **dict.fromkeys(("text_config", "vision_config"), "object or null"),
        "tie_word_embeddings": "bool",
    },
    conditions={
        "attention bias": lambda config, _layer: bool(config.get("attention_bias")),
        "dense": lambda config, layer: not _is_moe(config, layer),
        "moe": _is_moe,
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    keep_16bit=("feed_forward.router",),
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "feed_forward.shared_expert.gate_up_proj": (
            "feed_forward.shared_expert.gate_proj",
            "feed_forward.shared_expert.up_proj",
        ),
        "feed_forward.gate_up_proj": ("feed_forward.gate_proj", "feed_forward.up_proj"),
    },
    formats=("compressed-tensors",),  # loaders of the others leave the stacks as they are
    fused_release=True,
)
