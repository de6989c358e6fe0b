"""Values out of JSON from strangers: of the type asked for, or not there. Raises nothing, keeps nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from shardxform.calibration.options import is_source
from shardxform.publish.card.facts import BlockError, Data, HealedBlock

__all__ = [
    "block_errors",
    "data_of",
    "flag",
    "healed_blocks",
    "judged_apart",
    "number",
    "section",
    "text",
    "texts",
    "whole",
]


def section(value: object, *path: str) -> Mapping[str, Any]:
    """Return the object at `path`; empty when there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def text(value: Mapping[str, Any], key: str) -> str:
    """Return a text without control characters, or an empty one."""
    found = value.get(key)
    return found if isinstance(found, str) and found.isprintable() else ""


def texts(value: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return the texts of a list."""
    found = value.get(key)
    return tuple(item for item in found if isinstance(item, str) and item) if isinstance(found, list | tuple) else ()


def whole(value: Mapping[str, Any], key: str) -> int | None:
    """Return an integer that counts something."""
    found = value.get(key)
    return found if type(found) is int and found >= 0 else None


def number(value: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number."""
    found: object = value.get(key)
    try:
        out = float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return None
    return out if math.isfinite(out) else None


def flag(value: Mapping[str, Any], key: str) -> bool:
    """Whether something is said to be so."""
    return value.get(key) is True


def data_of(value: Mapping[str, Any]) -> Data | None:
    """Provenance of token windows; None when it names no data."""
    name = text(value, "data")
    if not name:
        return None
    return Data(
        name=name,
        samples=whole(value, "samples"),
        seqlen=whole(value, "seqlen"),
        tokens=whole(value, "tokens"),
        content=text(value, "revision") or text(value, "sha256"),
        sources=tuple(filter(is_source, texts(value, "sources"))),
    )


def block_errors(facts: Mapping[str, Any]) -> tuple[BlockError, ...]:
    """What tuning the rounding recorded of every block, in the order of the blocks."""
    out: dict[int, BlockError] = {}
    for layer, found in _blocks(facts):
        if "rtn_error" not in found and "rounded_to_nearest" not in found:
            continue  # it was healed only
        unreached = found.get("experts_never_reached")
        out[layer] = BlockError(
            layer=layer,
            rounded=number(found, "rtn_error"),
            tuned=number(found, "tuned_error"),
            ratio_error=number(found, "ratio_standard_error"),
            never_reached=len(unreached) if isinstance(unreached, list) else 0,
        )
    return tuple(out[layer] for layer in sorted(out))


def judged_apart(facts: Mapping[str, Any]) -> bool | None:
    """Whether errors of tuned blocks are those on text that was not tuned on; None where one of them does not say."""
    found = [section(block, "judged_on").get("held_out") for _, block in _blocks(facts) if "tuned_error" in block]
    return all(found) if found and all(isinstance(each, bool) for each in found) else None


def healed_blocks(facts: Mapping[str, Any]) -> tuple[HealedBlock, ...]:
    """What healing recorded of every block, in the order of the blocks."""
    out: dict[int, HealedBlock] = {}
    for layer, found in _blocks(facts):
        if healed := section(found, "healed"):
            before, after = number(healed, "pruned_error"), number(healed, "healed_error")
            error = number(healed, "ratio_standard_error")
            out[layer] = HealedBlock(
                layer=layer, pruned=before, healed=after, what=text(healed, "what"), ratio_error=error
            )
    return tuple(out[layer] for layer in sorted(out))


def _blocks(facts: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    listed = facts.get("blocks")
    for block in listed if isinstance(listed, list) else ():
        found = section(block)
        layer = whole(found, "layer")
        if layer is not None:
            yield layer, found
