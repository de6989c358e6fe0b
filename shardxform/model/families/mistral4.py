"""Mistral-Small-4: latent attention, stacked experts, softmax over groups of experts, beside a vision tower.

Names and shapes from transformers' `mistral4` and, of the release, `mistral3` around it, whose FP8 has one scale for
each stacked expert. Mistral's own layout of files (`consolidated`) is not read.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families import deepseek_v3
from shardxform.model.families.base import NORMS, TYPES, Family, Template, Wrapper, experts, mlp
from shardxform.model.families.key_types import LATENT, MULTIMODAL, TOWER

__all__ = ["FAMILY"]

_LIKE: Final = deepseek_v3.FAMILY
_BLOCK: Final = "vision_tower.transformer.layers.{b}"
_VISION: Final = (
    *(Template(f"{_BLOCK}.attention.{each}_proj.weight", "VH,VH", "vision") for each in "qkvo"),
    *(Template(f"{_BLOCK}.{each}_norm.weight", "VH", "vision") for each in ("attention", "ffn")),
    *(Template(f"{_BLOCK}.feed_forward.{each}_proj.weight", "VI,VH", "vision") for each in ("gate", "up")),
    Template(f"{_BLOCK}.feed_forward.down_proj.weight", "VH,VI", "vision"),
    Template("vision_tower.ln_pre.weight", "VH", "vision"),
    Template("vision_tower.patch_conv.weight", "?", "vision"),
    Template("multi_modal_projector.norm.weight", "VH", "vision"),
    Template("multi_modal_projector.patch_merger.merging_layer.weight", "?", "vision"),
    *(Template(f"multi_modal_projector.linear_{each}.weight", "?", "vision") for each in (1, 2)),
)

FAMILY: Final = Family(
    name="mistral4",
    wrappers=(
        Wrapper(
            "Mistral3ForConditionalGeneration",
            "mistral3",
            "text_config",
            "language_model.model.",
            vision=True,
            head="language_model.lm_head",
        ),
        Wrapper("Mistral4ForCausalLM", "mistral4", None, "model."),
    ),
    tied_by_default=True,  # by the class of the release, whose own says so
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    root=_LIKE.root,
    block=(
        *NORMS,
        *(each for each in _LIKE.block if each.name.startswith("self_attn.")),
        Template("mlp.gate.weight", "E,H", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_experts", "NS*I", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
    ),
    vision=_VISION,
    vision_prefix=("vision_tower.", "multi_modal_projector."),
    vision_depth_key="num_hidden_layers",
    vision_sidecars=("preprocessor_config.json", "processor_config.json"),
    vision_symbols={"VH": "hidden_size", "VI": "intermediate_size"},
    symbols=_LIKE.symbols,
    types={
        **TYPES,
        **LATENT,
        "attention_dropout": "float or int or null",
        "first_k_dense_replace": "int or null",
        "intermediate_size": "int",
        "n_group": "int or null",
        "n_routed_experts": "int",
        "n_shared_experts": "int",
        "norm_topk_prob": "bool or null",
        "num_experts_per_tok": "int or null",
        "num_key_value_heads": "int or null",
        "pretraining_tp": "int or null",
        "q_lora_rank": "int or null",
        "rope_interleave": "bool or null",
        "routed_scaling_factor": "float",
        "topk_group": "int or null",
        "v_head_dim": "int or null",
    },
    vision_types={
        **TOWER,
        "attention_dropout": "float or int",
        "image_size": "int or list of int",
        "num_attention_heads": "int",
        "num_channels": "int",
        "num_hidden_layers": "int",
        "patch_size": "int or list of int",
        "rope_parameters": "object or null",
    },
    wrapper_types={
        **{key: value for key, value in MULTIMODAL.items() if key != "image_token_id"},
        "image_token_index": "int",
        "multimodal_projector_bias": "bool",
        "projector_hidden_act": "str",
        "spatial_merge_size": "int",
        "vision_feature_layer": "int or list of int",
    },
    conditions=_LIKE.conditions,
    moe="moe",
    keep_16bit=_LIKE.keep_16bit,
    merged=_LIKE.merged,
    formats=("auto-round", "gptq"),  # that of compressed-tensors wants stacks
    run_from=(5, 15),  # older ones leave out what scaled positions multiply the logits of attention with
    fused_release=True,
)
