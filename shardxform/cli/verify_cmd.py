"""`shardxform verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from shardxform.cli.console import count, gb, print_json, progress
from shardxform.cli.options import json_option, manifest_option, out_argument
from shardxform.cli.sources import SOURCE, Source, connections_option, open_given
from shardxform.plan.view import MtpMode
from shardxform.verification import DEFAULT_JOBS, Problem, Rounding, VerifyReport, verify

__all__ = ["command"]

_MOST_LINES: Final = 8  # of one kind; --json prints all
_MOST_WIDTH: Final = 60
_LEFT: Final = {"healed": "healed", "tuned": "rounded with tuning", "unknown": "not comparable"}


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
@click.option(
    "--independent",
    is_flag=True,
    help="Also derive OUT from SRC a second time, by code that shares nothing with what wrote it.",
)
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
    independent: bool,
    jobs: int | None,
    as_json: bool,
    quiet: bool,
    connections: int | None,
) -> None:
    """Check the checkpoint OUT, and prove it against SRC.

    Looks at every tensor's name, shape and numbers, at config, index and sidecars, and lists everything that is
    wrong; an output of shardxform must also be what was written, bit for bit, by the digests in its record. With
    --source, every tensor must hold the very bytes that SRC and the manifest give; quantized weights must be what
    rounding SRC again gives, bit for bit, or where that is not known (tuned, or another tool's) within what tuning
    can do, one and a half steps at most, and with no systematic error. What `convert --to bf16` and
    `--to fp16` wrote must be the values of SRC's quantized weights, bit for bit. Of tensors that shardxform.json says
    were healed, all but the values must be SRC's. The last line says how many values were compared, and why the
    others were not. Exits with 1 when OUT is not sound. Works on checkpoints of any tool.
    """
    if source is None and (manifest or text_only or mtp):
        raise click.UsageError("--manifest, --text-only and --mtp say how OUT was made from --source; give that too")
    if source is None and connections is not None:
        raise click.UsageError("--connections is for reading --source from the hub; give that too")
    if independent and (source is None or quick):
        raise click.UsageError("--independent compares values with --source; give that, and no --quick")
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
            independent=independent,
            jobs=jobs or DEFAULT_JOBS,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report, quick, worst)
    ctx.exit(0 if report.sound else 1)


def _show(report: VerifyReport, quick: bool, worst: int) -> None:
    """What was found, and as the last line what is to be thought of the whole."""
    if report.unfinished:
        click.echo(f"{report.out}: unfinished: {report.problems[0].message}")
        return
    if not report.sound:
        click.echo(f"{report.out}: {', '.join(_counts(report))}")
    _list(report.problems, "")
    _list(report.warnings, "warning: ")
    if report.rounding and report.rounding.by_weight and worst:
        _show_errors(report.rounding, worst)
    click.echo(f"{', '.join(_summary(report, quick))}; {_values(report, quick)}")


def _counts(report: VerifyReport) -> Iterator[str]:
    """What is wrong, in numbers."""
    rounding, source = report.rounding, report.source
    yield count(len(report.problems), "problem")
    if report.tensors_differing:
        yield f"{report.tensors_differing:,} of {report.tensors_compared:,} tensors differ from {source}"
    if rounding and rounding.differing:
        yield f"{rounding.differing:,} of {rounding.modules:,} quantized weights are no rounding of {source}"
    if report.warnings:
        yield count(len(report.warnings), "warning")


def _summary(report: VerifyReport, quick: bool) -> Iterator[str]:
    """Whether it is sound, and how much of it was looked at."""
    if report.sound:
        yield f"sound: {count(report.tensors, 'tensor')}"
    else:
        yield f"not sound: {count(len(report.problems), 'problem')} in {count(report.tensors, 'tensor')}"
    yield count(report.experts, "expert")
    yield "headers only" if quick else f"{gb(report.bytes_scanned)} scanned"
    if report.tensors_digested:
        same = "all" if report.tensors_digested == report.tensors else f"{report.tensors_digested:,}"
        yield f"{same} bit for bit as written"
    if report.warnings:
        yield count(len(report.warnings), "warning")
    if report.rederived is not None:
        yield f"{count(report.rederived, 'weight')} derived independently"


def _values(report: VerifyReport, quick: bool) -> str:
    """How many values were held against the source, how, and what is known of the others."""
    if report.source is None:
        return "values not compared, no --source given"
    if quick:
        healed = f", {report.tensors_healed:,} of them healed" if report.tensors_healed else ""
        return f"no value compared with {report.source}{healed}"
    whole = report.values_compared == report.tensors
    if whole and report.sound and report.tensors_compared - report.tensors_derived == report.tensors:
        return f"values of all {report.tensors:,} tensors equal to {report.source}, byte for byte"
    many = f"all {report.tensors:,}" if whole else f"{report.values_compared:,} of {report.tensors:,}"
    how = ", ".join(_ways(report))
    text = f"values of {many} tensors compared with {report.source}{f' ({how})' if how else ''}"
    left = ", ".join(f"{number:,} {_LEFT[why]}" for why, number in report.values_left.items())
    return f"{text}; {left}: only shape, type and finiteness" if left else text


def _ways(report: VerifyReport) -> Iterator[str]:
    """How values were compared, where they were all as they must be."""
    if report.rounding and not report.rounding.differing:
        yield _rounded(report.rounding)
    if not report.tensors_differing and (equal := report.tensors_compared - report.tensors_derived):
        yield f"{equal:,} equal byte for byte"
    if not report.tensors_differing and report.tensors_derived:
        yield f"{report.tensors_derived:,} bit-equal to the values of quantized weights"


def _rounded(rounding: Rounding) -> str:
    if rounding.repacked:
        return f"{rounding.modules:,} quantized weights with the same integers and scales"
    if rounding.exact:
        return f"{rounding.modules:,} quantized weights bit-equal to rounding again"
    text = f"{rounding.modules:,} quantized weights within bounds"
    return f"{text}, {rounding.moved:,} codes not the nearest" if rounding.moved else text


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
