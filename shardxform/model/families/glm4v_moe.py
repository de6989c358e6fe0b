"""GLM-4.5V and GLM-4.6V: GLM-4.5-Air's decoder beside a vision tower; there is no class of the text alone.

Names and shapes from transformers' `glm4v_moe`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families.base import Template, Wrapper, linear, normed
from shardxform.model.families.glm4_moe import FAMILY as GLM4_MOE
from shardxform.model.families.key_types import MULTIMODAL, VIDEO

__all__ = ["FAMILY"]

_BLOCK: Final = "model.visual.blocks.{b}"
_VISION: Final = (
    *(
        Template(f"{_BLOCK}.{name}.weight", shape, "vision")
        for name, shape in (
            ("attn.proj", "VH,VH"),
            ("attn.qkv", "3*VH,VH"),
            ("mlp.gate_proj", "VO,VH"),
            ("mlp.up_proj", "VO,VH"),
            ("mlp.down_proj", "VH,VO"),
            ("norm1", "VH"),
            ("norm2", "VH"),
        )
    ),
    *(
        Template(f"model.visual.{name}.weight", shape, "vision")
        for name, shape in (
            ("embeddings.position_embedding", "?"),
            ("merger.down_proj", "VO,VI"),
            ("merger.gate_proj", "VI,VO"),
            ("merger.proj", "VO,VO"),
            ("merger.up_proj", "VI,VO"),
            ("patch_embed.proj", "?"),
            ("post_conv_layernorm", "VH"),
            ("post_layernorm", "VH"),
        )
    ),
    *linear("model.visual.downsample", "VO,VH,M,M"),
    *normed("model.visual.merger.post_projection_norm", "VO"),
    Template("model.visual.patch_embed.proj.bias", "VH", "vision"),
)

FAMILY: Final = replace(
    GLM4_MOE,
    name="glm4v_moe",
    wrappers=(
        Wrapper("Glm4vMoeForConditionalGeneration", "glm4v_moe", "text_config", "model.language_model.", vision=True),
    ),
    block=tuple(each for each in GLM4_MOE.block if each.when != "head norms"),
    vision=_VISION,
    vision_prefix="model.visual.",
    vision_sidecars=("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    vision_symbols={"M": "spatial_merge_size", "VH": "hidden_size", "VI": "intermediate_size", "VO": "out_hidden_size"},
    types={
        **{k: v for k, v in GLM4_MOE.types.items() if k not in ("num_nextn_predict_layers", "use_qk_norm")},
        "router_aux_loss_coef": "float",
    },
    vision_types={
        **VIDEO,
        "attention_bias": "bool",
        "attention_dropout": "float or int",
        "image_size": "int or list of int",
        "rms_norm_eps": "float",
    },
    wrapper_types={
        **MULTIMODAL,
        **dict.fromkeys(("image_end_token_id", "image_start_token_id"), "int"),
        **dict.fromkeys(("video_end_token_id", "video_start_token_id", "video_token_id"), "int"),
    },
    conditions={
        **{name: holds for name, holds in GLM4_MOE.conditions.items() if name != "head norms"},
        "attention bias": lambda config, _layer: bool(config.get("attention_bias", True)),
    },
)
