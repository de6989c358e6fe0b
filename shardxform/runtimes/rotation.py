"""How positions are rotated: what transformers makes of a config, and what of it runtimes do not read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from shardxform.errors import SchemeError

__all__ = ["magnitude_of", "rope_of", "rotation_notes", "usual_magnitude"]

_KEYS: Final = ("rope_parameters", "rope_scaling")
_APART: Final = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def rope_of(config: Mapping[str, object]) -> dict[str, Any]:
    """How positions are rotated, as transformers 5 writes it, of a config in its words or in older ones.

    Raises:
        SchemeError: it is no object; or the config says two things of it, of which transformers takes one and runtimes
            may take the other.

    """
    named = [(key, config[key]) for key in _KEYS if config.get(key)]
    if len(named) > 1 and dict(named)["rope_parameters"] != dict(named)["rope_scaling"]:
        raise SchemeError("config.json: rope_parameters and rope_scaling differ; expected one of the two")
    for key, found in named:
        if not isinstance(found, Mapping):
            raise SchemeError(f"config.json: {key} is {found!r}; expected an object")
    rope: dict[str, Any] = {}
    for _, found in named:
        rope.update(found)  # type: ignore[call-overload]
    if "full_attention" in rope or "sliding_attention" in rope:
        return rope
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
    for key in _APART:
        if config.get(key) is not None:
            rope.setdefault(key, config[key])
    return rope


def magnitude_of(rope: Mapping[str, Any]) -> float:
    """What sines and cosines are multiplied by under YaRN, in transformers' `_compute_yarn_parameters`.

    Raises:
        SchemeError: a number that it is made of is none, or missing.

    """
    told, factor = (_number(rope, key) for key in ("attention_factor", "factor"))
    if factor is None:
        raise SchemeError("config.json: factor is missing")
    if told is not None:
        return told
    one, all_of_them = (_number(rope, key) for key in ("mscale", "mscale_all_dim"))
    if one and all_of_them:
        return usual_magnitude(factor, one) / usual_magnitude(factor, all_of_them)
    return usual_magnitude(factor)


def usual_magnitude(factor: float, times: float = 1.0) -> float:
    """What YaRN multiplies by where nothing else is said (Peng et al. 2023, equation 15)."""
    return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0


def _number(rope: Mapping[str, Any], key: str) -> float | None:
    found = rope.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise SchemeError(f"config.json: {key} is {found!r}; expected a number")
    return float(found)


def rotation_notes(text: Mapping[str, object], runtime: str) -> Iterator[str]:
    """Say where a runtime rotates positions by another rule than transformers, and has no key to be told.

    Args:
        text: config of the decoder.
        runtime: its name.

    """
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) != "yarn":
        return
    if rope.get("truncate") is False:
        yield (
            f"config.json's truncate is false, but {runtime} always takes YaRN's range in whole channels: its logits"
            " differ a little from those of transformers"
        )
