"""`shardxform manifest`."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import click

from shardxform.ask.manifest import Manifest
from shardxform.base.file_system import why_not
from shardxform.base.strict_json import pretty
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.console import print_json, rows, table
from shardxform.cli.options import json_option
from shardxform.errors import OutputError
from shardxform.model.layout import Layout, layout_of

__all__ = ["command"]

_FILE = click.argument("manifest", metavar="FILE", type=click.Path(path_type=Path))
_MODEL = click.option(
    "--model",
    metavar="SRC",
    type=click.Path(path_type=Path),
    help="Checkpoint the manifest is for; some forms cannot be read without it.",
)
_SORT = click.option("--sort", is_flag=True, help="Put ids in ascending order instead of refusing them.")


@click.group("manifest")
def command() -> None:
    """Show, check and convert keep manifests: which experts every layer keeps."""


@command.command("show")
@_FILE
@_MODEL
@_SORT
@json_option
def show(manifest: Path, model: Path | None, sort: bool, as_json: bool) -> None:
    """Show what FILE keeps, in whatever form it is."""
    read = Manifest.load(manifest, _layout(model), sort=sort)
    if as_json:
        print_json(read.to_dict())
        return
    click.echo(f"{manifest}: keeps {read.num_kept} experts in each of {len(read.keep)} layers")
    facts = [
        ("criterion", read.criterion),
        ("model", ", ".join(f"{key} {value}" for key, value in read.model.items())),
        ("mtp_keep", str(len(read.mtp_keep))),
    ]
    rows((label, value) for label, value in facts if value)
    table(("layer", "kept", "first", "last"), _lines(read))


@command.command("check")
@_FILE
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@json_option
def check(manifest: Path, source: Path, as_json: bool) -> None:
    """Check that FILE fits the checkpoint SRC; exit 1 and say where if it does not."""
    layout = _layout(source)
    assert layout is not None
    read = Manifest.load(manifest, layout)
    counts = Counter(len(keep) for keep in read.keep.values())
    if as_json:
        print_json({"fits": True, "kept": read.num_kept, "experts": layout.num_experts, "layers": counts.total()})
    else:
        click.echo(f"{manifest}: fits {source}: keeps {read.num_kept} of {layout.num_experts} experts per layer")


@command.command("convert")
@_FILE
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path))
@_MODEL
@_SORT
def convert(manifest: Path, target: Path, model: Path | None, sort: bool) -> None:
    """Write FILE, in whatever form it is, to TARGET in shardxform's own form."""
    read = Manifest.load(manifest, _layout(model), sort=sort)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(pretty(read.to_dict()))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as e:
        raise OutputError(f"{target}: {e.strerror}; name a file that does not exist yet") from e
    except OSError as e:
        raise OutputError(f"{target}: {why_not(target, e)}") from e
    click.echo(f"{target}: keeps {read.num_kept} experts in each of {len(read.keep)} layers")


def _layout(model: Path | None) -> Layout | None:
    if model is None:
        return None
    checkpoint = Checkpoint.open(model)
    return layout_of(checkpoint.config, checkpoint.tensors, checkpoint.where)


def _lines(manifest: Manifest) -> list[tuple[str, ...]]:
    layers = [(str(layer), keep) for layer, keep in manifest.keep.items()]
    layers += [(f"MTP {layer}", keep) for layer, keep in manifest.mtp_keep.items()]
    return [(layer, str(len(keep)), str(keep[0]), str(keep[-1])) for layer, keep in layers]
