"""`shardxform families`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from shardxform.cli.console import print_json, rows, say
from shardxform.cli.options import JsonFlags, command
from shardxform.model.families.listing import Listed, listing_of, listing_of_installed

__all__ = ["families_command"]


@command("families")
def families_command(output: JsonFlags) -> None:
    """List the families that are built in or installed, and what works for each.

    Those that other packages bring along come last, with the entry point that they are `from`. All are inspected,
    pruned and verified. `run`: scored, evaluated, healed and tuned too. `quantized`: the formats whose loaders find the
    experts.
    """
    others, faults = listing_of_installed()
    every = (*listing_of(), *others)
    for fault in faults:
        say(f"warning: {fault}", err=True)
    if output.as_json:
        print_json({"families": [asdict(each) for each in every]})
        return
    for each in every:
        say(", ".join(each.model_types))
        rows(_lines(each))


def _lines(family: Listed) -> Iterator[tuple[str, str]]:
    yield ("from", family.origin) if family.origin else ("releases", family.releases)
    yield "experts", f"{family.experts}{'; MTP layers' if family.mtp else ''}"
    yield "quantized", ", ".join(family.formats) or f"no: {family.unread}"
    yield "run", f"no: {family.not_run}" if family.not_run else "yes"
