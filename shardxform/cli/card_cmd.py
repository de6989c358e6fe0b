"""`shardxform card`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from shardxform.cli.console import print_json, tell
from shardxform.cli.options import json_option, manifest_option, out_argument
from shardxform.publish.card import CardOptions, gather, render, write_card

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
    manifest that OUT was pruned by, and tells why. Where --manifest, --evaluation or --plot is not given, what
    `shardxform compress` left for OUT in OUT.compress is shown. --write replaces a README.md only if it is the source's
    copied one or an earlier card.
    """
    given = CardOptions(base_model=base_model, manifest=manifest, evaluations=evaluations, plots=plots)
    options = _with_results(out, given)
    facts = gather(out, options)
    written = write_card(out, render(facts), options.plots) if write else None
    if as_json:
        print_json({**facts.to_dict(), "written": str(written) if written else None})
    elif written:
        click.echo(f"{written}: written")
    else:
        click.echo(render(facts), nl=False)


def _with_results(out: Path, given: CardOptions) -> CardOptions:
    """Add what `compress` left beside OUT to what was not given, and say so."""
    from shardxform.compress.folder import results_of  # with it comes numpy

    found = results_of(out)
    if found is None:
        return given
    pictures, evaluations = given.plots or found.pictures, given.evaluations or found.evaluations
    manifest = given.manifest or found.manifest
    used = [path.name for path in (manifest, *evaluations, *pictures) if path in found.files]
    if used:
        tell(f"note: from {found.folder}: {', '.join(used)}")
    elif found.why_not:
        tell(f"note: not read: {found.folder}: {found.why_not}")
    return replace(given, manifest=manifest, evaluations=evaluations, plots=pictures)
