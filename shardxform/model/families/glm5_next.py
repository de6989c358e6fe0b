"""GLM-5.3-Flash: four residual streams, linear attention and attention with an indexer, experts beside a clamp.

Names and shapes from transformers' `glm5_next`. The MTP layer is numbered on after the decoder blocks; whether it has
streams of its own is left open.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families import deepseek_v3
from shardxform.model.families.base import (
    EMBEDDINGS,
    NORMS,
    TYPES,
    Config,
    Family,
    Template,
    Wrapper,
    conditions,
    experts,
    mlp,
    size,
)
from shardxform.model.families.key_types import INDEXER, LATENT, ROUTED, STREAMS, TOWER

__all__ = ["FAMILY"]

_LIKE: Final = deepseek_v3.FAMILY
assert _LIKE.mtp is not None


def _is_linear(config: Config, layer: int) -> bool:
    kinds = config.get("layer_types")
    if kinds is None or layer >= size(config, "num_hidden_layers"):
        return layer < size(config, "num_hidden_layers") and layer % 4 != 3
    return layer >= 0 and kinds[layer] == "linear_attention"


def _is_moe(config: Config, layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    if kinds is None or layer >= len(kinds):
        return layer >= int(config.get("first_k_dense_replace", 3))
    return layer >= 0 and kinds[layer] == "sparse"


def _has_indexer(config: Config, layer: int) -> bool:
    kinds = config.get("indexer_types")
    shared = kinds is not None and 0 <= layer < len(kinds) and kinds[layer] == "shared"
    return not _is_linear(config, layer) and not shared


def _is_block(config: Config, layer: int) -> bool:
    return layer < size(config, "num_hidden_layers")


_STREAMS: Final = tuple(
    Template(f"hc_{name}_{part}", shape, "norms", when, optional=when != "block")
    for name in ("attn", "ffn")
    for part, shape in (("base", "SS"), ("fn", "SS,S*H"), ("scale", "3"))
    for when in ("block", "no block")
)
_LINEAR: Final = (
    *(Template(f"self_attn.{part}_proj.weight", "LN*LD,H", "linear attention", "linear") for part in "qkv"),
    *(Template(f"self_attn.{part}_conv1d.weight", "LN*LD,1,C", "linear attention", "linear") for part in "qkv"),
    *(Template(f"self_attn.{part}_a_proj.weight", "LD,H", "linear attention", "linear") for part in "fg"),
    *(Template(f"self_attn.{part}_b_proj.weight", "LN*LD,LD", "linear attention", "linear") for part in "fg"),
    Template("self_attn.b_proj.weight", "LN,H", "linear attention", "linear"),
    Template("self_attn.A_log", "LN", "linear attention", "linear"),
    Template("self_attn.dt_bias", "LN*LD", "linear attention", "linear"),
    Template("self_attn.o_norm.weight", "LD", "norms", "linear"),
    Template("self_attn.o_proj.weight", "H,LN*LD", "linear attention", "linear"),
)
_INDEXED: Final = (
    Template("self_attn.q_a_proj.weight", "QA,H", "attention", "indexed"),
    Template("self_attn.q_a_layernorm.weight", "QA", "norms", "indexed"),
    Template("self_attn.q_b_proj.weight", "Q*N+Q*R,QA", "attention", "indexed"),
    Template("self_attn.kv_a_proj_with_mqa.weight", "KA+R,H", "attention", "indexed"),
    Template("self_attn.kv_a_layernorm.weight", "KA", "norms", "indexed"),
    Template("self_attn.kv_b_proj.weight", "Q*N+Q*VD,KA", "attention", "indexed"),
    Template("self_attn.o_proj.weight", "H,Q*VD", "attention", "indexed"),
    Template("self_attn.indexer.wq_b.weight", "IQ*ID,QA", "attention", "indexer"),
    Template("self_attn.indexer.wk.weight", "ID,H", "attention", "indexer"),
    Template("self_attn.indexer.weights_proj.weight", "IQ,H", "attention", "indexer"),
    Template("self_attn.indexer.k_norm.weight", "ID", "norms", "indexer"),
    Template("self_attn.indexer.k_norm.bias", "ID", "norms", "indexer"),
    Template("self_attn.indexer.index_kpool_compress_ape", "IK,ID", "attention", "indexer"),
    Template("self_attn.indexer.index_kpool_compress_gate", "ID,H", "attention", "indexer"),
)

FAMILY: Final = Family(
    name="glm5_next",
    wrappers=(Wrapper("Glm5NextForConditionalGeneration", "glm5_next", "text_config", "model.language_model."),),
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *_STREAMS,
        *_LINEAR,
        *_INDEXED,
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.gate.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    renames=(
        ("self_attn.f_a_proj", "self_attn.forget_gate.f_a_proj"),
        ("self_attn.f_b_proj", "self_attn.forget_gate.f_b_proj"),
    ),
    mtp=replace(_LIKE.mtp, count_key="num_nextn_predict_layers"),
    towers=(Template("model.visual.*", "?", "vision", optional=True),),
    symbols={
        **_LIKE.symbols,
        "C": "linear_conv_kernel_dim",
        "ID": "index_head_dim",
        "IK": "index_kpool",
        "IQ": "index_n_heads",
        "LD": "linear_head_dim",
        "LN": "linear_num_heads",
        "S": "hc_mult",
        "SS": lambda config: size(config, "hc_mult") * (2 + size(config, "hc_mult")),
    },
    types={
        **{key: value for key, value in TYPES.items() if key not in ("rope_parameters",)},
        **STREAMS,
        **INDEXER,
        **LATENT,
        **ROUTED,
        "head_dim": "int",
        "index_kpool": "int",
        "index_kpool_always_select_tail": "bool",
        "indexer_types": "list of str or null",
        "intermediate_size": "int",
        "layer_types": "list of str or null",
        "linear_conv_kernel_dim": "int",
        "linear_head_dim": "int",
        "linear_lower_bound": "float or null",
        "linear_num_heads": "int",
        "mlp_layer_types": "list of str or null",
        "q_lora_rank": "int",
        "router_aux_loss_coef": "float",
        "v_head_dim": "int",
    },
    vision_types={
        **TOWER,
        **{key: TYPES[key] for key in ("attention_bias", "attention_dropout", "rms_norm_eps")},
        "depth": "int",
        "image_size": "int or list of int",
        "in_channels": "int",
        "num_heads": "int",
        "out_hidden_size": "int",
        "patch_size": "int or list of int",
        "projection_intermediate_size": "int",
        "spatial_merge_size": "int",
        "swiglu_limit": "float",
        "temporal_patch_size": "int or list of int",
    },
    wrapper_types={
        **{key: TYPES[key] for key in ("tie_word_embeddings",)},
        "image_end_token_id": "int",
        "image_start_token_id": "int",
        "image_token_id": "int",
        "text_config": "object or null",
        "video_end_token_id": "int",
        "video_start_token_id": "int",
        "video_token_id": "int",
        "vision_config": "object or null",
    },
    conditions={
        **conditions(_is_moe, block=_is_block),
        "indexed": lambda config, layer: not _is_linear(config, layer),
        "indexer": _has_indexer,
        "linear": _is_linear,
        "no block": lambda config, layer: not _is_block(config, layer),
    },
    moe="moe",
    keep_16bit=("mlp.gate", "self_attn.kv_b_proj", "self_attn.indexer.weights_proj", "self_attn.b_proj"),
    merged={
        "self_attn.fused_qkv_a_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "mlp.shared_experts.gate_up_proj": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    formats=("auto-round", "gptq"),  # transformers' conversion of what compressed-tensors packs fails
    not_run="its blocks hand on four residual streams [B, T, 4, H] and the positions that an indexer chose",
)
