"""`shardxform families`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import click

from shardxform.cli.console import print_json, rows
from shardxform.cli.options import JsonFlags, command
from shardxform.model.families.listing import Listed, listing_of

__all__ = ["families_command"]


@command("families")
def families_command(output: JsonFlags) -> None:
    """List the families that are built in, and what works for each.

    All are inspected, pruned and verified. `run`: scored, evaluated, healed and tuned too. `quantized`: the formats
    whose loaders find the experts.
    """
    every = listing_of()
    if output.as_json:
        print_json({"families": [asdict(each) for each in every]})
        return
    for each in every:
        click.echo(", ".join(each.model_types))
        rows(_lines(each))


def _lines(family: Listed) -> Iterator[tuple[str, str]]:
    yield "releases", family.releases
    yield "experts", f"{family.experts}{'; MTP layers' if family.mtp else ''}"
    yield "quantized", ", ".join(family.formats) or f"no: {family.unread}"
    yield "run", f"no: {family.not_run}" if family.not_run else "yes"
