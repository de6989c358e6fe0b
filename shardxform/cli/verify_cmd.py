"""`shardxform verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from shardxform.cli.console import gb, print_json, progress
from shardxform.cli.options import json_option, manifest_option, out_argument
from shardxform.cli.sources import SOURCE, Source, connections_option, open_given
from shardxform.verification import Problem, Rounding, VerifyReport, verify
from shardxform.view import MtpMode

__all__ = ["command"]

_MOST_LINES: Final = 8  # of one kind; --json prints all
_MOST_WIDTH: Final = 60


@click.command("verify")
@out_argument
@click.option("--source", metavar="SRC", type=SOURCE, help="The checkpoint OUT was made from: compare.")
@manifest_option
@click.option(
    "--text-only",
    is_flag=True,
    default=None,
    help="OUT was made with --text-only.  [default: what OUT/shardxform.json says]",
)
@click.option(
    "--mtp",
    type=click.Choice(["auto", "keep", "drop"]),
    default=None,
    help="OUT was made with this --mtp.  [default: what OUT/shardxform.json says]",
)
@click.option(
    "--worst",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Quantized weights to list, those farthest from SRC; --json has all.",
)
@click.option("--quick", is_flag=True, help="Headers, index, config and small files only; no tensor data.")
@click.option("--jobs", "-j", type=click.IntRange(1, 64), default=None, help="Threads that read.  [default: up to 4]")
@connections_option
@json_option
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
@click.pass_context
def command(
    ctx: click.Context,
    out: Path,
    source: Source | None,
    manifest: Path | None,
    text_only: bool | None,
    mtp: MtpMode | None,
    worst: int,
    quick: bool,
    jobs: int | None,
    as_json: bool,
    quiet: bool,
    connections: int | None,
) -> None:
    """Check the checkpoint OUT, and prove it against SRC.

    Looks at every tensor's name, shape and numbers, at config, index and sidecars, and lists everything that is
    wrong. With --source, every tensor must hold the very bytes that SRC and the manifest give; quantized weights must
    be what rounding SRC again gives, bit for bit, or where that is not known (tuned, or another tool's) within half a
    step, or one and a half, of SRC's. Of tensors that shardxform.json says were healed, all but the values must be
    SRC's. Exits with 1 when OUT is not sound. Works on checkpoints of any tool.
    """
    if source is None and (manifest or text_only or mtp):
        raise click.UsageError("--manifest, --text-only and --mtp say how OUT was made from --source; give that too")
    if source is None and connections is not None:
        raise click.UsageError("--connections is for reading --source from the hub; give that too")
    origin = open_given([source], {"connections": connections}, out.parent)[0] if source is not None else None
    with progress("verify", quiet or quick) as on_progress:
        report = verify(
            out,
            source=origin,
            manifest=manifest,
            quick=quick,
            on_progress=on_progress,
            text_only=text_only,
            mtp=mtp,
            **({} if jobs is None else {"jobs": jobs}),
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report, quick, worst)
    ctx.exit(0 if report.sound else 1)


def _show(report: VerifyReport, quick: bool, worst: int) -> None:
    click.echo(", ".join(_summary(report, quick)))
    _list(report.problems, "")
    _list(report.warnings, "warning: ")
    if report.rounding and report.rounding.by_weight and worst:
        _show_errors(report.rounding, worst)


def _summary(report: VerifyReport, quick: bool) -> Iterator[str]:
    rounding, source = report.rounding, report.source
    if report.sound:
        yield f"sound: {report.tensors:,} tensors"
        yield f"{report.experts:,} experts"
        yield "headers only" if quick else f"{gb(report.bytes_scanned)} scanned"
        if report.tensors_healed:
            yield f"{report.tensors_healed:,} healed, of which values are not {source}'s"
        if rounding:
            yield _rounded(rounding, source)
            yield f"{gb(report.bytes_compared)} equal byte for byte"
        elif any(warning.code in ("rounded", "dequantized") for warning in report.warnings):
            other = "other " if report.tensors_healed else ""
            yield f"every {other}16-bit byte equal to {source}" if report.bytes_compared else "nothing compared"
        elif report.bytes_compared:
            yield f"every {'other ' if report.tensors_healed else ''}byte equal to {source}"
        elif source:
            yield f"headers follow from {source}"
    else:
        count = len(report.problems)
        yield f"{report.out}: {count} problem{'s' * (count > 1)}"
        if report.tensors_differing:
            yield f"{report.tensors_differing:,} of {report.tensors_compared:,} tensors differ from {source}"
        if rounding and rounding.differing:
            yield f"{rounding.differing:,} of {rounding.modules:,} quantized weights are no rounding of {source}"
    if count := len(report.warnings):
        yield f"{count} warning{'s' * (count > 1)}"


def _rounded(rounding: Rounding, source: str | None) -> str:
    if rounding.repacked:
        return f"{rounding.modules:,} quantized weights with the integers and scales of {source}"
    if rounding.exact:
        return f"{rounding.modules:,} quantized weights bit-equal to rounding {source} again"
    text = f"{rounding.modules:,} quantized weights within bounds of {source}"
    return f"{text} ({rounding.moved:,} codes not the nearest)" if rounding.moved else text


def _show_errors(rounding: Rounding, worst: int) -> None:
    share = rounding.clipped / max(rounding.weights, 1)
    click.echo(
        f"relative error {rounding.relative_error:.4f} over all quantized weights, {share:.2%} clipped; the worst:"
    )
    for weight in rounding.by_weight[:worst]:
        click.echo(f"  {weight.relative_error:.4f}  {weight.name}")


def _list(found: tuple[Problem, ...], mark: str) -> None:
    """Problems by kind, in the order in which the kinds were found; places aligned."""
    kinds: dict[str, list[Problem]] = {}
    for problem in found:
        kinds.setdefault(problem.code, []).append(problem)
    for code, listed in kinds.items():
        shown = listed[:_MOST_LINES]
        width = min(max(len(p.where) for p in shown), _MOST_WIDTH)
        click.echo(click.style(f"{mark}{code}", fg="yellow" if mark else "red", bold=True))
        for problem in shown:
            click.echo(f"  {problem.where:<{width}}  {problem.message}")
        if len(listed) > len(shown):
            click.echo(f"  and {len(listed) - len(shown):,} more; --json lists all")
