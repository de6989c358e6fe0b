"""Verification of names that the family does not know: what each kind of them means for clients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from shardxform.formats.scheme import FORMATS
from shardxform.model.families.base import Scope
from shardxform.model.layout import Layout, layout_of
from shardxform.model.strays import looks_like
from shardxform.verification.findings import Findings, place_of

__all__ = ["check_unknown", "seed_weights"]

_SEED: Final = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)\.(\d+)\..*")
_MERGED: Final = re.compile(r"(.*\.experts)\.(\d+)\.gate_up_proj(\..*)?")
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


def check_unknown(layout: Layout, findings: Findings) -> set[str]:
    """Report names that the family does not know, those that mean the same in one problem.

    What means nothing to any client, and looks like no part of an expert, a router or a quantized weight, is a warning.

    Returns:
        tensors that are there under a name of another wrapper class, and so are not missing.

    """
    renamed = dict(_of_other_wrapper(layout))
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in layout.unknown:
        code, detail = ("prefix", _prefix_detail(layout)) if name in renamed else _meaning(layout, name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name) if code in ("stray", "unknown") else ""
        groups.setdefault((code, detail, pattern), []).append(name)
    for (code, detail, pattern), names in groups.items():
        count = f" ({len(names)} tensors: {pattern or 'such as ' + names[0]})" if len(names) > 1 else ""
        report = findings.warn if code == "unknown" else findings.problem
        report(code, _where(layout, names), detail + count)
    findings.named.update(layout.unknown)
    return set(renamed.values())


def seed_weights(layout: Layout) -> dict[str, str]:
    """Experts that are there in a spelling that no client takes: names of their weights as they should be spelled.

    Each with the name of a tensor that holds it.
    """
    found: dict[str, str] = {}
    for name in layout.unknown:
        if match := _SEED.fullmatch(name):
            experts, projection, expert = match.groups()
        elif match := _MERGED.fullmatch(name):
            experts, expert, projection = match[1], match[2], "gate_up_proj"
        else:
            continue
        for each in ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,):
            found.setdefault(f"{experts}.{expert}.{each}.weight", name)
    return found


def _meaning(layout: Layout, name: str) -> tuple[str, str]:
    vision = layout.family.vision_prefix
    if _SEED.fullmatch(name):
        era = "written by auto-round before 0.12; current clients refuse it or serve garbage"
        return "seed-spelling", era + _way_out(layout)
    if _MERGED.fullmatch(name):
        return "seed-spelling", "a gate_up_proj per expert, which no client loads; expected gate_proj and up_proj"
    if vision and name.startswith(vision) and not layout.wrapper.vision:
        return "vision", f"vision tower under {layout.wrapper.architecture}, which refuses it"
    layer = _LAYER.search(name)
    if layer and name.startswith(layout.wrapper.prefix) and int(layer[1]) >= layout.num_layers:
        mtp = layout.family.mtp
        declared = f" and {layout.mtp_layers} MTP layers" if mtp and mtp.follows_blocks else ""
        return "layer-range", f"beyond the {layout.num_layers} layers{declared} of config.json"
    if what := looks_like(layout, name):
        return "stray", f"unknown to family {layout.family.name}, and looks like {what}, which clients would drop"
    return "unknown", f"unknown to family {layout.family.name}: clients pass over it, or refuse it"


def _way_out(layout: Layout) -> str:
    declared = layout.config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    if method not in FORMATS:
        return ""
    return f"; `shardxform convert` to {method} with `expert_names` split respells it"


def _of_other_wrapper(layout: Layout) -> Iterator[tuple[str, str]]:
    """Names that would be known under another wrapper's decoder prefix, with their names under this one."""
    here = layout.wrapper.prefix
    for other in sorted({w.prefix for w in layout.family.wrappers} - {here}, key=len, reverse=True):
        names = {name: here + name[len(other) :] for name in layout.unknown if name.startswith(other)}
        places = layout_of(layout.config, names.values()).places
        yield from ((old, new) for old, new in names.items() if new in places)


def _prefix_detail(layout: Layout) -> str:
    return f"the decoder of {layout.wrapper.architecture} is {layout.wrapper.prefix}*, this is another class's prefix"


def _block(layout: Layout, name: str) -> tuple[Scope, int] | None:
    """The decoder block or MTP layer that a name claims to be of."""
    layer = _LAYER.search(name)
    mtp = layout.family.mtp
    if not layer:
        return None
    number = int(layer[1])
    if mtp and not mtp.follows_blocks and name.startswith(layout.mtp_prefixes):
        return "mtp", number
    if not name.startswith(layout.wrapper.prefix + "layers."):
        return None
    if name.startswith(layout.mtp_prefixes or "\0"):
        return "mtp", number - layout.num_layers
    return "block", number


def _where(layout: Layout, names: list[str]) -> str:
    """Layers when all names lie in layers of one kind, else the first name."""
    blocks = {_block(layout, name) for name in names}
    scopes = {block[0] for block in blocks if block}
    if len(names) == 1 or None in blocks or len(scopes) > 1:
        return names[0]
    return place_of(scopes.pop(), sorted(block[1] for block in blocks if block))
