"""Writing an output: show its plan, or run it and say what came of it, and what became of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardxform.base.file_system import FileSystem
from shardxform.checkpoint.record import PROVENANCE
from shardxform.cli.console import (
    count,
    gb,
    give_or_take,
    pasteable,
    print_json,
    progress,
    rows,
    say,
    short,
    span,
    table,
    tell,
    with_options,
)
from shardxform.cli.inputs import family_words
from shardxform.cli.options import WriteFlags
from shardxform.execution.output import refuse_obstacles, refuse_other_plan, state_of
from shardxform.execution.runner import Report, RunOptions, run
from shardxform.formats.scheme import GGUF
from shardxform.plan.plan import Plan
from shardxform.verification.structure import refuse_unsound

if TYPE_CHECKING:
    from shardxform.cli.tuning import OnRay, RayTasks
    from shardxform.execution.runner import StepPool

__all__ = ["Block", "execute", "judged_on", "only_merged", "tell_blocks", "told_blocks"]

Block = Mapping[str, Any]
"""What the record of an output, which JSON holds, says of a decoder block."""
_AS_PRUNED: Final = {"pruned_error": 0.0}
_HEALED: Final = ("block", "squared error, pruned", "healed", "ratio", "what", "step")
_MERGED: Final = (*_HEALED[:2], "merged", *_HEALED[3:])
_TUNED: Final = ("block", "squared error, rounded", "tuned", "ratio", "never reached")


# -- the plan ---------------------------------------------------------------------------------------------------------


def execute(
    plan: Plan,
    out: Path,
    output: WriteFlags,
    options: RunOptions,
    ray: OnRay | None = None,
    told: Iterable[str] = (),
) -> None:
    """Run `plan` into `out`, or only show it.

    `told` are notes that were shown already, of the calibration text and its tokenizer, for `--json` to hold too.

    Raises:
        PlanError: what it would write is not sound.

    """
    if plan.container != GGUF:  # what that must hold is what its plan was made of
        refuse_unsound(plan, but=("seed-spelling",))  # which is asked for by an option
    if output.dry_run:
        tasks = _tasks(plan, ray) if ray else None
        if not output.force:
            refuse_other_plan(out, plan, state_of(out, plan))
            refuse_obstacles(out, plan)
        if output.as_json:
            print_json({**_facts(plan, out, options.jobs, told), **_dry_facts(plan, out, options, tasks)})
        else:
            _show(plan, out, options, tasks)
        return
    for note in _notes(plan):
        tell(f"note: {note}")
    with _pool(ray) as pool, progress(plan.command, output.quiet) as on_progress:
        report = run(plan, out, replace(options, force=output.force, pool=pool, on_progress=on_progress))
    if output.as_json:
        print_json({**_facts(plan, out, options.jobs, told), "report": _report_facts(report)})
    elif report.left:
        _say_part(plan, report)
    elif report.already_done:
        others = with_options(report.made_by_others)
        by = f" by other versions or another machine ({others})" if others else ""
        say(f"{out}: already complete, made from the same inputs{by}; nothing written")
        tell_blocks(report.facts, report.measured)
    else:
        _say_done(plan, report)


def _tasks(plan: Plan, ray: OnRay) -> RayTasks:
    from shardxform.cli.tuning import ray_tasks  # few ask for a cluster

    return ray_tasks(plan, ray)


def _pool(ray: OnRay | None) -> AbstractContextManager[StepPool | None]:
    if ray is None:
        return nullcontext()
    from shardxform.cli.tuning import open_pool

    return open_pool(ray)


def _dry_facts(plan: Plan, out: Path, options: RunOptions, tasks: RayTasks | None) -> dict[str, object]:
    """Figures of a plan that is not run."""
    beside: dict[str, object] = {"ray": tasks.to_dict()} if tasks else {}
    work = {"work_bytes": options.tuner.work_bytes + plan.work_bytes} if options.tuner else {}
    return {**beside, **work, "state": state_of(out, plan).name}


def _show(plan: Plan, out: Path, options: RunOptions, tasks: RayTasks | None) -> None:
    say(f"{plan.command} {plan.origin} -> {out}  (dry run: nothing is written)")
    rows([*_lines(plan), *_needs(plan, out, options, tasks), ("sidecars", ", ".join(plan.sidecars) or "none")])
    for note in _notes(plan):
        say(f"  note: {note}")


def _notes(plan: Plan) -> Iterator[str]:
    yield from map(with_options, plan.notes)
    carried = {PROVENANCE} if plan.past.steps else set[str]()  # what it says is in the record of the output
    if unread := [name for name in plan.unread if name not in carried]:
        yield f"not part of the model, not copied: {', '.join(unread)}"


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    s = plan.summary
    yield "family", f"{s['family']}, {s['architecture']}"
    yield "experts", f"{s['experts_before']} -> {s['experts_after']} per layer, top-{s['top_k']}"
    dropped = "; dropped " + ", ".join(f"{n} ({why})" for why, n in s["dropped"].items()) if s["dropped"] else ""
    renamed = f", {s['renamed']:,} of them renamed" if s["renamed"] else ""
    done = f"{s['quantized_modules']:,} weights rounded" if "scheme" in s else f"{s['sliced']:,} sliced"
    counts = f"{s['tensors_before']:,} -> {s['tensors_after']:,}"
    yield "tensors", f"{counts}: {s['copied']:,} copied, {done}{renamed}{dropped}"
    if "scheme" in s:
        yield "quantized", _quantized(plan)
    if plan.stated.get("recipe", {}).get("heal"):
        yield "healed" if plan.stated["recipe"]["heal"].get("iters") != 0 else "merged", _healed(plan)
    ratio = plan.data_bytes / s["bytes_before"] if s["bytes_before"] else 0
    yield "size", f"{gb(s['bytes_before'])} -> {gb(plan.data_bytes)} ({ratio:.1%}), {plan.nbytes:,} bytes in shards"
    yield "shards", f"{len(plan.shards)}, from {plan.shards[0].name}"
    yield "steps", f"{len(plan.steps)}"


def _needs(plan: Plan, out: Path, options: RunOptions, tasks: RayTasks | None) -> Iterator[tuple[str, str]]:
    """What carrying the plan out takes."""
    if tasks:
        yield "ray", tasks.line
    else:
        yield "memory", f"about {gb(plan.peak_bytes(options.jobs))} at {count(options.jobs, 'job')}"
    work = options.tuner.work_bytes + plan.work_bytes if options.tuner else 0
    what = "hidden states and merged experts" if plan.work_bytes else "hidden states"
    states = f", {gb(work)} of it for {what} until OUT is complete" if work else ""
    free = FileSystem().free_bytes(out.absolute())
    yield "free disk", f"{gb(free)} of {gb(plan.nbytes + work)} needed{states}"


def _quantized(plan: Plan) -> str:
    summary, scheme, grid = plan.summary, plan.summary["scheme"], plan.summary["scheme"]["grid"]
    kept = ", ".join(f"{n:,} {why}" for why, n in summary["kept_modules"].items())
    group = "one scale per row" if grid["group_size"] == -1 else f"groups of {grid['group_size']}"
    method = ", tuned" if scheme.get("method") == "auto-round" else ""
    return (
        f"{gb(summary['quantized_weight_bytes'])} of weights to"
        f" {grid['bits']} bits in {group}{method}, {scheme['format']}; kept: {kept}"
    )


def _healed(plan: Plan) -> str:
    recipe, heal = plan.stated["recipe"], plan.stated["recipe"]["heal"]
    what = {"auto": "what held-out windows choose", "all": "the whole block", "moe": "all MoE weights"}
    merges = "pruned experts merged into those that stay, where that is better, " if heal.get("merge") else ""
    step = "a step by the amount of data" if heal["lr"] is None else f"a first step of {heal['lr']:g}"
    text = f"{recipe['samples']} windows of {recipe['seqlen']} tokens"
    text += f" and {heal['extra']} made of their pieces" if heal.get("extra") else ""
    written = {"source": "; written as the source has them", "16bit": "; written in 16 bits"}
    how = written.get(heal.get("encoding"), "")
    if heal.get("iters") == 0:
        return f"{merges}{text}{how}"
    begun = f"{merges}then " if merges else ""
    return f"{begun}{what.get(heal['what'], heal['what'])}, {_steps(heal)}, {step}, {text}{how}"


def _steps(heal: Mapping[str, Any]) -> str:
    """How far blocks are healed, as a recipe has it."""
    if heal.get("seconds"):
        return f"{span(heal['seconds'])} for all blocks, more of it where the held-out error falls more"
    if heal.get("schedule"):
        return f"{', '.join(map(str, heal['schedule']))} iterations"
    return f"{heal['iters']} iterations a block"


def _facts(plan: Plan, out: Path, jobs: int, told: Iterable[str]) -> dict[str, Any]:
    heal = plan.stated.get("recipe", {}).get("heal")
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
        **({"heal": heal} if heal else {}),
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
    say(f"{report.out}: complete and durable")
    rows(
        [
            ("size", f"{gb(before)} -> {gb(plan.data_bytes)} in {count(len(plan.shards), 'shard')}"),
            ("time", f"{report.seconds:.1f} s{rate}{resumed}"),
            ("memory", f"{gb(report.peak_rss_bytes)} peak"),
            *_zero_lines(report),
            ("check it", pasteable("shardxform", "verify", report.out, "--source", plan.origin, *family_words())),
        ]
    )
    tell_blocks(report.facts, report.measured)


def _rate(report: Report) -> str:
    return f", {gb(int(report.written_bytes / max(report.seconds, 1e-3)))}/s"


def _say_part(plan: Plan, report: Report) -> None:
    say(f"{report.out}: what was asked for is done and durable; {count(report.left, 'step')} left to others")
    rows([("time", f"{report.seconds:.1f} s"), ("memory", f"{gb(report.peak_rss_bytes)} peak")])
    tell_blocks(report.facts, report.measured)
    say(f"  put together with: shardxform {plan.command} ... --join {report.out}")


def _zero_lines(report: Report) -> Iterator[tuple[str, str]]:
    modules = report.facts.get("zero_modules", [])
    if modules:
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        yield "all zero", f"{modules[0]}{more}: is the source whole?"


# -- its blocks -------------------------------------------------------------------------------------------------------


def tell_blocks(facts: Mapping[str, object], measured: Sequence[Block] = ()) -> None:
    """Print a table of what was healed and one of what was tuned, if anything was, and warn of what was not.

    Args:
        facts: what the steps found.
        measured: time and memory of the blocks, where these were done just now.

    """
    blocks = [{**block, **_of_layer(measured, block["layer"])} for block in told_blocks(facts)]
    healed = [block for block in blocks if "healed" in block]
    tuned = [block for block in blocks if "rtn_error" in block or "rounded_to_nearest" in block]
    if healed:
        header = _MERGED if only_merged([block["healed"] for block in healed]) else _HEALED
        _show_table(header, [_healed_line(block) for block in healed], () if tuned else _endings(healed))
    if tuned:
        _show_table(_TUNED, [_tuned_line(block) for block in tuned], _endings(tuned))
    if healed or tuned:
        _tell_judges(blocks)
    _warn(blocks)


def only_merged(healed: Sequence[Block]) -> bool:
    """Whether blocks were merged, as far as that was better, and no step of healing was asked for."""
    return bool(healed) and all("merged" in each and each.get("iters") == 0 for each in healed)


def judged_on(blocks: Sequence[Block]) -> str:
    """Say what the errors of blocks were measured on; empty for records of earlier versions, which do not say it."""
    judged: Block = next((block["judged_on"] for block in blocks if isinstance(block.get("judged_on"), dict)), {})
    if not _has(judged, "windows", "tokens"):
        return ""
    apart = "no block learned from" if judged.get("held_out") is True else "the blocks also learned from"
    return f"{count(judged['windows'], 'window')} of {short(judged['tokens'])} tokens that {apart}"


def told_blocks(facts: Mapping[str, object]) -> list[Block]:
    """What is said of blocks, in their order; what is not as it is written is left out, since a record may be old."""
    listed = facts.get("blocks")
    return sorted(filter(_is_whole, listed if isinstance(listed, list) else []), key=lambda block: int(block["layer"]))


def _is_whole(block: object) -> bool:
    """Whether a block says all that is shown of it."""
    if not isinstance(block, dict) or not _has(block, "layer"):
        return False
    healed = block.get("healed", _AS_PRUNED)
    if not isinstance(healed, dict) or not _has(healed, "pruned_error"):
        return False
    changed = healed.get("what") is not None or healed.get("merged")
    if changed and not _has(healed, "healed_error", "lr"):
        return False
    return "rtn_error" not in block or (_has(block, "rtn_error", "tuned_error") and "experts_never_reached" in block)


def _of_layer(measured: Sequence[Block], layer: object) -> Block:
    return next((each for each in measured if each.get("layer") == layer), {})


def _has(value: Mapping[str, object], *keys: str) -> bool:
    return all(isinstance(value.get(key), int | float) for key in keys)


def _show_table(header: tuple[str, ...], lines: Sequence[tuple[str, ...]], endings: Sequence[tuple[str, ...]]) -> None:
    """Print a table; `endings` are the time and memory of every line, or nothing."""
    say()
    if endings:
        header, lines = (*header, "time", "memory"), [(*line, *end) for line, end in zip(lines, endings, strict=True)]
    table(header, lines)


def _tell_judges(blocks: Sequence[Block]) -> None:
    if text := judged_on(blocks):
        say(f"  errors: on {text}")
    if "also learned" in text:
        say("  they flatter: give two windows or more, and some are kept to judge by")
    elif text.startswith("1 window "):
        say("  one window tells little: with 16 or more, two judge, and how far the ratios may be off is known")


def _healed_line(block: Block) -> tuple[str, ...]:
    healed = block["healed"]
    before, after, layer = healed["pruned_error"], healed["healed_error"], str(block["layer"])
    share = healed.get("merged")
    done = [each for each in (f"merged {share:.3g}" if share else None, healed["what"]) if each]
    if not done:
        return (layer, f"{before:.3e}", "-", "-", "as pruned", "-")
    ratio, step = _ratio(healed, before, after), f"{healed['lr']:.2g}" if healed["what"] else "-"
    return (layer, f"{before:.3e}", f"{after:.3e}", ratio, ", ".join(done), step)


def _tuned_line(block: Block) -> tuple[str, ...]:
    layer = str(block["layer"])
    if "rounded_to_nearest" in block:
        return (layer, "-", "-", "-", "-")
    before, after = block["rtn_error"], block["tuned_error"]
    ratio = _ratio(block, before, after)
    return (layer, f"{before:.3e}", f"{after:.3e}", ratio, str(len(block["experts_never_reached"])))


def _ratio(told: Block, before: float, after: float) -> str:
    if not before:
        return "-"
    error = told["ratio_standard_error"] if _has(told, "ratio_standard_error") else None
    return f"{after / before:.1%}{give_or_take(error, '{:.1%}')}"


def _endings(blocks: Sequence[Block]) -> list[tuple[str, str]]:
    """Time and memory of every block; nothing where they are known of none, as of what was done before."""
    known = [_has(block, "seconds", "peak_rss_bytes") for block in blocks]  # records of earlier versions have them
    return [_ending(block) if has else ("-", "-") for block, has in zip(blocks, known, strict=True)] * any(known)


def _ending(block: Block) -> tuple[str, str]:
    return f"{block['seconds']:.1f} s", gb(block["peak_rss_bytes"])


def _warn(blocks: Sequence[Block]) -> None:
    for block in blocks:
        if "rounded_to_nearest" in block:
            why = block["rounded_to_nearest"]
            tell(f"WARNING: block {block['layer']} is NOT tuned but rounded to nearest: {why}")
        if block.get("healed", {}).get("diverged"):
            tell(f"WARNING: block {block['layer']}: healing diverged, its loss was no number: try a smaller --heal-lr")
