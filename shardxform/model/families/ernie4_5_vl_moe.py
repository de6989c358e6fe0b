"""ERNIE-4.5-VL: two sets of experts in one numbering, those of text tokens before the narrower ones of vision tokens.

Names and shapes from transformers' `ernie4_5_vl_moe`, and from vLLM's loader of the releases, whose configs are flat
and give a count for each set. Each set has a router of its own, [H, E], and a row of the correction biases [2, E];
shared experts are as wide as so many of text. A manifest names experts by the numbers that their tensors have, as many
of either set: clients read one count for both.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
    Config,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    conditions,
    experts,
    merged,
    mlp,
    size,
    types,
)
from shardxform.model.families.key_types import MULTIMODAL, TOWER

__all__ = ["FAMILY"]

_CLASS: Final = "Ernie4_5_VLMoeForConditionalGeneration"
_EXPERTS: Final = ExpertLayout(stacks=())  # transformers stacks each set, and saves neither so
_PARTS: Final = ("vision_model.", "model.vision_model.", "model.resampler_model.")


def _one(value: object, key: str) -> int:
    """What a list says of both sets alike."""
    one = value[0] if isinstance(value, list) and value and value == value[:1] * len(value) else value
    if type(one) is not int:
        raise ValueError(f"{key}: expected one number for both sets of experts, found {value!r}")
    return one


def _is_moe(config: Config, layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    if kinds is not None:
        return layer >= 0 and kinds[layer] == "sparse"
    start = _one(config.get("moe_layer_start_index", 1), "moe_layer_start_index")
    last = size(config, "num_hidden_layers") - 1
    end = _one(config.get("moe_layer_end_index") or last, "moe_layer_end_index")
    return max(start, 0) <= layer <= end and (layer + 1) % config.get("moe_layer_interval", 1) == 0


def _width(config: Config, of_set: int) -> int:
    widths = config.get("moe_intermediate_size") or [1536, 512]
    if not isinstance(widths, list) or [type(each) for each in widths] != [int, int]:
        raise ValueError(f"moe_intermediate_size: expected a size for each of two sets of experts, found {widths!r}")
    return int(widths[of_set])


FAMILY: Final = Family(
    name="ernie4_5_vl_moe",
    wrappers=(
        Wrapper(_CLASS, "ernie4_5_vl_moe", "text_config", "model.", vision=True),
        Wrapper(_CLASS, "ernie4_5_moe_vl", None, "model.", vision=True),
    ),
    count_keys=("moe_num_experts", "num_experts"),
    top_k_key="moe_k",
    sets=("text", "vision"),
    listed_counts=True,
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *(each for each in ATTENTION if not each.when),  # releases have no biases
        Template("mlp.gate.weight", "H,E", "router", "moe", sets=(0,)),
        Template("mlp.gate.weight_1", "H,E", "router", "moe", sets=(1,)),
        Template("mlp.moe_statics.e_score_correction_bias", "2,E", "router", "moe", sets=(0, 1)),
        *experts("moe", _EXPERTS),
        *mlp("mlp.shared_experts", "NS*IT", "shared experts", "shared"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    experts=_EXPERTS,
    towers=tuple(Template(f"{part}*", "?", "vision", optional=True) for part in _PARTS),
    vision_prefix=_PARTS,
    symbols={
        **HEADS,
        "F": "intermediate_size",
        "IT": lambda config: _width(config, 0),
        "NS": "moe_num_shared_experts",
    },
    set_symbols={"I": _width},
    types=types(
        "attention_bias",
        "attention_dropout",
        "num_experts_per_tok",
        intermediate_size="int",
        mlp_layer_types="list of str or null",
        moe_intermediate_size="list of int or null",
        moe_k="int or null",
        moe_norm_min="float or null",
        moe_num_experts="int or null",
        moe_num_shared_experts="int or null",
        num_key_value_heads="int or null",
        output_router_logits="bool or null",
        router_aux_loss_coef="float or null",
        use_bias="bool or null",
    ),
    vision_types={
        **TOWER,
        "depth": "int",
        "in_channels": "int",
        "num_heads": "int",
        "patch_size": "int or list of int",
        "rms_norm_eps": "float",
        "spatial_merge_size": "int",
        "temporal_merge_size": "int",
    },
    wrapper_types={
        **MULTIMODAL,
        "image_end_token_id": "int",
        "image_start_token_id": "int",
        "video_end_token_id": "int",
        "video_start_token_id": "int",
        "video_token_id": "int",
    },
    conditions=conditions(
        _is_moe, shared=lambda config, layer: _is_moe(config, layer) and bool(config.get("moe_num_shared_experts", 2))
    ),
    moe="moe",
    tied_by_default=True,
    keep_16bit=("mlp.gate",),
    merged=merged("mlp.shared_experts", "mlp"),
    formats=(),
    unread="transformers finds neither of its sets of experts one by one, and vLLM calls their routers otherwise",
    not_run="its blocks want to know which tokens are text and which vision, and have a router for each",
)
