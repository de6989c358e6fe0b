"""MiniMax-M3: blocks of keys selected by an indexer, clamped gates, shared experts, a vision tower, MTP layers.

Names from the releases, by transformers' `minimax_m3_vl` and vLLM's reading of MTP layers. Experts' outputs are
multiplied by the router's weight and by `routed_scaling_factor`, one number for all; scores are without it. The text
type of transformers knows the names of modules alone, so there is no text-only view of a release.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    GROUPED_ATTENTION,
    NORMS,
    TYPES,
    Config,
    ExpertLayout,
    Family,
    Mtp,
    Symbol,
    Template,
    Wrapper,
    experts,
    linear,
    mlp,
    normed,
    size,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="block_sparse_moe.experts", stacks=(), projections=("w1", "w3", "w2"))


def _of_indexer(key: str, legacy: str) -> Symbol:
    """A size of the indexer: that of releases counts."""
    return lambda config: size({key: (config.get("sparse_attention_config") or {}).get(legacy, config.get(key))}, key)


def _listed(config: Config, key: str, kind: str, flags: object, *, default: bool) -> list[bool]:
    """Whether each block is of a kind, by a list of kinds or by the flags of releases."""
    if config.get(key) is not None:
        return [each == kind for each in config[key]]
    return [bool(each) for each in flags] if isinstance(flags, list) else [default] * size(config, "num_hidden_layers")


def _is_moe(config: Config, layer: int) -> bool:
    return _listed(config, "mlp_layer_types", "sparse", config.get("moe_layer_freq"), default=True)[layer]


def _selects(config: Config, layer: int) -> bool:
    flags = (config.get("sparse_attention_config") or {}).get("sparse_attention_freq")
    return _listed(config, "layer_types", "minimax_m3_sparse", flags, default=False)[layer]


def _last_whole(config: Config) -> int:
    """The last block with experts and an indexer, as MTP layers have both."""
    layers = range(size(config, "num_hidden_layers"))
    return max((each for each in layers if _is_moe(config, each) and _selects(config, each)), default=layers[-1])


_TOWER: Final = "vision_tower.vision_model"
_LAYER: Final = f"{_TOWER}.encoder.layers.{{b}}"
_VISION: Final = (
    *(each for name in ("q", "k", "v", "out") for each in linear(f"{_LAYER}.self_attn.{name}_proj", "VH,VH")),
    *linear(f"{_LAYER}.mlp.fc1", "VI,VH"),
    *linear(f"{_LAYER}.mlp.fc2", "VH,VI"),
    *normed(f"{_LAYER}.layer_norm1", "VH"),
    *normed(f"{_LAYER}.layer_norm2", "VH"),
    *normed(f"{_TOWER}.pre_layrnorm", "VH"),
    Template(f"{_TOWER}.embeddings.patch_embedding.weight", "?", "vision"),
    *(
        Template(f"{module}.linear_{number}.{part}", "?", "vision")
        for module in ("multi_modal_projector", "patch_merge_mlp")
        for number in (1, 2)
        for part in ("weight", "bias")
    ),
)
_SHARED: Final = "block_sparse_moe.shared_experts"
_MTP: Final = "{decoder}mtp.layers.{l}."

FAMILY: Final = Family(
    name="minimax_m3_vl",
    wrappers=(
        Wrapper(
            "MiniMaxM3SparseForConditionalGeneration",
            "minimax_m3_vl",
            "text_config",
            "language_model.model.",
            vision=True,
            head="language_model.lm_head",
        ),
    ),
    count_keys=("num_local_experts", "num_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
        *(each for each in GROUPED_ATTENTION if each.when != "attention bias"),
        Template("self_attn.index_q_proj.weight", "IQ*ID,H", "indexer", "indexer"),
        Template("self_attn.index_k_proj.weight", "ID,H", "indexer", "indexer"),
        Template("self_attn.index_q_norm.weight", "ID", "norms", "indexer"),
        Template("self_attn.index_k_norm.weight", "ID", "norms", "indexer"),
        Template("block_sparse_moe.gate.weight", "E,H", "router", "moe"),
        Template("block_sparse_moe.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe", _EXPERTS),
        *mlp(_SHARED, "S", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    experts=_EXPERTS,
    split={"gate_up_proj": ("gate_proj", "up_proj")},
    renames=(
        ("block_sparse_moe.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        (f"{_SHARED}.gate_proj", "mlp.shared_experts.gate_up_proj.gate_proj"),
        (f"{_SHARED}.up_proj", "mlp.shared_experts.gate_up_proj.up_proj"),
        (f"{_SHARED}.down_proj", "mlp.shared_experts.down_proj"),
        ("mlp.gate_proj", "mlp.gate_up_proj.gate_proj"),
        ("mlp.up_proj", "mlp.gate_up_proj.up_proj"),
        ("block_sparse_moe.gate", "mlp.gate"),
        ("block_sparse_moe.experts", "mlp.experts"),
        ("self_attn.index_", "self_attn.indexer."),
    ),
    mtp=Mtp(
        count_key="num_mtp_modules",
        prefix=_MTP,
        inner="transformer_layer.",
        follows_blocks=False,
        like=_last_whole,
        inputs=(
            f"{_MTP}enorm.weight",
            f"{_MTP}hnorm.weight",
            f"{_MTP}eh_proj.weight",
            f"{_MTP}final_layernorm.weight",
        ),
        layer=(
            Template("eh_proj.weight", "H,2*H", "mtp"),
            *(Template(f"{name}.weight", "H", "mtp") for name in ("enorm", "final_layernorm", "hnorm")),
        ),
    ),
    vision=_VISION,
    vision_prefix=("vision_tower.", "multi_modal_projector.", "patch_merge_mlp."),
    vision_depth_key="num_hidden_layers",
    vision_sidecars=("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    symbols={
        "D": "head_dim",
        "F": "dense_intermediate_size",
        "H": "hidden_size",
        "I": "intermediate_size",
        "ID": _of_indexer("index_head_dim", "sparse_index_dim"),
        "IQ": _of_indexer("index_n_heads", "sparse_num_index_heads"),
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "S": "shared_intermediate_size",
        "V": "vocab_size",
    },
    vision_symbols={"VH": "hidden_size", "VI": "intermediate_size"},
    types={
        **{key: value for key, value in TYPES.items() if key not in ("attention_bias", "moe_intermediate_size")},
        **dict.fromkeys(("dense_intermediate_size", "intermediate_size", "shared_intermediate_size"), "int"),
        **dict.fromkeys(("head_dim", "rotary_dim", "num_local_experts", "index_block_size", "index_head_dim"), "int"),
        **dict.fromkeys(("index_local_blocks", "index_n_heads", "index_topk_blocks"), "int"),
        **dict.fromkeys(("layer_types", "mlp_layer_types"), "list of str or null"),
        **dict.fromkeys(("routed_scaling_factor", "router_aux_loss_coef", "router_jitter_noise"), "float"),
        **dict.fromkeys(("swiglu_alpha", "swiglu_limit"), "float"),
    },
    vision_types={
        **dict.fromkeys(("attention_dropout", "initializer_range", "layer_norm_eps"), "float"),
        "hidden_act": "str",
        **dict.fromkeys(("hidden_size", "image_size", "intermediate_size", "num_attention_heads"), "int"),
        **dict.fromkeys(("num_channels", "num_hidden_layers", "patch_size", "spatial_merge_size"), "int"),
        "rope_parameters": "object or null",
        "temporal_patch_size": "int",
    },
    wrapper_types={
        **dict.fromkeys(("image_token_index", "projector_hidden_size", "video_token_index"), "int"),
        **dict.fromkeys(("text_config", "vision_config"), "object or null"),
        "tie_word_embeddings": "bool",
    },
    conditions={
        "attention": lambda _config, _layer: True,
        "dense": lambda config, layer: not _is_moe(config, layer),
        "indexer": _selects,
        "moe": _is_moe,
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    keep_16bit=("block_sparse_moe.gate", "self_attn.index_*"),
    # That of auto-round wants gate_proj for w1; that of transformers joins two shared projections, but not their parts.
    formats=(),
    unread="auto-round looks for gate_proj where there is w1, and transformers leaves shared gates and ups apart",
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        f"{_SHARED}.gate_up_proj": (f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
