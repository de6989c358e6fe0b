"""The families that shardxform knows, and how one is recognised from config.json."""

from __future__ import annotations

from typing import Final

from shardxform.errors import FamilyError
from shardxform.model.families import deepseek_v3, gpt_oss, mixtral, qwen3_5_moe, qwen3_moe
from shardxform.model.families.base import Config, Family, Wrapper

__all__ = ["FAMILIES", "family_of"]

FAMILIES: Final[tuple[Family, ...]] = (
    qwen3_5_moe.FAMILY,
    qwen3_moe.FAMILY,
    deepseek_v3.FAMILY,
    gpt_oss.FAMILY,
    mixtral.FAMILY,
)


def family_of(config: Config) -> tuple[Family, Wrapper]:
    """The family and the wrapper class that a config.json describes.

    Raises:
        FamilyError: an unknown `model_type`, or one that contradicts `architectures`.

    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise FamilyError(f"config.json: architectures: expected a list of names, found {architectures!r}")
    for family in FAMILIES:
        for wrapper in family.wrappers:
            if wrapper.model_type == model_type:
                if architectures and wrapper.architecture not in architectures:
                    raise FamilyError(
                        f"config.json: model_type '{model_type}' belongs to {wrapper.architecture},"
                        f" but architectures is {architectures}"
                    )
                return family, wrapper
    known = ", ".join(sorted(w.model_type for family in FAMILIES for w in family.wrappers))
    raise FamilyError(f"config.json: model_type {model_type!r} is not a known family; known: {known}")
