"""`shardxform card`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click

from shardxform.cli.console import print_json, say, tell
from shardxform.cli.options import FamilyFlags, Flags, JsonFlags, command, option, out_argument
from shardxform.publish.card import CardOptions, gather, render, write_card

__all__ = ["card_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown(Flags, heading="What the card shows"):
    manifest: Path | None = option("Experts to keep, in any of the forms that manifests/ lists.", "-m", metavar="FILE")
    base_model: str = option("Hub name of the source, such as owner/name.", default="", metavar="NAME")
    evaluation: tuple[Path, ...] = option(
        "What `shardxform evaluate --json` printed for OUT; repeatable.", default=(), metavar="FILE"
    )
    picture: tuple[Path, ...] = option(
        "Show this picture, and with --write copy it into OUT; repeatable.", default=(), metavar="PNG"
    )

    def read(self) -> CardOptions:
        """What the library calls it."""
        return CardOptions(
            base_model=self.base_model, manifest=self.manifest, evaluations=self.evaluation, plots=self.picture
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output(JsonFlags):
    write: bool = option("Write OUT/README.md instead of printing the card.", default=False)


@command("card")
@out_argument
def card_command(out: Path, shown: _Shown, family: FamilyFlags, output: _Output) -> None:
    """Make a model card for OUT: sizes, experts, parameters, how it was made and measured, how to load it.

    Every figure is read from OUT or from the files named; what is not known is left out. --manifest is the keep
    manifest that OUT was pruned by, and tells why. Where --manifest, --evaluation or --picture is not given, what
    `shardxform compress` left for OUT in OUT.compress is shown. --write replaces a README.md only if it is the source's
    copied one or an earlier card.
    """
    family.load()
    options = _with_results(out, shown.read())
    facts = gather(out, options)
    written = write_card(out, render(facts), options.plots) if output.write else None
    if output.as_json:
        print_json({**facts.to_dict(), "written": str(written) if written else None})
    elif written:
        say(f"{written}: written")
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
