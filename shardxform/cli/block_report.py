"""What healing and tuning did to every decoder block, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

from shardxform.cli.console import count, gb, give_or_take, short, table, tell

__all__ = ["blocks_of", "judged_on", "tell_blocks"]

Block = Mapping[str, Any]
_AS_PRUNED: Final = {"pruned_error": 0.0}
_HEALED: Final = ("block", "squared error, pruned", "healed", "ratio", "what", "step")
_TUNED: Final = ("block", "squared error, rounded", "tuned", "ratio", "never reached")


def tell_blocks(facts: Mapping[str, Any], measured: Sequence[Mapping[str, Any]] = ()) -> None:
    """Print a table of what was healed and one of what was tuned, if anything was, and warn of what was not.

    Args:
        facts: what the steps found.
        measured: time and memory of the blocks, where these were done just now.

    """
    blocks = [{**block, **_of_layer(measured, block["layer"])} for block in blocks_of(facts)]
    healed = [block for block in blocks if "healed" in block]
    tuned = [block for block in blocks if "rtn_error" in block or "rounded_to_nearest" in block]
    if healed:
        _show(_HEALED, [_healed_line(block) for block in healed], () if tuned else _endings(healed))
    if tuned:
        _show(_TUNED, [_tuned_line(block) for block in tuned], _endings(tuned))
    if healed or tuned:
        _tell_judges(blocks)
    _warn(blocks)


def judged_on(blocks: Sequence[Block]) -> str:
    """Say what the errors of blocks were measured on; empty for records of earlier versions, which do not say it."""
    judged: Block = next((block["judged_on"] for block in blocks if isinstance(block.get("judged_on"), dict)), {})
    if not _has(judged, "windows", "tokens"):
        return ""
    apart = "no block learned from" if judged.get("held_out") is True else "the blocks also learned from"
    return f"{count(judged['windows'], 'window')} of {short(judged['tokens'])} tokens that {apart}"


def blocks_of(facts: Mapping[str, Any]) -> list[Block]:
    """What is said of blocks, in their order; what is not as it is written is left out, since a record may be old."""
    listed = facts.get("blocks")
    return sorted(filter(_is_whole, listed if isinstance(listed, list) else []), key=lambda block: int(block["layer"]))


def _is_whole(block: Any) -> bool:  # noqa: ANN401
    """Whether a block says all that is shown of it."""
    if not isinstance(block, dict) or not _has(block, "layer"):
        return False
    healed = block.get("healed", _AS_PRUNED)
    if not isinstance(healed, dict) or not _has(healed, "pruned_error"):
        return False
    if healed.get("what") is not None and not _has(healed, "healed_error", "lr"):
        return False
    return "rtn_error" not in block or (_has(block, "rtn_error", "tuned_error") and "experts_never_reached" in block)


def _of_layer(measured: Sequence[Mapping[str, Any]], layer: object) -> Mapping[str, Any]:
    return next((each for each in measured if each.get("layer") == layer), {})


def _has(value: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(value.get(key), int | float) for key in keys)


def _show(header: tuple[str, ...], lines: Sequence[tuple[str, ...]], endings: Sequence[tuple[str, ...]]) -> None:
    """Print a table; `endings` are the time and memory of every line, or nothing."""
    click.echo()
    if endings:
        header, lines = (*header, "time", "memory"), [(*line, *end) for line, end in zip(lines, endings, strict=True)]
    table(header, lines)


def _tell_judges(blocks: Sequence[Block]) -> None:
    if text := judged_on(blocks):
        click.echo(f"  errors: on {text}")
    if "also learned" in text:
        click.echo("  they flatter: give two windows or more, and some are kept to judge by")
    elif text.startswith("1 window "):
        click.echo("  one window tells little: with 16 or more, two judge, and how far the ratios may be off is known")


def _healed_line(block: Block) -> tuple[str, ...]:
    healed = block["healed"]
    before, after, layer = healed["pruned_error"], healed["healed_error"], str(block["layer"])
    if healed["what"] is None:
        return (layer, f"{before:.3e}", "-", "-", "as pruned", "-")
    ratio = _ratio(healed, before, after)
    return (layer, f"{before:.3e}", f"{after:.3e}", ratio, healed["what"], f"{healed['lr']:.2g}")


def _tuned_line(block: Block) -> tuple[str, ...]:
    layer = str(block["layer"])
    if "rounded_to_nearest" in block:
        return (layer, "-", "-", "-", "-")
    before, after = block["rtn_error"], block["tuned_error"]
    ratio = _ratio(block, before, after)
    return (layer, f"{before:.3e}", f"{after:.3e}", ratio, str(len(block["experts_never_reached"])))


def _ratio(told: Mapping[str, Any], before: float, after: float) -> str:
    if not before:
        return "-"
    error = told["ratio_standard_error"] if _has(told, "ratio_standard_error") else None
    return f"{after / before:.1%}{give_or_take(error, '{:.1%}')}"


def _endings(blocks: Sequence[Block]) -> list[tuple[str, str]]:
    """Time and memory of every block; nothing where they are known of none, as of what was done before."""
    known = [_has(block, "seconds", "peak_rss_bytes") for block in blocks]  # records of earlier versions have them
    return [_ending(block) if has else ("-", "-") for block, has in zip(blocks, known, strict=True)] * any(known)


def _ending(block: Block) -> tuple[str, str]:
    return f"{block['seconds']:.1f} s", gb(block["peak_rss_bytes"])


def _warn(blocks: Sequence[Block]) -> None:
    for block in blocks:
        if "rounded_to_nearest" in block:
            why = block["rounded_to_nearest"]
            tell(f"WARNING: block {block['layer']} is NOT tuned but rounded to nearest: {why}")
        if block.get("healed", {}).get("diverged"):
            tell(f"WARNING: block {block['layer']}: healing diverged, its loss was no number: try a smaller --heal-lr")
