"""The families that shardxform knows, and how one is recognised from config.json. Each is loaded when it is met.

Families may come from outside too: from files that were named (`use`), and from entry points of installed packages.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from shardxform.errors import FamilyError, UnknownFamilyError
from shardxform.model.families.base import Config, Family, Wrapper
from shardxform.model.families.outside import Outside, of_entry_point

__all__ = [
    "GROUP",
    "HOMES",
    "Outside",
    "all_families",
    "claims",
    "family_of",
    "family_origin",
    "in_use",
    "installed",
    "use",
]

HOMES: Final[Mapping[str, str]] = {
    "afmoe": "afmoe",
    "axk1": "axk1",
    "axk2": "axk2",
    "bailing_hybrid": "bailing_hybrid",
    "beam": "beam",
    "cohere2_moe": "cohere2_moe",
    "dbrx": "dbrx",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "deepseek_v4": "deepseek_v4",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5_moe",
    "ernie4_5_moe_vl": "ernie4_5_vl_moe",
    "ernie4_5_vl_moe": "ernie4_5_vl_moe",
    "exaone_moe": "exaone_moe",
    "flex_olmo": "flex_olmo",
    "flint": "flint",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite",
    "glm4v_moe": "glm4v_moe",
    "glm5_next": "glm5_next",
    "glm_moe_dsa": "glm_moe_dsa",
    "gpt_oss": "gpt_oss",
    "granitemoe": "granitemoe",
    "granitemoe_swa": "granitemoe_swa",
    "granitemoehybrid": "granitemoehybrid",
    "granitemoeshared": "granitemoeshared",
    "hunyuan_v1_moe": "hunyuan_v1_moe",
    "hy_v3": "hy_v3",
    "jamba": "jamba",
    "kimi_k2": "deepseek_v3",
    "kimi_k25": "kimi_k25",
    "kimi_linear": "kimi_linear",
    "kolibri1": "kolibri1",
    "laguna": "laguna",
    "lfm2_moe": "lfm2_moe",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "longcat_flash": "longcat_flash",
    "mellum": "mellum",
    "mimo_v2_flash": "mimo_v2_flash",
    "minimax": "minimax",
    "minimax_m2": "minimax_m2",
    "minimax_m3_vl": "minimax_m3_vl",
    "mistral3": "mistral4",
    "mistral4": "mistral4",
    "mixtral": "mixtral",
    "muse_spark": "muse_spark",
    "nemotron_h": "nemotron_h",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2_moe",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_omni_moe": "qwen3_omni_moe",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "qwen4_exp": "qwen4_exp",
    "qwen4_exp_text": "qwen4_exp",
    "solar_open": "solar_open",
    "step3p5": "step3p7",
    "step3p7": "step3p7",
}
"""The module of this package that knows a `model_type`, as it stands at the top level of config.json."""

GROUP: Final = "shardxform.families"
"""Entry points of installed packages: `MODEL_TYPE = "package.module:FAMILY"`."""


_named: dict[str, Outside] = {}


def use(families: Iterable[Outside]) -> None:
    """Have these known, and none of those that were named before.

    Raises:
        FamilyError: two families claim one `model_type`.

    """
    claimed: dict[str, Outside] = {}
    for each in families:
        for model_type in each.model_types:
            if model_type in HOMES:
                raise FamilyError(f"{each.origin}: model_type '{model_type}' is built in")
            other = claimed.get(model_type) or installed(model_type)
            if other:
                raise FamilyError(f"{each.origin} and {other.origin} both claim model_type '{model_type}'")
            claimed[model_type] = each
    _named.clear()
    _named.update(claimed)


def in_use() -> tuple[Outside, ...]:
    """Families that were named, and those of entry points that were met."""
    met = [found for found in _installed.values() if found]
    return (*dict.fromkeys(_named.values()), *met)


def family_of(config: Config) -> tuple[Family, Wrapper]:
    """The family and the wrapper class that a config.json describes.

    Releases whose code is their own may leave `model_type` out, as LongCat-Flash does: then `architectures` tells.

    Raises:
        UnknownFamilyError: no family has that `model_type`.
        FamilyError: it contradicts `architectures`.

    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise FamilyError(f"config.json: architectures: expected a list of names, found {architectures!r}")
    if "model_type" not in config:
        model_type = next(filter(None, map(_type_of, architectures)), None)
    family = _family(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(sorted({*HOMES, *_named, *_entry_points()}))
        raise UnknownFamilyError(f"config.json: model_type {model_type!r} is not a known family; known: {known}")
    own = [each for each in family.wrappers if each.model_type == model_type]
    wrapper = next((each for each in own if each.architecture in architectures), own[0])
    if architectures and wrapper.architecture not in architectures:
        raise FamilyError(
            f"config.json: model_type '{model_type}' belongs to {wrapper.architecture},"
            f" but architectures is {architectures}"
        )
    return family, wrapper


def family_origin(config: Config) -> dict[str, dict[str, str]]:
    """What is to be bound to a family from outside: under `family` its origin and the digest of its text.

    Nothing for a family of this package, whose version is bound otherwise, or for none.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type in HOMES:
        return {}
    found = _named.get(model_type) or installed(model_type)
    return {"family": {found.origin: found.sha256}} if found else {}


@functools.cache
def _type_of(architecture: str) -> str:
    """The `model_type` of a class of this package's families; empty where none, or several, are called so."""
    own = {
        each.model_type for family in all_families() for each in family.wrappers if each.architecture == architecture
    }
    return own.pop() if len(own) == 1 else ""


def all_families() -> tuple[Family, ...]:
    """Load every family of this package, in the order of their modules' names."""
    return tuple(_load(module) for module in sorted(set(HOMES.values())))


def _family(model_type: str) -> Family | None:
    """Look where families are: files that were named, this package, entry points."""
    if model_type in HOMES:  # no file claims one of these
        return _load(HOMES[model_type])
    found = _named.get(model_type) or installed(model_type)
    return found.family if found else None


def _load(module: str) -> Family:
    family: Family = importlib.import_module(f"shardxform.model.families.{module}").FAMILY
    return family


# -- entry points ------------------------------------------------------------------------------------------------------

_installed: dict[str, Outside | None] = {}


def installed(model_type: str) -> Outside | None:
    """The family of an installed package that knows a `model_type`; loaded here, and only then.

    Raises:
        FamilyError: two packages claim it, or what is there is no family of it.

    """
    if model_type not in _installed:
        found = _entry_points().get(model_type, ())
        if len(found) > 1:
            names = " and ".join(f"{each.value} of {each.dist.name}" for each in found)
            raise FamilyError(f"{names} both claim model_type '{model_type}'; uninstall one")
        if found:
            _installed[model_type] = of_entry_point(model_type, found[0])
        else:
            _installed[model_type] = None
    return _installed[model_type]


def claims() -> dict[str, tuple[str, ...]]:
    """Every `model_type` that entry points claim, and whose; nothing is loaded."""
    every = sorted(_entry_points().items())
    return {name: tuple(f"{each.value} of {each.dist.name}" for each in found) for name, found in every}


@functools.cache
def _entry_points() -> Mapping[str, tuple[Any, ...]]:
    """Entry points by name; looked for only when a `model_type` is met that this package does not know."""
    from importlib.metadata import entry_points

    out: dict[str, tuple[Any, ...]] = {}
    for each in entry_points(group=GROUP):
        out[each.name] = (*out.get(each.name, ()), each)
    return out
