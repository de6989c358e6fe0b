"""Qwen3-VL-MoE: Qwen3-MoE's decoder with its experts stacked and transposed, and a vision tower with deep merges.

Names and shapes from the releases and transformers' `qwen3_vl_moe`, which turns stacks around where their shapes are
not those of its modules, and saves them as they are there: such a checkpoint is not this family's. There is no class
of the text alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families.base import ExpertLayout, Template, Wrapper, experts
from shardxform.model.families.qwen3_5_moe import FAMILY as QWEN3_5_MOE
from shardxform.model.families.qwen3_moe import FAMILY as QWEN3_MOE

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(transposed=True)
_NOT_ITS_OWN: Final = ("norm_topk_prob", "num_experts", "sliding_window", "use_sliding_window")

_MERGER: Final = "model.visual.deepstack_merger_list.{b}"
_DEEP_MERGES: Final = tuple(  # after some blocks of the tower, as its config lists
    Template(f"{_MERGER}.{name}", shape, "vision", optional=True)
    for name, shape in (
        ("linear_fc1.weight", "M*M*VH,M*M*VH"),
        ("linear_fc1.bias", "M*M*VH"),
        ("linear_fc2.weight", "VO,M*M*VH"),
        ("linear_fc2.bias", "VO"),
        ("norm.weight", "M*M*VH"),
        ("norm.bias", "M*M*VH"),
    )
)

FAMILY: Final = replace(
    QWEN3_MOE,
    name="qwen3_vl_moe",
    wrappers=(
        Wrapper(
            "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", "text_config", "model.language_model.", vision=True
        ),
    ),
    block=(*(each for each in QWEN3_MOE.block if not each.variant), *experts("moe", _EXPERTS)),
    experts=_EXPERTS,
    vision=(*QWEN3_5_MOE.vision, *_DEEP_MERGES),
    vision_prefix=QWEN3_5_MOE.vision_prefix,
    vision_sidecars=QWEN3_5_MOE.vision_sidecars,
    vision_symbols=QWEN3_5_MOE.vision_symbols,
    types={
        **{key: value for key, value in QWEN3_MOE.types.items() if key not in _NOT_ITS_OWN},
        "head_dim": "int or null",
        "num_local_experts": "int",
    },
    vision_types={**QWEN3_5_MOE.vision_types, "deepstack_visual_indexes": "list of int"},
    wrapper_types=QWEN3_5_MOE.wrapper_types,
    formats=("auto-round", "gptq"),  # whose loader takes experts one by one
    fused_release=True,
)
