"""What healing and tuning did to every decoder block, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from shardxform.cli.console import gb, table, tell

__all__ = ["tell_blocks"]

Block = Mapping[str, Any]


def tell_blocks(facts: Mapping[str, Any]) -> None:
    """Print a table of what was healed and one of what was tuned, if anything was, and warn of what was not."""
    blocks: list[Block] = sorted(facts.get("blocks", []), key=lambda block: int(block["layer"]))
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
