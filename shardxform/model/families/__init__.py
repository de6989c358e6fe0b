"""The families that shardxform knows, and how one is recognised from config.json. Each is loaded when it is met."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

from shardxform.errors import FamilyError
from shardxform.model.families.base import Config, Family, Wrapper

__all__ = ["HOMES", "all_families", "family_of"]

HOMES: Final[Mapping[str, str]] = {
    "afmoe": "afmoe",
    "bailing_hybrid": "bailing_hybrid",
    "beam": "beam",
    "cohere2_moe": "cohere2_moe",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "dots1": "dots1",
    "exaone_moe": "exaone_moe",
    "flex_olmo": "flex_olmo",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite",
    "glm4v_moe": "glm4v_moe",
    "glm_moe_dsa": "glm_moe_dsa",
    "gpt_oss": "gpt_oss",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitemoehybrid",
    "granitemoeshared": "granitemoeshared",
    "hunyuan_v1_moe": "hunyuan_v1_moe",
    "hy_v3": "hy_v3",
    "jamba": "jamba",
    "kimi_k2": "deepseek_v3",
    "kimi_k25": "kimi_k25",
    "kimi_linear": "kimi_linear",
    "laguna": "laguna",
    "lfm2_moe": "lfm2_moe",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "mellum": "mellum",
    "mimo_v2_flash": "mimo_v2_flash",
    "minimax_m2": "minimax_m2",
    "minimax_m3_vl": "minimax_m3_vl",
    "mixtral": "mixtral",
    "nemotron_h": "nemotron_h",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2_moe",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "solar_open": "solar_open",
}
"""The module of this package that knows a `model_type`, as it stands at the top level of config.json."""


def family_of(config: Config) -> tuple[Family, Wrapper]:
    """The family and the wrapper class that a config.json describes.

    Raises:
        FamilyError: an unknown `model_type`, or one that contradicts `architectures`.

    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise FamilyError(f"config.json: architectures: expected a list of names, found {architectures!r}")
    if not isinstance(model_type, str) or model_type not in HOMES:
        known = ", ".join(sorted(HOMES))
        raise FamilyError(f"config.json: model_type {model_type!r} is not a known family; known: {known}")
    family = _load(HOMES[model_type])
    own = [each for each in family.wrappers if each.model_type == model_type]
    wrapper = next((each for each in own if each.architecture in architectures), own[0])
    if architectures and wrapper.architecture not in architectures:
        raise FamilyError(
            f"config.json: model_type '{model_type}' belongs to {wrapper.architecture},"
            f" but architectures is {architectures}"
        )
    return family, wrapper


def all_families() -> tuple[Family, ...]:
    """Load every family, in the order of their modules' names."""
    return tuple(_load(module) for module in sorted(set(HOMES.values())))


def _load(module: str) -> Family:
    family: Family = importlib.import_module(f"shardxform.model.families.{module}").FAMILY
    return family
