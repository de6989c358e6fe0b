"""MiMo-V2-Flash: sliding layers with sinks and twice the key heads, narrow values, dense MTP layers.

Names and shapes from transformers' `mimo_v2_flash`, which calls the sinks otherwise, and vLLM's `mimo_v2_mtp`. Configs
of releases say by `hybrid_layer_pattern` and `moe_layer_freq` what those of transformers say by lists of words, and do
not count the MTP layers, which are sliding and dense.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    HEADS,
    NORMS,
    Config,
    Family,
    Mtp,
    Template,
    Wrapper,
    conditions,
    experts,
    is_sparse,
    merged,
    mlp,
    size,
    types,
)

__all__ = ["FAMILY"]


def _is_block(config: Config, layer: int) -> bool:
    return layer < size(config, "num_hidden_layers")


def _is_moe(config: Config, layer: int) -> bool:
    listed = config.get("moe_layer_freq")
    if config.get("mlp_layer_types") is None and isinstance(listed, list):
        return _is_block(config, layer) and bool(listed[layer])
    return _is_block(config, layer) and is_sparse(config, layer, dense=1)


def _is_sliding(config: Config, layer: int) -> bool:
    kinds, pattern = config.get("layer_types"), config.get("hybrid_layer_pattern")
    if not _is_block(config, layer):
        return True
    if kinds is not None:
        return bool(kinds[layer] == "sliding_attention")
    return bool(pattern[layer]) if pattern is not None else layer != 0 and (layer + 1) % 6 != 0


def _key_heads(config: Config, layer: int) -> int:
    if not _is_sliding(config, layer):
        return size(config, "num_key_value_heads")
    given = config.get("swa_num_key_value_heads") is not None
    return size(config, "swa_num_key_value_heads") if given else 2 * size(config, "num_key_value_heads")


FAMILY: Final = Family(
    name="mimo_v2_flash",
    wrappers=(Wrapper("MiMoV2FlashForCausalLM", "mimo_v2_flash", None, "model."),),
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        NORMS[0],
        Template("post_attention_layernorm.weight", "H", "norms", "block"),
        Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.v_proj.weight", "KV*VD,H", "attention"),
        Template("self_attn.o_proj.weight", "H,Q*VD", "attention"),
        Template("self_attn.q_proj.bias", "Q*D", "attention", "attention bias"),
        Template("self_attn.k_proj.bias", "KV*D", "attention", "attention bias"),
        Template("self_attn.v_proj.bias", "KV*VD", "attention", "attention bias"),
        Template("self_attn.attention_sink_bias", "Q", "attention", "sliding"),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.gate.e_score_correction_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    renames=(("self_attn.attention_sink_bias", "self_attn.sinks"),),
    mtp=Mtp(
        count_key="num_nextn_predict_layers",
        prefix="model.mtp.layers.{l}.",
        follows_blocks=False,
        like=lambda config: size(config, "num_hidden_layers"),
        inputs=(
            "model.mtp.layers.{l}.enorm.weight",
            "model.mtp.layers.{l}.hnorm.weight",
            "model.mtp.layers.{l}.eh_proj.weight",
            "model.mtp.layers.{l}.final_layernorm.weight",
        ),
        layer=(
            Template("pre_mlp_layernorm.weight", "H", "mtp"),
            Template("enorm.weight", "H", "mtp"),
            Template("hnorm.weight", "H", "mtp"),
            Template("eh_proj.weight", "H,2*H", "mtp"),
            Template("final_layernorm.weight", "H", "mtp"),
        ),
        uncounted=True,
    ),
    symbols={
        **{symbol: meaning for symbol, meaning in HEADS.items() if symbol != "KV"},
        "F": "intermediate_size",
        "I": "moe_intermediate_size",
        "VD": "v_head_dim",
    },
    layer_symbols={"KV": _key_heads},
    types=types(
        attention_value_scale="float or null",
        head_dim="int",
        intermediate_size="int",
        layer_types="list of str or null",
        mlp_layer_types="list of str or null",
        n_group="int",
        n_routed_experts="int",
        norm_topk_prob="bool",
        routed_scaling_factor="float or null",
        sliding_window="int",
        topk_group="int",
        v_head_dim="int",
    ),
    conditions=conditions(_is_moe, block=_is_block, sliding=_is_sliding),
    moe="moe",
    keep_16bit=("mlp.gate",),
    formats=("compressed-tensors",),  # that of auto-round replaces the model's attention by one for other code
    merged=merged("mlp"),
)
