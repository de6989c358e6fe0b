"""`shardxform manifest`."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click

from shardxform.ask.manifest import Manifest
from shardxform.base.file_system import why_not
from shardxform.base.strict_json import pretty
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.console import print_json, rows, say, table
from shardxform.cli.options import PATH, FamilyFlags, Flags, JsonFlags, command, option
from shardxform.errors import ManifestError, OutputError
from shardxform.model.layout import Layout, layout_of, value_at
from shardxform.runtimes import as_family

__all__ = ["manifest_command"]

_file_argument = click.argument("manifest", metavar="FILE", type=PATH)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read(Flags):
    model: Path | None = option("Checkpoint the manifest is for; some forms cannot be read without it.", metavar="SRC")
    sort: bool = option("Put ids in ascending order instead of refusing them.", default=False)
    step: int | None = option(
        "Of a shardxform.json whose output was pruned in several steps, the one to take, counted from 1.",
        metavar="N",
        type=click.IntRange(1),
    )


@click.group("manifest")
def manifest_command() -> None:
    """Show, check and convert keep manifests: which experts every layer keeps."""


@command("show")
@_file_argument
def _show(manifest: Path, how: _Read, family: FamilyFlags, output: JsonFlags) -> None:
    """Show what FILE keeps, in whatever form it is."""
    family.load()
    read = Manifest.load(manifest, _layout(how.model), sort=how.sort, step=how.step)
    if output.as_json:
        print_json(read.to_dict())
        return
    say(f"{manifest}: keeps {read.num_kept} experts in each of {len(read.keep)} layers{_channels(read)}")
    facts = [
        ("criterion", read.criterion),
        ("model", ", ".join(f"{key} {value}" for key, value in read.model.items())),
        ("mtp_keep", str(len(read.mtp_keep))),
    ]
    rows((label, value) for label, value in facts if value)
    table(("layer", "kept", "first", "last"), _lines(read))


@command("check")
@_file_argument
@click.argument("source", metavar="SRC", type=PATH)
def _check(manifest: Path, source: Path, family: FamilyFlags, output: JsonFlags) -> None:
    """Check that FILE fits the checkpoint SRC; exit 1 and say where if it does not."""
    family.load()
    layout = _layout(source)
    assert layout is not None
    read = Manifest.load(manifest, layout)
    _refuse_other_width(read, layout)
    counts = Counter(len(keep) for keep in read.keep.values())
    if output.as_json:
        print_json({"fits": True, "kept": read.num_kept, "experts": layout.num_experts, "layers": counts.total()})
    else:
        kept = f"keeps {read.num_kept} of {layout.num_experts} experts per layer{_channels(read)}"
        say(f"{manifest}: fits {source}: {kept}")


@command("convert")
@_file_argument
@click.argument("target", metavar="TARGET", type=PATH)
def _convert(manifest: Path, target: Path, how: _Read, family: FamilyFlags) -> None:
    """Write FILE, in whatever form it is, to TARGET in shardxform's own form."""
    family.load()
    read = Manifest.load(manifest, _layout(how.model), sort=how.sort, step=how.step)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(pretty(read.to_dict()))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as e:
        raise OutputError(f"{target}: {e.strerror}; name a file that does not exist yet") from e
    except OSError as e:
        raise OutputError(f"{target}: {why_not(target, e)}") from e
    say(f"{target}: keeps {read.num_kept} experts in each of {len(read.keep)} layers{_channels(read)}")


def _channels(manifest: Manifest) -> str:
    """What is said of channels, where some are taken out."""
    width = manifest.width
    return f", {width.channels:,} of {width.of:,} channels of each" if width else ""


def _refuse_other_width(manifest: Manifest, layout: Layout) -> None:
    """Refuse channels of experts that are of another width, or of which none are taken out.

    Raises:
        ManifestError, PlanError: as when it is used.

    """
    if manifest.width is None:
        return
    from shardxform.plan.narrowing import width_key

    found = value_at(layout.config, ".".join(width_key(layout)))
    if found != manifest.width.of:
        raise ManifestError(
            f"{manifest.where}: width.of: made for experts of {manifest.width.of} channels, but they have {found}"
        )


def _layout(model: Path | None) -> Layout | None:
    if model is None:
        return None
    checkpoint = as_family(Checkpoint.open(model))
    return layout_of(checkpoint.config, checkpoint.tensors, checkpoint.where)


def _lines(manifest: Manifest) -> list[tuple[str, ...]]:
    layers = [(str(layer), keep) for layer, keep in manifest.keep.items()]
    layers += [(f"MTP {layer}", keep) for layer, keep in manifest.mtp_keep.items()]
    return [(layer, str(len(keep)), str(keep[0]), str(keep[-1])) for layer, keep in layers]


for _each in (_show, _check, _convert):
    manifest_command.add_command(_each)
