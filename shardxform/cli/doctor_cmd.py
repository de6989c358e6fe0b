"""`shardxform doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from shardxform.cli.console import gb, print_json, rows, table
from shardxform.cli.doctor import Diagnosis, Machine, Need, diagnose
from shardxform.cli.options import json_option

__all__ = ["command"]


@click.command("doctor")
@click.argument("source", metavar="[SRC]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--disk",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=".",
    show_default=True,
    help="Where outputs would be written.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, source: Path | None, disk: Path, as_json: bool) -> None:
    """Show memory, disk, cores, GPUs and libraries, and which commands they are enough for.

    What a command takes is worked out from SRC's headers; without SRC, for Qwen3.5-35B-A3B. Exits with 1 when
    something is missing without which nothing works.
    """
    found = diagnose(disk, source)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)
    ctx.exit(1 if found.problems else 0)


def _show(found: Diagnosis) -> None:
    rows(_machine(found.machine))
    click.echo()
    table(("library", "version", "wanted", "extra"), _libraries(found))
    for extra, names in _missing(found).items():
        click.echo(f"  not there: {', '.join(names)}; pip install 'shardxform[{extra}]'")
    click.echo()
    table((found.model, "memory", "disk", ""), map(_need, found.needs))
    for problem in found.problems:
        click.echo(f"  PROBLEM: {problem}")


def _machine(machine: Machine) -> Iterator[tuple[str, str]]:
    yield "system", f"{machine.system}, Python {machine.python}"
    yield "memory", f"{_known(machine.memory_bytes)}, {_known(machine.available_bytes)} of it available"
    yield "disk", f"{gb(machine.free_bytes)} free in {machine.disk}"
    yield "cores", str(machine.cores)
    listed = ", ".join(f"{each.name} {each.model} ({gb(each.memory_bytes)})" for each in machine.devices)
    yield "GPUs", listed or machine.devices_unknown or "none that torch sees"


def _known(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else gb(nbytes)


def _libraries(found: Diagnosis) -> Iterator[tuple[str, ...]]:
    for each in found.libraries:
        yield each.name, each.version or "-", f">= {each.least}", each.extra or "required"


def _missing(found: Diagnosis) -> dict[str, list[str]]:
    """Libraries of every extra that are not there or too old, and what they are for."""
    out: dict[str, list[str]] = {}
    for each in found.libraries:
        if each.extra and not each.usable:
            out.setdefault(each.extra, []).append(f"{each.name} ({each.enables})")
    return out


def _need(need: Need) -> tuple[str, ...]:
    verdict = f"too little or missing: {', '.join(need.lacks)}" if need.lacks else "fits"
    return need.command, gb(need.memory_bytes), gb(need.disk_bytes), verdict
