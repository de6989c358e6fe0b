"""What works for each family, in words: for `shardxform families` and for the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shardxform.errors import FamilyError
from shardxform.model.families import HOMES, Outside, all_families, claims, installed
from shardxform.model.families.base import Family

__all__ = ["Listed", "listing_of", "listing_of_installed"]

RELEASES: Final = {
    "afmoe": "Trinity-Nano, Mini and Large",
    "axk1": "A.X-K1",
    "axk2": "A.X-K2",
    "bailing_hybrid": "Ling-3.0, Ring",
    "beam": "Beam-1.0",
    "cohere2_moe": "Command A+",
    "dbrx": "DBRX",
    "deepseek_v2": "DeepSeek-V2, V2-Lite, Coder-V2",
    "deepseek_v3": "DeepSeek-V3, R1, V3.1; Kimi-K2",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4-Flash and Pro",
    "dots1": "dots.llm1",
    "ernie4_5_moe": "ERNIE-4.5-21B-A3B, 300B-A47B",
    "ernie4_5_vl_moe": "ERNIE-4.5-VL",
    "exaone_moe": "K-EXAONE",
    "flex_olmo": "FlexOlmo",
    "flint": "Flint",
    "gemma4": "Gemma-4-26B-A4B",
    "glm4_moe": "GLM-4.5, 4.5-Air, 4.6, 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm4v_moe": "GLM-4.5V, 4.6V",
    "glm5_next": "GLM-5.3-Flash",
    "glm_moe_dsa": "GLM-5, 5.1, 5.2",
    "gpt_oss": "gpt-oss-20b and 120b",
    "granitemoe": "Granite-3 MoE",
    "granitemoe_swa": "Granite MoE with sliding windows",
    "granitemoehybrid": "Granite-4 H",
    "granitemoeshared": "Granite-3 MoE with shared experts",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "hy_v3": "Hy3",
    "jamba": "Jamba-1.5 to 1.7",
    "kimi_k25": "Kimi-K2.5, K2.6",
    "kimi_linear": "Kimi-Linear-48B-A3B",
    "kolibri1": "Kolibri-1",
    "laguna": "Laguna",
    "lfm2_moe": "LFM2-8B-A1B, 24B-A2B",
    "llama4": "Llama-4-Scout and Maverick",
    "longcat_flash": "LongCat-Flash",
    "mellum": "Mellum2",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minimax": "MiniMax-Text-01, M1",
    "minimax_m2": "MiniMax-M2 to M2.7",
    "minimax_m3_vl": "MiniMax-M3",
    "mistral4": "Mistral-Small-4",
    "mixtral": "Mixtral-8x7B, 8x22B",
    "muse_spark": "Muse-Spark",
    "nemotron_h": "Nemotron-3",
    "olmoe": "OLMoE",
    "phimoe": "Phi-3.5-MoE",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3_5_moe": "Qwen3.5, Qwen3.6",
    "qwen3_moe": "Qwen3, Qwen3-Coder",
    "qwen3_next": "Qwen3-Next, Qwen3-Coder-Next",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen3_vl_moe": "Qwen3-VL",
    "qwen4_exp": "Qwen3.8-Flash-Next",
    "solar_open": "Solar-Open",
    "step3p7": "Step-3.5-Flash, Step-3.7-Flash",
}
"""What each family was published as, by the name of its module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One family.

    Attributes:
        model_types: as config.json may name it.
        origin: the entry point that it is from, as `package.module:FAMILY`; empty where it is of this package.
        releases: what was published of it; empty where it is not of this package.
        experts: how its experts lie.
        mtp: whether it has layers of multi-token prediction.
        formats: quantized ones whose loaders find its experts.
        unread: why there are none; empty where there are some.
        not_run: why its blocks are not run, and so neither scored, evaluated, healed nor tuned; empty where they are.

    """

    model_types: tuple[str, ...]
    origin: str
    releases: str
    experts: str
    mtp: bool
    formats: tuple[str, ...]
    unread: str
    not_run: str


def listing_of() -> tuple[Listed, ...]:
    """Every family of this package, in the order of their modules' names."""
    modules = sorted(set(HOMES.values()))
    return tuple(
        _listed(family, tuple(name for name, home in sorted(HOMES.items()) if home == module), "", RELEASES[module])
        for module, family in zip(modules, all_families(), strict=True)
    )


def listing_of_installed() -> tuple[tuple[Listed, ...], tuple[str, ...]]:
    """Every family that entry points of installed packages bring along, and a line for each that is not used."""
    found: dict[str, tuple[Outside, tuple[str, ...]]] = {}
    faults = []
    for model_type, names in claims().items():
        if model_type in HOMES:
            faults.append(f"{' and '.join(names)}: model_type '{model_type}' is built in; not used")
            continue
        try:
            outside = installed(model_type)
        except FamilyError as e:
            faults.append(str(e))
            continue
        if outside:
            found[outside.origin] = outside, (*found.get(outside.origin, (outside, ()))[1], model_type)
    listed = tuple(_listed(outside.family, types, origin, "") for origin, (outside, types) in found.items())
    return listed, tuple(faults)


def _listed(family: Family, model_types: tuple[str, ...], origin: str, releases: str) -> Listed:
    return Listed(
        model_types=model_types,
        origin=origin,
        releases=releases,
        experts=_experts(family),
        mtp=family.mtp is not None,
        formats=tuple(family.formats),
        unread="" if family.formats else family.unread,
        not_run=family.not_run,
    )


def _experts(family: Family) -> str:
    """How experts lie, in a word or two."""
    lying = family.experts
    gate = {"none": ", without a gate", "interleaved": ", gate and up in turns", "separate": ", gate and up apart"}
    kinds = {template.variant for template in family.block if template.variant}
    stacked = f"stacked{', transposed' if lying.transposed else ''}{', with biases' if lying.bias else ''}"
    found = [text for kind, text in (("fused", stacked), ("per-expert", "one by one")) if kind in kinds]
    sets = f", of {' and '.join(family.sets)} in one numbering" if family.sets else ""
    return " or ".join(found) + gate.get(lying.gate, "") + sets
