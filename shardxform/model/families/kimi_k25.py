"""Kimi-K2.5 and K2.6: a DeepSeek-V3 decoder under `language_model.`, beside a vision tower and a projector.

Names from the releases. Transformers' `kimi_k25` reads them, but saves some under others, such as
`language_model.model.blocks`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families.base import Config, Symbol, Template, Wrapper, linear, normed
from shardxform.model.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from shardxform.model.families.key_types import MULTIMODAL

__all__ = ["FAMILY"]


def _of_tower(key: str) -> Symbol:
    """A size of the vision tower, as releases call it or as transformers does."""
    return lambda config: config[f"vt_{key}"] if f"vt_{key}" in config else config[key]


def _merged_width(config: Config) -> int:
    """Columns that the patches which are merged have side by side."""
    rows, columns = config.get("merge_kernel_size", (2, 2))
    return int(rows * columns * _of_tower("hidden_size")(config))  # type: ignore[operator]


_BLOCK: Final = "vision_tower.encoder.blocks.{b}"
_VISION: Final = (
    *linear(f"{_BLOCK}.wqkv", "3*VH,VH"),
    *linear(f"{_BLOCK}.wo", "VH,VH"),
    *linear(f"{_BLOCK}.mlp.fc0", "VI,VH"),
    *linear(f"{_BLOCK}.mlp.fc1", "VH,VI"),
    *normed(f"{_BLOCK}.norm0", "VH"),
    *normed(f"{_BLOCK}.norm1", "VH"),
    *normed("vision_tower.encoder.final_layernorm", "VH"),
    *(Template(f"vision_tower.patch_embed.{name}.weight", "?", "vision") for name in ("pos_emb", "proj")),
    Template("vision_tower.patch_embed.proj.bias", "VH", "vision"),
    *normed("mm_projector.pre_norm", "VH"),
    *linear("mm_projector.proj.0", "VM,VM"),
    *(Template(f"mm_projector.proj.2.{part}", "?", "vision") for part in ("weight", "bias")),
)
_WRAPPER: Final = Wrapper(
    "KimiK25ForConditionalGeneration",
    "kimi_k25",
    "text_config",
    "language_model.model.",
    vision=True,
    head="language_model.lm_head",
)

FAMILY: Final = replace(
    DEEPSEEK_V3,
    name="kimi_k25",
    wrappers=(_WRAPPER, replace(_WRAPPER, architecture="Kimi_K25ForConditionalGeneration"), *DEEPSEEK_V3.wrappers),
    block=tuple(each for each in DEEPSEEK_V3.block if each.when != "full query"),
    mtp=None,
    vision=_VISION,
    formats=("compressed-tensors",),  # loaders of the others do not find queries, keys and values of the vision tower
    vision_prefix=("vision_tower.", "mm_projector."),
    vision_depth_key=("vt_num_hidden_layers", "num_hidden_layers"),
    vision_sidecars=("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    vision_symbols={"VH": _of_tower("hidden_size"), "VI": _of_tower("intermediate_size"), "VM": _merged_width},
    vision_types={
        "hidden_act": "str",
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"), "int"),
        **dict.fromkeys(("patch_size", "pos_emb_height", "pos_emb_time", "pos_emb_width"), "int"),
        "merge_kernel_size": "list of int",
        "rope_parameters": "object or null",
    },
    conditions={name: holds for name, holds in DEEPSEEK_V3.conditions.items() if name != "full query"},
    wrapper_types={
        **MULTIMODAL,
        **dict.fromkeys(("video_token_id", "vision_end_token_id", "vision_start_token_id"), "int"),
        "projection_hidden_size": "int or null",
        "projection_layer_norm_eps": "float",
    },
)
