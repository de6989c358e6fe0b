"""`shardxform family`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click

from shardxform.checkpoint.table import CONFIG
from shardxform.cli.console import say, tell
from shardxform.cli.inputs import refuse_unwritable, require
from shardxform.cli.options import Flags, command, option
from shardxform.errors import OutputError

__all__ = ["family_command"]


@click.group("family")
def family_command() -> None:
    """Make families known that are not built in: see docs/adding-a-family.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output(Flags):
    out: Path | None = option(
        "File to write the entry to.  [default: it is printed]", "--out", "-o", metavar="FILE.py", first=True
    )


@command("draft")
@click.argument("kind", metavar="MODEL_TYPE|SRC")
def _draft(kind: str, output: _Output) -> None:
    """Draft the entry of a family from transformers' own classes, for a model type or for that of a checkpoint SRC.

    Models of the type are made without weights, with sizes that differ; which config key is which dimension, and which
    layers have which tensor, follows from comparing them. What could not be decided stands at the top of the file as
    `# decide:`. Of SRC only config.json and the names of its tensors are read; those that the draft lacks are listed.
    """
    if output.out is not None:
        refuse_unwritable(output.out)
        if os.path.lexists(output.out):
            raise OutputError(f"{output.out}: exists; name a file that does not exist yet")
    require("torch", "transformers")
    from shardxform.drafting import draft, draft_of

    source = Path(kind)
    drafted = draft_of(source) if (source / CONFIG).exists() or os.sep in kind else draft(kind)
    if output.out is None:
        click.echo(drafted.text, nl=False)
    else:
        output.out.write_text(drafted.text, encoding="utf-8")
        say(f"{output.out}: written; use it with --family {output.out}")
    for note in drafted.decide:
        tell(f"decide: {note}")


family_command.add_command(_draft)
