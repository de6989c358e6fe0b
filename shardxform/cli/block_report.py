"""What healing and tuning did to every decoder block, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

from shardxform.cli.console import gb, table, tell

__all__ = ["blocks_of", "tell_blocks"]

Block = Mapping[str, Any]
_AS_PRUNED: Final = {"pruned_error": 0.0}


def tell_blocks(facts: Mapping[str, Any]) -> None:
    """Print a table of what was healed and one of what was tuned, if anything was, and warn of what was not."""
    blocks = blocks_of(facts)
    healed = [block for block in blocks if "healed" in block]
    tuned = [block for block in blocks if "rtn_error" in block or "rounded_to_nearest" in block]
    if healed:
        ending = () if tuned else ("time", "memory")
        header = ("block", "squared error, pruned", "healed", "ratio", "what", "step", *ending)
        _show(header, [(*_healed_line(block), *_ending(block)[: len(ending)]) for block in healed])
    if tuned:
        header = ("block", "squared error, rounded", "tuned", "ratio", "never reached", "time", "memory")
        _show(header, [(*_tuned_line(block), *_ending(block)) for block in tuned])
    _warn(blocks)


def blocks_of(facts: Mapping[str, Any]) -> list[Block]:
    """What is said of blocks, in their order; what is not as it is written is left out, since a record may be old."""
    listed = facts.get("blocks")
    return sorted(filter(_is_whole, listed if isinstance(listed, list) else []), key=lambda block: int(block["layer"]))


def _is_whole(block: Any) -> bool:  # noqa: ANN401
    """Whether a block says all that is shown of it."""
    if not isinstance(block, dict) or not _has(block, "layer", "seconds", "peak_rss_bytes"):
        return False
    healed = block.get("healed", _AS_PRUNED)
    if not isinstance(healed, dict) or not _has(healed, "pruned_error"):
        return False
    if healed.get("what") is not None and not _has(healed, "healed_error", "lr"):
        return False
    return "rtn_error" not in block or (_has(block, "rtn_error", "tuned_error") and "experts_never_reached" in block)


def _has(value: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(value.get(key), int | float) for key in keys)


def _show(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> None:
    click.echo()
    table(header, lines)


def _healed_line(block: Block) -> tuple[str, ...]:
    healed = block["healed"]
    before, after, layer = healed["pruned_error"], healed["healed_error"], str(block["layer"])
    if healed["what"] is None:
        return (layer, f"{before:.3e}", "-", "-", "as pruned", "-")
    return (layer, f"{before:.3e}", f"{after:.3e}", f"{after / before:.1%}", healed["what"], f"{healed['lr']:.2g}")


def _tuned_line(block: Block) -> tuple[str, ...]:
    layer = str(block["layer"])
    if "rounded_to_nearest" in block:
        return (layer, "-", "-", "-", "-")
    before, after = block["rtn_error"], block["tuned_error"]
    ratio = f"{after / before:.1%}" if before else "-"
    return (layer, f"{before:.3e}", f"{after:.3e}", ratio, str(len(block["experts_never_reached"])))


def _ending(block: Block) -> tuple[str, str]:
    return f"{block['seconds']:.1f} s", gb(block["peak_rss_bytes"])


def _warn(blocks: Sequence[Block]) -> None:
    for block in blocks:
        if "rounded_to_nearest" in block:
            why = block["rounded_to_nearest"]
            tell(f"WARNING: block {block['layer']} is NOT tuned but rounded to nearest: {why}")
        if block.get("healed", {}).get("diverged"):
            tell(f"WARNING: block {block['layer']}: healing diverged, its loss was no number: try a smaller --heal-lr")
