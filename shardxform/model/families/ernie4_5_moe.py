"""ERNIE-4.5: a correction bias [1, E] beside the router, shared experts as one MLP, MTP layers without experts.

Names and shapes from the release of ERNIE-4.5-21B-A3B and transformers' `ernie4_5_moe`; those of MTP layers, which
transformers has no code for, from the releases' names in other engines: dense blocks, with norms and projection apart.
The router multiplies with softmax scores, renormalised over the chosen; the bias only chooses.
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
)

__all__ = ["FAMILY"]

_UNKNOWN: Final = ("attention_bias", "attention_dropout", "num_experts_per_tok")


def _is_moe(config: Config, layer: int) -> bool:
    start, end = int(config.get("moe_layer_start_index", 1)), int(config.get("moe_layer_end_index", -1))
    return (
        layer >= max(start, 0) and (end < 0 or layer <= end) and (layer + 1) % config.get("moe_layer_interval", 1) == 0
    )


def _head_dim(config: Config) -> int:
    if config.get("head_dim") is not None:
        return size(config, "head_dim")
    return size(config, "hidden_size") // size(config, "num_attention_heads")


def _tied(config: Config, _layer: int) -> bool:
    return bool(config.get("tie_word_embeddings", True))


def _mtp(name: str) -> str:
    return f"{{decoder}}mtp_{name}.{{l}}.weight"


FAMILY: Final = Family(
    name="ernie4_5_moe",
    wrappers=(Wrapper("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", None, "model."),),
    count_keys=("moe_num_experts", "num_experts"),
    top_k_key="moe_k",
    root=EMBEDDINGS,
    block=(
        *NORMS,
        Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention"),
        Template("self_attn.o_proj.weight", "H,Q*D", "attention"),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        Template("mlp.moe_statics.e_score_correction_bias", "1,E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "shared"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    renames=(("mlp.moe_statics.", "mlp.gate.moe_statics."),),
    mtp=Mtp(
        count_key="num_nextn_predict_layers",
        prefix="{decoder}mtp_block.{l}.",
        follows_blocks=False,
        like=lambda _config: -1,  # dense, whatever the blocks are
        inputs=(_mtp("emb_norm"), _mtp("hidden_norm"), _mtp("linear_proj"), "{decoder}norm.weight"),
        root=(
            Template(_mtp("emb_norm"), "H", "mtp"),
            Template(_mtp("hidden_norm"), "H", "mtp"),
            Template(_mtp("linear_proj"), "H,2*H", "mtp"),
        ),
    ),
    symbols={
        "D": _head_dim,
        "F": "intermediate_size",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": "num_key_value_heads",
        "NS": "moe_num_shared_experts",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    types={
        **{key: value for key, value in TYPES.items() if key not in _UNKNOWN},
        "intermediate_size": "int",
        "moe_k": "int or null",
        "moe_layer_end_index": "int or null",
        "moe_layer_interval": "int or null",
        "moe_layer_start_index": "int or null",
        "moe_norm_min": "float or null",
        "moe_num_experts": "int or null",
        "moe_num_shared_experts": "int or null",
        "num_key_value_heads": "int or null",
        "output_router_logits": "bool or null",
        "router_aux_loss_coef": "float or null",
        "use_bias": "bool or null",
    },
    conditions={
        "dense": lambda config, layer: not _is_moe(config, layer),
        "moe": _is_moe,
        "shared": lambda config, layer: _is_moe(config, layer) and bool(config.get("moe_num_shared_experts")),
        "tied": _tied,
        "untied": lambda config, layer: not _tied(config, layer),
    },
    moe="moe",
    keep_16bit=("mlp.gate",),
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.shared_experts.gate_up_proj": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
