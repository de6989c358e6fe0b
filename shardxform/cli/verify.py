"""`shardxform verify`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from shardxform.checkpoint.gguf import GgufModel
from shardxform.checkpoint.table import Checkpoint, find_gguf
from shardxform.cli.console import count, escaped, gb, print_json, progress, say, with_options
from shardxform.cli.inputs import is_gguf, open_gguf_named, open_named
from shardxform.cli.options import (
    SOURCE,
    FamilyFlags,
    Flags,
    HubFlags,
    QuietFlags,
    Source,
    command,
    option,
    out_argument,
    refuse_idle,
)
from shardxform.errors import CheckpointError
from shardxform.plan.view import MtpMode
from shardxform.verification import DEFAULT_JOBS, Problem, Rounding, VerifyReport, verify
from shardxform.verification.slabs import verify_gguf
from shardxform.verification.source import Options

__all__ = ["verify_command"]

_MOST_LINES: Final = 8  # of one kind; --json prints all
_MOST_WIDTH: Final = 60
_MOST_WHERE: Final = 300  # letters of a name that a stranger gave
_MOST_MESSAGE: Final = 1500
_LEFT: Final = {"healed": "healed", "tuned": "rounded with tuning", "unknown": "not comparable"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made(Flags, heading="How OUT was made"):
    source: Source | None = option("The checkpoint OUT was made from: compare.", metavar="SRC", type=SOURCE, first=True)
    manifest: Path | None = option(
        "Experts that were kept, in any of the forms that manifests/ lists.", "-m", metavar="FILE"
    )
    text_only: bool | None = option(
        "OUT was made with --text-only.  [default: what OUT/shardxform.json says]", is_flag=True
    )
    mtp: MtpMode | None = option("OUT was made with this --mtp.  [default: what OUT/shardxform.json says]")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Depth(Flags, heading="How much is looked at"):
    quick: bool = option("Headers, index, config and small files only; no tensor data.", default=False)
    independent: bool = option(
        "Also derive OUT from SRC a second time, by code that shares nothing with what wrote it.", default=False
    )
    jobs: int | None = option("Threads that read.  [default: up to 4]", "-j", type=click.IntRange(1, 64))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output(QuietFlags):
    worst: int = option(
        "Quantized weights to list, those farthest from SRC; --json has all.", default=5, type=click.IntRange(0)
    )


@command("verify")
@out_argument
def verify_command(out: Path, made: _Made, depth: _Depth, family: FamilyFlags, hub: HubFlags, output: _Output) -> None:
    """Check the checkpoint OUT, and prove it against SRC.

    Looks at every tensor's name, shape and numbers, at config, index and sidecars, and lists everything that is
    wrong; an output of shardxform must also be what was written, bit for bit, by the digests in its record. With
    --source, every tensor must hold the very bytes that SRC and the manifest give; quantized weights must be what
    rounding SRC again gives, bit for bit, or where that is not known (tuned, or another tool's) within what tuning
    can do, one and a half steps at most, and with no systematic error. What `convert --to bf16` and
    `--to fp16` wrote must be the values of SRC's quantized weights, bit for bit. Of tensors that shardxform.json says
    were healed, all but the values must be SRC's, and no value may be farther from SRC's than healing can have moved
    it. The last line says how many values were compared, and why the others were not. Exits with 1 when OUT is not
    sound. Works on checkpoints of any tool, and on models in GGUF: a file or a folder.
    """
    if made.source is None and (made.manifest or made.text_only or made.mtp):
        raise click.UsageError("--manifest, --text-only and --mtp say how OUT was made from --source; give that too")
    if made.source is None and hub.connections is not None:
        raise click.UsageError("--connections is for reading --source from the hub; give that too")
    if depth.independent and (made.source is None or depth.quick):
        raise click.UsageError("--independent compares values with --source; give that, and no --quick")
    if _is_gguf(out):
        report = _verify_gguf(out, made, depth, hub, family, output)
    else:
        family.load()
        report = _verify(out, made, depth, hub, output)
    if output.as_json:
        print_json(report.to_dict())
    else:
        _show(report, depth.quick, output.worst)
    raise click.exceptions.Exit(0 if report.sound else 1)


def _verify(out: Path, made: _Made, depth: _Depth, hub: HubFlags, output: _Output) -> VerifyReport:
    origin = open_named(made.source, hub, out.parent) if made.source is not None else None
    with progress("verify", output.quiet or depth.quick) as on_progress:
        return verify(
            out,
            source=origin,
            manifest=made.manifest,
            quick=depth.quick,
            on_progress=on_progress,
            text_only=made.text_only,
            mtp=made.mtp,
            independent=depth.independent,
            jobs=depth.jobs or DEFAULT_JOBS,
        )


def _is_gguf(out: Path) -> bool:
    """Whether OUT is GGUF, whole or not."""
    try:
        return find_gguf(out) is not None
    except CheckpointError:
        return True


def _verify_gguf(
    out: Path, made: _Made, depth: _Depth, hub: HubFlags, family: FamilyFlags, output: _Output
) -> VerifyReport:
    """Verify a model in GGUF, against another or against a checkpoint of safetensors.

    Raises:
        SchemeError: options that are for safetensors alone.

    """
    origin: GgufModel | Checkpoint | None = None
    if made.source is not None and is_gguf(made.source):
        refuse_idle(made, "text_only", "mtp", wanted=f"safetensors, but {made.source} is GGUF")
        origin = open_gguf_named(made.source, hub, out.parent)
    elif made.source is not None:
        family.load()
        origin = open_named(made.source, hub, out.parent)
    with progress("verify", output.quiet or depth.quick) as on_progress:
        return verify_gguf(
            out,
            source=origin,
            given=Options(manifest=made.manifest, text_only=made.text_only, mtp=made.mtp),
            quick=depth.quick,
            jobs=depth.jobs or DEFAULT_JOBS,
            on_progress=on_progress,
            independent=depth.independent,
        )


def _show(report: VerifyReport, quick: bool, worst: int) -> None:
    """What was found, and as the last line what is to be thought of the whole."""
    if report.unfinished:
        say(f"{report.out}: unfinished: {with_options(report.problems[0].message)}")
        return
    if not report.sound:
        say(f"{report.out}: {', '.join(_counts(report))}")
    _list(report.problems, "")
    _list(report.warnings, "warning: ")
    if report.rounding and report.rounding.by_weight and worst:
        _show_errors(report.rounding, worst)
    say(f"{', '.join(_summary(report, quick))}; {_values(report, quick)}")


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
    if report.values_near:
        text += f"; {report.values_near:,} healed, and as near to it as healing leaves them"
    others = Counter(report.values_left)
    others.subtract({"healed": report.values_near})
    left = ", ".join(f"{number:,} {_LEFT[why]}" for why, number in others.items() if number)
    return f"{text}; {left}: only shape, type and finiteness" if left else text


def _ways(report: VerifyReport) -> Iterator[str]:
    """How values were compared, where they were all as they must be."""
    if report.rounding and not report.rounding.differing:
        yield _rounded(report.rounding)
    if not report.tensors_differing and (equal := report.tensors_compared - report.tensors_derived):
        yield f"{equal:,} equal byte for byte"
    if not report.tensors_differing and report.tensors_derived:
        yield f"{report.tensors_derived:,} bit-equal to values that are worked out of it"


def _rounded(rounding: Rounding) -> str:
    if rounding.repacked:
        return f"{rounding.modules:,} quantized weights with the same integers and scales"
    if rounding.exact:
        rounded, taken = rounding.modules - rounding.taken_over, rounding.taken_over
        kinds = {"bit-equal to rounding again": rounded, "with the integers and scales of the source": taken}
        return ", ".join(f"{count:,} quantized weights {what}" for what, count in kinds.items() if count)
    text = f"{rounding.modules:,} quantized weights within bounds"
    return f"{text}, {rounding.moved:,} codes not the nearest" if rounding.moved else text


def _show_errors(rounding: Rounding, worst: int) -> None:
    share = rounding.clipped / max(rounding.weights, 1)
    say(f"relative error {rounding.relative_error:.4f} over all quantized weights, {share:.2%} clipped; the worst:")
    for weight in rounding.by_weight[:worst]:
        say(f"  {weight.relative_error:.4f}  {weight.name}")


def _list(found: tuple[Problem, ...], mark: str) -> None:
    """Problems by kind, in the order in which the kinds were found; places aligned."""
    kinds: dict[str, list[Problem]] = {}
    for problem in found:
        kinds.setdefault(problem.code, []).append(problem)
    for code, listed in kinds.items():
        shown = listed[:_MOST_LINES]
        width = min(max(len(p.where) for p in shown), _MOST_WIDTH)
        say(f"{mark}{code}", color="yellow" if mark else "red", bold=True)
        for problem in shown:
            where, message = escaped(problem.where, _MOST_WHERE), escaped(with_options(problem.message), _MOST_MESSAGE)
            say(f"  {where:<{width}}  {message}")
        if len(listed) > len(shown):
            say(f"  and {len(listed) - len(shown):,} more; --json lists all")
