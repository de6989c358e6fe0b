"""What `compress` prints: what it would take, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from shardxform.cli.block_report import blocks_of, judged_on, tell_blocks
from shardxform.cli.console import LOWER, count, gb, give_or_take, pasteable, print_json, rows, short, span, table, tell

if TYPE_CHECKING:
    from shardxform.cli.sources import Source
    from shardxform.compress import CompressOptions, Forecast, Outcome, Prepared, Request

__all__ = ["show_forecast", "show_outcome"]


def show_forecast(prepared: Prepared, options: CompressOptions, *, as_json: bool) -> None:
    """Print what every stage would take; the machine is measured for it."""
    from shardxform.base.file_system import FileSystem
    from shardxform.compress.forecast import forecast

    request, stages = prepared.request, forecast(prepared, options, timed=True)
    totals: dict[str, float] = {
        "peak_memory_bytes": max(stage.peak_memory_bytes for stage in stages),
        "disk_bytes": _most_disk(stages),
        "free_disk_bytes": FileSystem().free_bytes(request.out.absolute()),
        "seconds": sum(stage.seconds for stage in stages),
    }
    if as_json:
        paths = {"source": request.source.where, "out": str(request.out), "folder": str(request.folder)}
        texts = (request.score_windows, request.tune_windows, request.eval_windows)
        of_text = [note for windows in texts if windows for note in windows.notes]
        known = {"summary": dict(prepared.sketch.summary), "notes": [*prepared.sketch.notes, *dict.fromkeys(of_text)]}
        print_json({**paths, "stages": list(map(asdict, stages)), **totals, **known})
        return
    summary = prepared.sketch.summary
    click.echo(f"compress {request.source.where} -> {request.out}  (dry run: nothing is written)")
    rows(
        [
            ("experts", _experts(summary, pruned=request.pruning is not None)),
            ("size", _sizes(summary["bytes_before"], prepared.sketch.data_bytes)),
            ("results", str(request.folder)),
        ]
    )
    header = ("stage", "state", "time", "memory", "written", "disk meanwhile", "tokens x blocks")
    table(header, map(_stage_line, stages))
    if all(stage.state == "done" for stage in stages):
        rows([("to do", "nothing: all of it is there, made from these inputs")])
    else:
        rows(_total_lines(request, totals))
    for note in prepared.sketch.notes:
        click.echo(f"  note: {note}")
    if request.eval_windows is None:
        click.echo("  note: OUT is not measured without --eval-data")


def _total_lines(request: Request, totals: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """What all stages together would take."""
    yield "memory", f"about {gb(totals['peak_memory_bytes'])} at most"
    yield "free disk", f"{gb(totals['free_disk_bytes'])} of {gb(totals['disk_bytes'])} needed"
    yield "time", f"about {span(totals['seconds'])}: an estimate, {_basis(request)}"


def _experts(summary: Mapping[str, Any], *, pruned: bool) -> str:
    before, after = summary["experts_before"], summary["experts_after"]
    if not pruned:
        return f"all {before} of each layer stay, top-{summary['top_k']}: nothing is pruned without --keep or --ratio"
    return f"{before} -> {after} per layer, top-{summary['top_k']}"


def _most_disk(stages: list[Forecast]) -> int:
    """Disk at the fullest moment: what stays so far, and what lies there meanwhile; what is done takes no more."""
    most = written = 0
    for stage in stages:
        if stage.state == "done":
            continue
        written += stage.written_bytes
        most = max(most, written + stage.work_bytes)
    return most


def _stage_line(stage: Forecast) -> tuple[str, ...]:
    sizes = (gb(size) if size else "-" for size in (stage.peak_memory_bytes, stage.written_bytes, stage.work_bytes))
    time = span(stage.seconds) if stage.seconds else "-"
    return (stage.stage, stage.state, time, *sizes, short(stage.tokens) if stage.tokens else "-")


def _basis(request: Request) -> str:
    what = "multiplying matrices of the model's size" if request.runs_model else "rounding a matrix"
    return f"from {what} and reading a piece of SRC, on this machine, as busy as it was"


def _sizes(before: int, after: int) -> str:
    return f"{gb(before)} -> {gb(after)} ({after / max(before, 1):.1%})"


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "out": str(outcome.out),
        "folder": str(outcome.folder),
        "made": list(outcome.made),
        "stages": {stage: dict(facts) for stage, facts in outcome.facts.items()},
        "written_bytes": outcome.report.written_bytes,
        "facts": dict(outcome.report.facts),
        "measured": list(outcome.report.measured),
        "spent": {stage: {"seconds": round(s, 3), "peak_rss_bytes": m} for stage, (s, m) in outcome.spent.items()},
        "seconds": round(outcome.seconds, 3),
        "peak_rss_bytes": outcome.peak_rss_bytes,
    }


def show_outcome(outcome: Outcome, source: Source, *, as_json: bool, verbose: bool) -> None:
    """Print what came of it."""
    if as_json:
        print_json(_as_json(outcome))
        return
    if outcome.made:
        click.echo(f"{outcome.out}: complete and durable")
    else:
        click.echo(f"{outcome.out}: already complete, made from the same inputs; nothing written")
    rows(_lines(outcome, source))
    if verbose:
        click.echo()
        spent = outcome.spent.items()
        table(("stage", "time", "peak so far"), ((stage, span(took), gb(peak)) for stage, (took, peak) in spent))
    blocks = blocks_of(outcome.report.facts)
    told = blocks if verbose else [block for block in blocks if "rounded_to_nearest" in block]
    tell_blocks({"blocks": told}, outcome.report.measured)
    if left := outcome.facts["card"].get("left"):
        tell(f"note: no card was written: {left}")
    if "evaluate" not in outcome.facts:
        tell("note: not measured; give --eval-data, held-out text, and only that is done")


def _lines(outcome: Outcome, source: Source) -> Iterator[tuple[str, str]]:
    facts = outcome.facts
    if "select" in facts:
        yield from _choice_lines(facts["select"])
    else:
        yield "experts", f"all {facts['quantize']['experts_before']} of each layer: nothing was pruned"
    yield "size", _sizes(facts["quantize"]["bytes_before"], facts["quantize"]["bytes_after"])
    yield from _block_lines(blocks_of(outcome.report.facts))
    checked = facts["verify"]
    depth = f"{gb(checked['bytes_scanned'])} scanned" if checked["full"] else "bit for bit as written"
    if checked["full"] and "values_compared" in checked:
        depth += f", values of {checked['values_compared']:,} compared"
    warned = f", {count(checked['warnings'], 'warning')}" if checked["warnings"] else ""
    yield "verified", f"sound: {count(checked['tensors'], 'tensor')}, {depth}{warned}"
    if "evaluate" in facts:
        yield from _evaluation_lines(facts["evaluate"])
    earlier = len(outcome.made) < len(facts) or outcome.report.resumed_bytes > 0
    yield "time", span(outcome.seconds) + (" in this run" if earlier else "")
    yield "memory", f"{gb(outcome.peak_rss_bytes)} peak"
    card = "" if facts["card"].get("left") else f", {outcome.out / 'README.md'}"
    yield "results", f"{outcome.folder}{card}"
    if not checked["full"]:
        yield "prove it", pasteable("shardxform", "verify", outcome.out, "--source", source)


def _block_lines(blocks: list[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What healing and tuning did, over all blocks."""
    healed = [block["healed"] for block in blocks if block.get("healed")]
    tuned = [block for block in blocks if block.get("rtn_error")]
    for label, found, before, after in (
        ("healed", healed, "pruned_error", "healed_error"),
        ("tuned", tuned, "rtn_error", "tuned_error"),
    ):
        total = sum(block[before] for block in found)
        if total:
            share = sum(block[after] for block in found) / total
            what = "pruning" if label == "healed" else "rounding"
            yield label, f"squared error {share:.1%} of that of {what}, over {count(len(found), 'block')}"
    if (healed or tuned) and (text := judged_on(blocks)):
        yield "", f"on {text}"


def _choice_lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    share = facts["saliency_kept"]
    kept = "" if share is None else f", with {share:.1%} of the saliency"
    yield "experts", f"{facts['experts']} -> {facts['kept']} per layer, by {facts['criterion']}{kept}"
    if facts["never_reached_kept"]:
        yield "note", f"kept {count(facts['never_reached_kept'], 'expert')} that no token reached; score more data"


def _evaluation_lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found, against = facts["perplexity"], facts["against"]
    if found is not None and against["perplexity"]:
        before = against["perplexity"]
        changed = f"{found / before - 1:+.2%}{_error(against, 'perplexity_ratio', '{:.2%}')}"
        yield "perplexity", f"{found:.4f}, of the source {before:.4f}: {changed}"
        if found < before:
            yield "", LOWER
    divergence = f"{against['kl']:.6f}{_error(against, 'kl', '{:.6f}')} nats"
    agreement = f"{against['top1_agreement']:.2%}{_error(against, 'top1', '{:.2%}')}"
    yield "KL divergence", f"{divergence}, same choice at {agreement} of positions"


def _error(against: Mapping[str, Any], figure: str, text: str) -> str:
    """The standard error of a figure; nothing in results of earlier versions, which have none."""
    return give_or_take(against.get(f"{figure}_standard_error"), text)
