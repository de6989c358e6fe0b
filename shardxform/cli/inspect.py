"""`shardxform inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import click

from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.console import gb, print_json, rows, short, table
from shardxform.cli.inputs import open_named
from shardxform.cli.options import FamilyFlags, HubFlags, JsonFlags, Source, command, option, source_argument
from shardxform.plan.inspection import Inspection, inspect_checkpoint

__all__ = ["inspect_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown(JsonFlags):
    pattern: str | None = option(
        "List tensors instead, all or those that match a pattern such as '*.experts.*'.",
        "--tensors",
        metavar="PATTERN",
        is_flag=False,
        flag_value="*",
    )


@command("inspect")
@source_argument
def inspect_command(source: Source, family: FamilyFlags, hub: HubFlags, shown: _Shown) -> None:
    """Show what SRC is made of: family, experts, sizes by role, and what pruning would make of it.

    Reads headers only, never tensor data.
    """
    family.load()
    checkpoint = open_named(source, hub, Path())
    if shown.pattern is not None:
        _list_tensors(checkpoint, shown.pattern, shown.as_json)
        return
    inspection = inspect_checkpoint(checkpoint)
    if shown.as_json:
        print_json(inspection.to_dict())
    else:
        _show(inspection)


def _list_tensors(checkpoint: Checkpoint, pattern: str, as_json: bool) -> None:
    found = [ref for name, ref in checkpoint.tensors.items() if fnmatchcase(name, pattern)]
    if as_json:
        specs = [
            {
                "name": ref.name,
                "dtype": ref.spec.dtype,
                "shape": list(ref.spec.shape),
                "bytes": ref.nbytes,
                "shard": ref.ranges[0].file if ref.ranges else None,
            }
            for ref in found
        ]
        print_json({"pattern": pattern, "tensors": specs})
        return
    lines = [
        (ref.name, ref.spec.dtype, str(list(ref.spec.shape)), gb(ref.nbytes), ref.ranges[0].file if ref.ranges else "-")
        for ref in found
    ]
    table(("tensor", "dtype", "shape", "size", "shard"), lines)
    click.echo(f"  {len(found):,} of {len(checkpoint.tensors):,} tensors, {gb(sum(ref.nbytes for ref in found))}")


def _show(i: Inspection) -> None:
    click.echo(f"{i.path}: {gb(i.nbytes)}, {_parameters(i)}")
    rows(_facts(i))
    click.echo()
    table(("role", "tensors", "size", "share"), _roles(i))
    if i.outlook:
        click.echo()
        table(
            ("could become", "size", "share"), [(what, gb(n), f"{n / i.nbytes:.1%}") for what, n in i.outlook.items()]
        )
    if i.unknown:
        click.echo(f"\n  {len(i.unknown)} tensors unknown to the family, such as {i.unknown[0]}")


def _parameters(i: Inspection) -> str:
    if i.parameters is None:
        return "parameters not known: quantized in a form that is not understood"
    apart = f", and {short(i.parameters_apart)} in {_apart(i)}" if i.parameters_apart else ""
    return f"{short(i.parameters)} parameters{apart}"


def _apart(i: Inspection) -> str:
    parts = ("the vision tower" if i.vision else "", "MTP layers" if i.mtp_layers else "")
    return " and ".join(filter(None, parts)) or "other parts"


def _facts(i: Inspection) -> Iterator[tuple[str, str]]:
    yield "family", f"{i.family} ({i.architecture})"
    groups = f" in {i.groups} router groups" if i.groups > 1 else ""
    yield "experts", f"{i.experts} per layer{groups}, top-{i.top_k}, {i.experts_spelling}"
    dense = f", {i.layers - i.moe_layers} of them dense" if i.moe_layers != i.layers else ""
    yield "layers", f"{i.layers}{dense}" + (f" + {i.mtp_layers} MTP" if i.mtp_layers else "")
    yield "vision tower", "yes" if i.vision else "no"
    yield "dtypes", ", ".join(f"{dtype} {gb(nbytes)}" for dtype, nbytes in i.dtypes.items())
    if i.quantization:
        each = [f"{name} ({count:,} weights, {gb(nbytes)})" for name, (count, nbytes) in i.encodings.items()]
        yield "quantized", ", ".join([i.quantization, *each])
    yield "shards", f"{i.shards}, {i.tensors:,} tensors"
    yield "sidecars", ", ".join(i.sidecars) or "none"
    if i.unread:
        yield "not part of it", ", ".join(i.unread)


def _roles(i: Inspection) -> Iterator[tuple[str, str, str, str]]:
    for role, (count, nbytes) in i.roles.items():
        yield role, f"{count:,}", gb(nbytes), f"{nbytes / max(i.nbytes, 1):.1%}"
