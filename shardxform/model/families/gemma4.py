"""Gemma 4 (26B-A4B): sliding and full attention, in every block a dense MLP beside fused experts, a vision tower.

Names and shapes from transformers' `gemma4`. Full attention has heads of another size, and no projection of values
where these are the keys. A token's router weights sum to one and are then multiplied by `per_expert_scale`, one per
expert: what reaches the experts, and what scores weigh by. Per-layer inputs and layers that share keys, as the dense
Gemma 4 have them, are in no release with experts, and refused.
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
    size,
    tied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="experts")
_OTHER_TYPES: Final = ("hidden_act", "num_experts_per_tok", "output_router_logits")
_OF_DENSE: Final = {"hidden_size_per_layer_input": 256, "num_kv_shared_layers": 0, "use_double_wide_mlp": False}


def _is_full(config: Config, layer: int) -> bool:
    types, last = config.get("layer_types"), size(config, "num_hidden_layers") - 1
    if types is not None and not isinstance(types, list):
        raise ValueError(f"layer_types: expected a list, found {types!r}")
    if layer < 0 or layer == last:  # transformers forces the last one
        return layer == last
    return types[layer] == "full_attention" if types is not None else (layer + 1) % 6 == 0


def _is_moe(config: Config, _layer: int) -> bool:
    for key, default in _OF_DENSE.items():
        if config.get(key, default):
            raise ValueError(f"{key} {config.get(key, default)}: expected none in a model with experts")
    return bool(config.get("enable_moe_block"))


def _of_full(config: Config, key: str, own: str, default: int) -> int:
    """A size of full attention under a key of its own, or as transformers 5 writes it, per layer where it differs."""
    layers: dict[str, dict[str, int]] | None = config.get("per_layer_config")
    if layers is None:
        found = config.get(own)
        return default if found is None else size({key: found}, key)
    full = next((each for layer, each in layers.items() if _is_full(config, int(layer))), {})
    return size({key: full.get(key, config.get(key))}, key)


def _full_heads(config: Config) -> int:
    own = "num_global_key_value_heads" if config.get("attention_k_eq_v") else ""
    return _of_full(config, "num_key_value_heads", own, size(config, "num_key_value_heads"))


def _attention(when: str, dim: str, heads: str) -> tuple[Template, ...]:
    """Norms, queries, keys and outputs of a kind of attention; the values' projection is apart."""
    return (
        Template("self_attn.q_proj.weight", f"Q*{dim},H", "attention", when),
        Template("self_attn.k_proj.weight", f"{heads}*{dim},H", "attention", when),
        Template("self_attn.o_proj.weight", f"H,Q*{dim}", "attention", when),
        Template("self_attn.q_norm.weight", dim, "norms", when),
        Template("self_attn.k_norm.weight", dim, "norms", when),
    )


_NORMS: Final = (
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
)
_LINEARS: Final = (
    *(("self_attn.q_proj", "VQ*VD,VH"), ("self_attn.k_proj", "VK*VD,VH"), ("self_attn.v_proj", "VK*VD,VH")),
    *(("self_attn.o_proj", "VH,VQ*VD"), ("mlp.gate_proj", "VI,VH")),
    *(("mlp.up_proj", "VI,VH"), ("mlp.down_proj", "VH,VI")),
)
_BOUNDS: Final = ("input_min", "input_max", "output_min", "output_max")  # of clipped linear modules, where there are
_BLOCK: Final = "model.vision_tower.encoder.layers.{b}."
_VISION: Final = (
    *(Template(f"model.vision_tower.{name}", "VH", "vision", optional=True) for name in ("std_bias", "std_scale")),
    Template("model.vision_tower.patch_embedder.position_embedding_table", "2,VP,VH", "vision"),
    Template("model.vision_tower.patch_embedder.input_proj.weight", "VH,3*VS*VS", "vision"),
    *(Template(f"{_BLOCK}{name}.linear.weight", shape, "vision") for name, shape in _LINEARS),
    *(Template(f"{_BLOCK}{n}.{bound}", "?", "vision", optional=True) for n, _ in _LINEARS for bound in _BOUNDS),
    *(Template(f"{_BLOCK}{name}", "VH", "vision") for name in _NORMS),
    *(Template(f"{_BLOCK}self_attn.{name}_norm.weight", "VD", "vision") for name in "qk"),
    Template("model.embed_vision.embedding_projection.weight", "?", "vision"),
)

FAMILY: Final = Family(
    name="gemma4",
    wrappers=(
        Wrapper("Gemma4ForConditionalGeneration", "gemma4", "text_config", "model.language_model.", vision=True),
        Wrapper("Gemma4ForCausalLM", "gemma4_text", None, "model."),
    ),
    count_keys=("num_experts",),
    top_k_key="top_k_experts",
    root=EMBEDDINGS,
    block=(
        *(Template(name, "H", "norms") for name in _NORMS),
        *_attention("sliding", "D", "KV"),
        *_attention("full", "FD", "FK"),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention", "sliding"),
        Template("self_attn.v_proj.weight", "FK*FD,H", "attention", "full values"),
        *(Template(f"self_attn.{name}_proj.bias", "?", "attention", optional=True) for name in "qkvo"),
        *mlp("mlp", "F", "dense mlp"),
        Template("layer_scalar", "1", "norms"),
        Template("post_feedforward_layernorm_1.weight", "H", "norms", "moe"),
        Template("post_feedforward_layernorm_2.weight", "H", "norms", "moe"),
        Template("pre_feedforward_layernorm_2.weight", "H", "norms", "moe"),
        Template("router.proj.weight", "E,H", "router", "moe"),
        Template("router.per_expert_scale", "E", "router", "moe"),
        Template("router.scale", "H", "router", "moe"),
        *experts("moe", _EXPERTS),
    ),
    experts=_EXPERTS,
    vision=_VISION,
    vision_prefix=("model.vision_tower.", "model.embed_vision."),
    vision_depth_key="num_hidden_layers",
    vision_sidecars=("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    symbols={
        "D": "head_dim",
        "F": "intermediate_size",
        "FD": lambda config: _of_full(config, "head_dim", "global_head_dim", 512),
        "FK": _full_heads,
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    vision_symbols={
        "VD": "head_dim",
        "VH": "hidden_size",
        "VI": "intermediate_size",
        "VK": "num_key_value_heads",
        "VP": "position_embedding_size",
        "VQ": "num_attention_heads",
        "VS": "patch_size",
    },
    types={
        **{key: TYPES[key] for key in TYPES if key not in _OTHER_TYPES},
        "attention_dropout": "float or int or null",
        **dict.fromkeys(("attention_k_eq_v", "enable_moe_block", "use_double_wide_mlp"), "bool"),
        "final_logit_softcapping": "float or null",
        **dict.fromkeys(("head_dim", "hidden_size_per_layer_input", "intermediate_size"), "int"),
        **dict.fromkeys(("num_kv_shared_layers", "sliding_window", "vocab_size_per_layer_input"), "int"),
        "hidden_activation": "str",
        "layer_types": "list of str or null",
        **dict.fromkeys(("moe_intermediate_size", "num_experts", "top_k_experts"), "int or null"),
        "use_bidirectional_attention": "str or null",
    },
    vision_types={
        "attention_bias": "bool or null",
        "attention_dropout": "float or null",
        **dict.fromkeys(("head_dim", "hidden_size", "intermediate_size", "max_position_embeddings"), "int"),
        **dict.fromkeys(("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "patch_size"), "int"),
        **dict.fromkeys(("pooling_kernel_size", "position_embedding_size"), "int"),
        **dict.fromkeys(("initializer_range", "rms_norm_eps"), "float"),
        "hidden_activation": "str",
        "rope_parameters": "object or null",
        **dict.fromkeys(("standardize", "use_clipped_linears"), "bool"),
    },
    wrapper_types={
        **dict.fromkeys(("audio_config", "text_config", "vision_config"), "object or null"),
        **dict.fromkeys(("audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_index"), "int or null"),
        **dict.fromkeys(("eoi_token_id", "image_token_id", "video_token_id"), "int or null"),
        "initializer_range": "float or null",
        "tie_word_embeddings": "bool",
    },
    tied_by_default=True,
    conditions={
        "full": _is_full,
        "full values": lambda config, layer: not config.get("attention_k_eq_v") and _is_full(config, layer),
        "moe": _is_moe,
        "sliding": lambda config, layer: not _is_full(config, layer),
        "tied": lambda config, layer: tied({"tie_word_embeddings": True, **config}, layer),
        "untied": lambda config, layer: not tied({"tie_word_embeddings": True, **config}, layer),
    },
    moe="moe",
    experts_norm="pre_feedforward_layernorm_2.weight",
    keep_16bit=("router.proj",),
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    formats=("auto-round", "gptq"),  # transformers finds no experts of compressed-tensors that are not under an MLP
    fused_release=True,
)
