"""`shardxform card`."""

from __future__ import annotations

from pathlib import Path

import click

from shardxform.card import CardOptions, gather, render, write_card
from shardxform.cli.console import print_json
from shardxform.cli.options import json_option, manifest_option, out_argument

__all__ = ["command"]


@click.command("card")
@out_argument
@manifest_option
@click.option("--base-model", metavar="NAME", default="", help="Hub name of the source, such as owner/name.")
@click.option(
    "--evaluation",
    "evaluations",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="What `shardxform evaluate --json` printed for OUT; repeatable.",
)
@click.option(
    "--plot",
    "plots",
    metavar="PNG",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Show this picture, and with --write copy it into OUT; repeatable.",
)
@click.option("--write", is_flag=True, help="Write OUT/README.md instead of printing the card.")
@json_option
def command(
    out: Path,
    manifest: Path | None,
    base_model: str,
    evaluations: tuple[Path, ...],
    plots: tuple[Path, ...],
    write: bool,
    as_json: bool,
) -> None:
    """Make a model card for OUT: sizes, experts, parameters, how it was made and measured, how to load it.

    Every figure is read from OUT or from the files named; what is not known is left out. --manifest is the keep
    manifest that OUT was pruned by, and tells why. --write replaces a README.md only if it is the source's copied one
    or an earlier card.
    """
    facts = gather(out, CardOptions(base_model=base_model, manifest=manifest, evaluations=evaluations, plots=plots))
    written = write_card(out, render(facts), plots) if write else None
    if as_json:
        print_json({**facts.to_dict(), "written": str(written) if written else None})
    elif written:
        click.echo(f"{written}: written")
    else:
        click.echo(render(facts), nl=False)
