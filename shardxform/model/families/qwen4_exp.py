"""Qwen3.8-Flash-Next: Qwen3.5's experts and linear attention between hyper-connections, n-gram tables beside blocks.

Names and shapes from transformers' `qwen4_exp`. Tables of n-grams (`ple`) are copied as they are. What an MTP layer has
of hyper-connections and of an indexer is left open.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families import qwen3_5_moe
from shardxform.model.families.base import (
    GROUPED_ATTENTION,
    TYPES,
    Config,
    Family,
    Template,
    Wrapper,
    experts,
    mlp,
    tied,
    untied,
)
from shardxform.model.families.key_types import LINEAR

__all__ = ["FAMILY"]

_LIKE: Final = qwen3_5_moe.FAMILY
assert _LIKE.mtp is not None


def _is_linear(config: Config, layer: int) -> bool:
    kinds = config.get("layer_types")
    if kinds is None:
        return layer >= 0 and (layer + 1) % int(config.get("full_attention_interval", 4)) != 0
    return layer >= 0 and kinds[layer] == "linear_attention"


def _mixer(home: str, when: str, injects: bool = True) -> tuple[Template, ...]:
    optional = when == "no block"
    parts = (("hc_norm", "HC*H"), ("input_mix_weight_down", "HR,HC*H"), ("input_mix_weight_up", "HC*H,HR"))
    more = (("block_inject_weight", "HC,HC*H"),) if injects else ()
    return tuple(
        Template(f"{home}.{name}.weight", shape, "norms", when, optional=optional) for name, shape in parts + more
    )


def _indexer(when: str) -> tuple[Template, ...]:
    home, optional = "self_attn.indexer", when == "no block"
    return (
        Template(f"{home}.index_qk_proj.weight", "IQ*ID+IKV*ID,H", "attention", when, optional=optional),
        Template(f"{home}.q_layernorm.weight", "ID", "norms", when, optional=optional),
        Template(f"{home}.k_layernorm.weight", "ID", "norms", when, optional=optional),
    )


def _is_indexed(config: Config, layer: int) -> bool:
    return layer >= 0 and not _is_linear(config, layer) and config.get("indexer_n_heads") is not None


FAMILY: Final = Family(
    name="qwen4_exp",
    wrappers=(
        Wrapper("Qwen4ExpForConditionalGeneration", "qwen4_exp", "text_config", "model.language_model."),
        Wrapper("Qwen4ExpForCausalLM", "qwen4_exp_text", None, "model."),
    ),
    count_keys=("num_experts", "num_local_experts"),
    root=(
        Template("{decoder}embed_tokens.weight", "V,H", "embeddings"),
        *_mixer("{decoder}hyper_connection_mixer", "", injects=False),
        Template("{head}.weight", "V,H", "lm head", "untied"),
        Template("{head}.weight", "V,H", "lm head", "tied", optional=True),
    ),
    block=(
        *(
            each
            for home in ("attn", "mlp")
            for when in ("block", "no block")
            for each in _mixer(f"{home}_hyper_connection", when)
        ),
        *(each for each in _LIKE.block if each.name.startswith("linear_attn.")),
        Template("self_attn.q_proj.weight", "2*Q*D,H", "attention", "attention"),
        *(each for each in GROUPED_ATTENTION if not each.name.endswith("bias")),
        *_indexer("indexed"),
        *_indexer("no block"),
        Template("input_layernorm.weight", "H", "norms", "no block", optional=True),
        Template("post_attention_layernorm.weight", "H", "norms", "no block", optional=True),
        Template("mlp.gate.weight", "E,H", "router"),
        *experts(),
        *mlp("mlp.shared_expert", "S", "shared experts"),
        Template("mlp.shared_expert_gate.weight", "1,H", "shared experts"),
    ),
    mtp=replace(_LIKE.mtp, like=lambda _config: -1),
    towers=(
        Template("*.ple.*", "?", "embeddings", optional=True),
        Template("model.visual.*", "?", "vision", optional=True),
    ),
    symbols={
        **{key: value for key, value in _LIKE.symbols.items() if key != "QR"},
        "HC": "hc_count",
        "HR": "hc_lowrank",
        "ID": "indexer_head_dim",
        "IKV": "indexer_kv_heads",
        "IQ": "indexer_n_heads",
    },
    types={
        **TYPES,
        **LINEAR,
        "hc_count": "int",
        "hc_lowrank": "int",
        "head_dim": "int",
        "heads_per_ngram": "int",
        "indexer_budget": "int or null",
        "indexer_compress_ratio": "int or null",
        "indexer_head_dim": "int or null",
        "indexer_kv_heads": "int or null",
        "indexer_n_heads": "int or null",
        "layer_types": "list of str or null",
        "make_ngram_vocab_size_divisible_by": "int",
        "ngram_size": "int",
        "ngram_vocab_size_base": "int",
        "norm_topk_prob": "bool",
        "num_experts": "int",
        "output_gate_type": "str or null",
        "ple_conv_kernel_size": "int",
        "ple_embed_dim": "int or null",
        "ple_layer_ids": "list of int or null",
        "router_aux_loss_coef": "float",
        "seed": "int",
        "shared_expert_intermediate_size": "int",
        "split_ngram_parts": "int",
    },
    vision_types={
        **{key: TYPES[key] for key in ("hidden_act", "hidden_size", "initializer_range", "rope_parameters")},
        "depth": "int",
        "in_channels": "int",
        "intermediate_size": "int",
        "num_heads": "int",
        "num_position_embeddings": "int",
        "out_hidden_size": "int",
        "patch_size": "int or list of int",
        "spatial_merge_size": "int",
        "temporal_patch_size": "int or list of int",
    },
    wrapper_types={
        **{key: TYPES[key] for key in ("tie_word_embeddings",)},
        "image_token_id": "int",
        "text_config": "object or null",
        "video_token_id": "int",
        "vision_config": "object or null",
        "vision_end_token_id": "int",
        "vision_start_token_id": "int",
    },
    conditions={
        "attention": lambda config, layer: not _is_linear(config, layer),
        "block": lambda _config, layer: layer >= 0,
        "indexed": _is_indexed,
        "linear attention": _is_linear,
        "no block": lambda _config, layer: layer < 0,
        "tied": tied,
        "untied": untied,
    },
    keep_16bit=_LIKE.keep_16bit,
    merged=_LIKE.merged,
    formats=("auto-round", "gptq"),  # that of compressed-tensors wants stacks
    fused_release=True,
    bfloat16_only=True,
    not_run="its blocks hand on four residual streams [B, T, 4 * H], and some want the tokens before",
)
