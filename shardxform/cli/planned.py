"""What every command that executes a plan does after planning: show it, or run it and say what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from shardxform.ask.manifest import Manifest
from shardxform.base.file_system import FileSystem
from shardxform.checkpoint.identity import identify, names_of
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.block_report import tell_blocks
from shardxform.cli.console import count, gb, pasteable, print_json, progress, rows, tell
from shardxform.cli.ray_options import OnRay, open_pool, ray_facts, ray_line
from shardxform.execution.output import refuse_obstacles, refuse_other_plan, state_of
from shardxform.execution.runner import Report, RunOptions, run
from shardxform.model.layout import layout_of
from shardxform.plan.plan import Plan
from shardxform.verification.planned import refuse_unsound

__all__ = ["execute", "load_manifest"]


def load_manifest(path: Path | None, checkpoint: Checkpoint, *, any_source: bool) -> Manifest | None:
    """Read the manifest given on the command line, if any; it must be this checkpoint's unless `any_source`."""
    if path is None:
        return None
    manifest = Manifest.load(path, layout_of(checkpoint.config, checkpoint.tensors, checkpoint.where))
    if any_source:
        return manifest.of_any_source()
    if "identity" in manifest.model:
        manifest.refuse_other_source(identify(checkpoint), names_of(checkpoint.shards))
    return manifest


def execute(
    plan: Plan,
    out: Path,
    *,
    jobs: int,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    ray: OnRay | None = None,
    told: Iterable[str] = (),
    **options: Any,  # noqa: ANN401
) -> None:
    """Run `plan` into `out`, or only show it; further `options` are those of `RunOptions`.

    `told` are notes that were shown already, of the calibration text and its tokenizer, for `--json` to hold too.

    Raises:
        PlanError: what it would write is not sound.

    """
    refuse_unsound(plan, but=("seed-spelling",))  # which is asked for by an option
    if dry_run:
        beside = {"ray": ray_facts(plan, ray)} if ray else {}
        tuner = options.get("tuner")
        work = {"work_bytes": tuner.work_bytes} if tuner else {}
        _show(plan, out, force, as_json, {**_facts(plan, out, jobs, told), **beside, **work})
        return
    for note in _notes(plan):
        tell(f"note: {note}")
    with open_pool(ray) as pool, progress(plan.command, quiet) as on_progress:
        report = run(plan, out, RunOptions(jobs=jobs, force=force, pool=pool, on_progress=on_progress, **options))
    if as_json:
        print_json({**_facts(plan, out, jobs, told), "report": _report_facts(report)})
    elif report.left:
        _say_part(plan, report)
    elif report.already_done:
        by = f" by other versions or another machine ({report.made_by_others})" if report.made_by_others else ""
        click.echo(f"{out}: already complete, made from the same inputs{by}; nothing written")
        tell_blocks(report.facts, report.measured)
    else:
        _say_done(plan, report)


def _show(plan: Plan, out: Path, force: bool, as_json: bool, facts: Mapping[str, Any]) -> None:
    state = state_of(out, plan)
    if not force:
        refuse_other_plan(out, plan, state)
        refuse_obstacles(out, plan)
    if as_json:
        print_json({**facts, "state": state.name})
        return
    click.echo(f"{plan.command} {plan.origin} -> {out}  (dry run: nothing is written)")
    rows(_lines(plan, facts))
    for note in _notes(plan):
        click.echo(f"  note: {note}")


def _notes(plan: Plan) -> Iterator[str]:
    yield from plan.notes
    if plan.unread:
        yield f"not part of the model, not copied: {', '.join(plan.unread)}"


def _lines(plan: Plan, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    s = plan.summary
    yield "family", f"{s['family']}, {s['architecture']}"
    yield "experts", f"{s['experts_before']} -> {s['experts_after']} per layer, top-{s['top_k']}"
    dropped = "; dropped " + ", ".join(f"{n} ({why})" for why, n in s["dropped"].items()) if s["dropped"] else ""
    renamed = f", {s['renamed']:,} of them renamed" if s["renamed"] else ""
    done = f"{s['quantized_modules']:,} weights rounded" if "scheme" in s else f"{s['sliced']:,} sliced"
    counts = f"{s['tensors_before']:,} -> {s['tensors_after']:,}"
    yield "tensors", f"{counts}: {s['copied']:,} copied, {done}{renamed}{dropped}"
    if "scheme" in s:
        yield "quantized", _quantized(s)
    if heal := plan.inputs.get("recipe", {}).get("heal"):
        yield "healed", _healed(plan.inputs["recipe"], heal)
    ratio = plan.data_bytes / s["bytes_before"] if s["bytes_before"] else 0
    yield "size", f"{gb(s['bytes_before'])} -> {gb(plan.data_bytes)} ({ratio:.1%}), {plan.nbytes:,} bytes in shards"
    yield "shards", f"{len(plan.shards)}, from {plan.shards[0].name}"
    yield "steps", f"{len(plan.steps)}"
    if "ray" in facts:
        yield "ray", ray_line(facts["ray"])
    else:
        yield "memory", f"about {gb(facts['peak_memory_bytes'])} at {count(facts['jobs'], 'job')}"
    work = facts.get("work_bytes", 0)
    states = f", {gb(work)} of it for hidden states until OUT is complete" if work else ""
    yield "free disk", f"{gb(facts['free_disk_bytes'])} of {gb(plan.nbytes + work)} needed{states}"
    yield "sidecars", ", ".join(plan.sidecars) or "none"


def _quantized(summary: Mapping[str, Any]) -> str:
    scheme, grid = summary["scheme"], summary["scheme"]["grid"]
    kept = ", ".join(f"{n:,} {why}" for why, n in summary["kept_modules"].items())
    group = "one scale per row" if grid["group_size"] == -1 else f"groups of {grid['group_size']}"
    method = ", tuned" if scheme.get("method") == "auto-round" else ""
    return (
        f"{gb(summary['quantized_weight_bytes'])} of weights to"
        f" {grid['bits']} bits in {group}{method}, {scheme['format']}; kept: {kept}"
    )


def _healed(recipe: Mapping[str, Any], heal: Mapping[str, Any]) -> str:
    what = {"auto": "what held-out windows choose", "all": "the whole block", "moe": "all MoE weights"}
    step = "a step by the amount of data" if heal["lr"] is None else f"a first step of {heal['lr']:g}"
    text = f"{recipe['samples']} windows of {recipe['seqlen']} tokens"
    return f"{what.get(heal['what'], heal['what'])}, {heal['iters']} iterations a block, {step}, {text}"


def _facts(plan: Plan, out: Path, jobs: int, told: Iterable[str]) -> dict[str, Any]:
    return {
        "command": plan.command,
        "source": plan.origin,
        "out": str(out),
        "fingerprint": plan.fingerprint,
        "summary": dict(plan.summary),
        "notes": [*_notes(plan), *told],
        "shards": {shard.name: shard.nbytes for shard in plan.shards},
        "bytes": plan.nbytes,
        "steps": len(plan.steps),
        "jobs": jobs,
        "peak_memory_bytes": plan.peak_bytes(jobs),
        "free_disk_bytes": FileSystem().free_bytes(out.absolute()),
        "sidecars": list(plan.sidecars),
    }


def _report_facts(report: Report) -> dict[str, Any]:
    return {
        "already_done": report.already_done,
        "written_bytes": report.written_bytes,
        "resumed_bytes": report.resumed_bytes,
        "steps_left": report.left,
        "seconds": round(report.seconds, 3),
        "peak_rss_bytes": report.peak_rss_bytes,
        "facts": dict(report.facts),
        "measured": list(report.measured),
    }


def _say_done(plan: Plan, report: Report) -> None:
    before = plan.summary["bytes_before"]
    rate = "" if report.facts.get("blocks") else _rate(report)
    resumed = f" in this run, {gb(report.resumed_bytes)} from an earlier one" if report.resumed_bytes else ""
    click.echo(f"{report.out}: complete and durable")
    rows(
        [
            ("size", f"{gb(before)} -> {gb(plan.data_bytes)} in {count(len(plan.shards), 'shard')}"),
            ("time", f"{report.seconds:.1f} s{rate}{resumed}"),
            ("memory", f"{gb(report.peak_rss_bytes)} peak"),
            *_zero_lines(report),
            ("check it", pasteable("shardxform", "verify", report.out, "--source", plan.origin)),
        ]
    )
    tell_blocks(report.facts, report.measured)


def _rate(report: Report) -> str:
    return f", {gb(int(report.written_bytes / max(report.seconds, 1e-3)))}/s"


def _say_part(plan: Plan, report: Report) -> None:
    click.echo(f"{report.out}: what was asked for is done and durable; {count(report.left, 'step')} left to others")
    rows([("time", f"{report.seconds:.1f} s"), ("memory", f"{gb(report.peak_rss_bytes)} peak")])
    tell_blocks(report.facts, report.measured)
    click.echo(f"  put together with: shardxform {plan.command} ... --merge {report.out}")


def _zero_lines(report: Report) -> Iterator[tuple[str, str]]:
    modules = report.facts.get("zero_modules", [])
    if modules:
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        yield "all zero", f"{modules[0]}{more}: is the source whole?"
