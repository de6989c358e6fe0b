"""`shardxform compress`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shardxform.checkpoint import Checkpoint
from shardxform.cli.console import count, gb, interruptible, print_json, progress, rows, short, table, tell
from shardxform.cli.model_options import data_options, load_data, make_precision, require
from shardxform.cli.options import out_argument, run_options, source_argument, view_options
from shardxform.cli.tune_options import read_tuning
from shardxform.compress.request import Pruning, Request, Settings
from shardxform.errors import SchemeError
from shardxform.prune import ViewOptions
from shardxform.quantize.grid import Grid
from shardxform.recipe import BATCH_SIZE, ITERS
from shardxform.saliency.criteria import CRITERIA, DEFAULT
from shardxform.scheme import FORMATS, Scheme

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.cli.tune_options import Tuning
    from shardxform.compress import Outcome, Prepared

__all__ = ["command"]

_DATA_KEYS: Final = ("data", "preset", "samples", "seqlen", "seed", "no_pack", "chat_template", "text_key")
_PRESETS: Final = {
    "reference": "NeelNanda/pile-10k, unpacked: experts scored on 256 x 2048; rounding tuned on 64 x 512, 200 steps "
    "of one window"
}


@click.command("compress")
@source_argument
@out_argument
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Experts to keep in every layer.")
@click.option(
    "--ratio", type=float, metavar="R", help="Or the share of them to remove, such as 0.5. Neither: all are kept."
)
@click.option(
    "--criterion", type=click.Choice(list(CRITERIA)), help=f"What experts are chosen by.  [default: {DEFAULT}]"
)
@click.option(
    "--protect-super-experts",
    "protect",
    is_flag=True,
    help="Keep experts with outlying activations, whatever they score.",
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "auto-round"]),
    default="rtn",
    show_default=True,
    help="rtn: round to nearest. auto-round: tune the rounding of each block on the data.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(FORMATS)),
    default="auto-round",
    show_default=True,
    help="How clients find the weights.",
)
@click.option("--iters", type=click.IntRange(1), help=f"Steps of tuning a block.  [default: {ITERS}]")
@click.option("--batch-size", type=click.IntRange(1), help=f"Windows of such a step.  [default: {BATCH_SIZE}]")
@data_options(samples=256, presets=_PRESETS)
@click.option("--eval-data", metavar="D", help="Held-out text, as --data: also measure OUT against SRC on it.")
@click.option("--eval-samples", type=click.IntRange(1), help="Windows of it.  [default: 256]")
@click.option("--eval-seqlen", type=click.IntRange(2), help="Tokens of such a window.  [default: 2048]")
@click.option("--full-verify", is_flag=True, help="Verify all data of OUT against SRC, not headers alone.")
@click.option("--plot", is_flag=True, help="Also draw the choice of experts, and the errors of the blocks, as PNG.")
@click.option(
    "--device", default="cpu", show_default=True, help="Where the model is computed and weights are rounded, or cuda."
)
@view_options
@run_options
def command(source: Path, out: Path, **given: Any) -> None:  # noqa: ANN401
    """Make OUT of SRC: choose experts, prune, round to 4 bits, verify and measure, each as its own command does.

    score runs SRC over --data, 256 windows unless --samples says; select chooses the experts that stay, by --keep or
    --ratio, and without these all stay; quantize writes OUT, pruned and rounded in one pass, tuned on 128 windows of
    --data with --method auto-round; verify holds OUT against SRC; evaluate measures both, with --eval-data.

    A model card, OUT/README.md, says what came of it. What the stages gave lies in OUT.compress, and is kept:
    saliency.safetensors, keep.json, evaluation.json.
    Interrupted, the same command goes on where it stopped; a stage that is done is not done again.
    """
    _refuse_idle(given)
    with interruptible():
        request = _request(Checkpoint.open(source), out, given)
        settings = Settings(
            jobs=given["jobs"],
            device=given["device"],
            force=given["force"],
            full_verify=given["full_verify"],
            plot=given["plot"],
        )
        from shardxform.compress import compress, prepare

        prepared = prepare(request, force=settings.force)
        if given["dry_run"]:
            _show(prepared, settings, given["as_json"])
            return
        for note in prepared.sketch.notes:
            tell(f"note: {note}")
        with progress("compress", given["quiet"]) as on_progress:
            watcher = None if given["quiet"] else _Watcher(request)
            outcome = compress(prepared, settings, on_stage=watcher, on_progress=on_progress)
    if given["as_json"]:
        print_json(_as_json(outcome))
    else:
        _report(outcome, source)


# -- what is asked for ------------------------------------------------------------------------------------------------


def _refuse_idle(given: Mapping[str, Any]) -> None:
    """An option that would do nothing is a misunderstanding."""
    prunes, tunes = not (given["keep"] is None and given["ratio"] is None), given["method"] == "auto-round"
    if given["keep"] is not None and given["ratio"] is not None:
        raise click.UsageError("give either --keep or --ratio")
    idle: dict[str, tuple[bool, tuple[str, ...]]] = {
        "choosing experts: give --keep or --ratio": (prunes, ("criterion", "protect")),
        "--method auto-round, but the method is rtn": (tunes, ("iters", "batch_size")),
        "choosing experts and tuning: give --keep, --ratio or --method auto-round": (prunes or tunes, _DATA_KEYS),
        "measuring OUT: give --eval-data": (given["eval_data"] is not None, ("eval_samples", "eval_seqlen")),
        "choosing experts and measuring: give --keep, --ratio or --eval-data": (
            prunes or given["eval_data"] is not None,
            ("plot",),
        ),
    }
    for what, (used, names) in idle.items():
        for name in names:
            if not used and given[name] not in (None, False):
                option = {"protect": "protect-super-experts"}.get(name, name.replace("_", "-"))
                raise SchemeError(f"--{option} is for {what}")
    if (prunes or tunes) and given["data"] is None and given["preset"] is None:
        raise click.UsageError("Missing option '--data' or '--preset'.")
    if given["plot"]:
        require("matplotlib", extra="plot")


def _request(source: Checkpoint, out: Path, given: Mapping[str, Any]) -> Request:
    prunes, tunes = not (given["keep"] is None and given["ratio"] is None), given["method"] == "auto-round"
    measures = given["eval_data"] is not None
    pruning = None
    if prunes:
        criterion = given["criterion"] or DEFAULT
        pruning = Pruning(keep=given["keep"], ratio=given["ratio"], criterion=criterion, protect=given["protect"])
    precision = make_precision(given["device"], "auto") if prunes or tunes or measures else None
    data = {key: given[key] for key in _DATA_KEYS}
    tuning = _tuning(source.root, given, data) if tunes else None
    return Request(
        source=source,
        out=out,
        scheme=Scheme(grid=Grid(search=tunes), format=given["format_"]),
        view=ViewOptions(text_only=given["text_only"], mtp=given["mtp"], max_shard_bytes=given["max_shard_size"]),
        pruning=pruning,
        score_windows=load_data(source.root, dict(data)) if prunes else None,
        tune_windows=tuning.windows if tuning else None,
        recipe=tuning.recipe if tuning else None,
        eval_windows=_eval_windows(source.root, given) if measures else None,
        precision=precision,
    )


def _tuning(root: Path, given: Mapping[str, Any], data: Mapping[str, Any]) -> Tuning | None:
    asked = {"iters": given["iters"], "batch_size": given["batch_size"], "merge": ()}
    asked |= dict.fromkeys(("inputs", "blocks", "dtype"))
    return read_tuning("auto-round", root, given["device"], {**asked, **data})


def _eval_windows(root: Path, given: Mapping[str, Any]) -> Windows:
    if given["eval_data"] == given["data"]:
        tell("note: --eval-data is the text that OUT was made with: the figures will flatter it")
    asked = {"data": given["eval_data"], "samples": given["eval_samples"], "seqlen": given["eval_seqlen"]}
    others = dict.fromkeys(("preset", "seed", "text_key"))
    return load_data(root, {**asked, **others, "no_pack": False, "chat_template": False})


# -- what is shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Watcher:
    """Says on stderr which stage begins."""

    request: Request

    def __call__(self, number: int, total: int, stage: str, *, done: bool) -> None:
        tell(f"[{number}/{total}] {stage}: " + ("done already" if done else self._what(stage)))

    def _what(self, stage: str) -> str:
        request = self.request
        if stage == "score":
            return f"{request.source.root} over {_size(request.score_windows)}"
        if stage == "select":
            pruning = request.pruning
            assert pruning is not None
            kept = f"{pruning.keep} experts of each layer stay"
            return f"by {pruning.criterion}, " + (f"{pruning.ratio:g} of the experts go" if pruning.ratio else kept)
        if stage == "quantize":
            tuned = f", tuned on {_size(request.tune_windows)}" if request.recipe else ""
            return f"{request.out}, {request.scheme.grid.bits} bits, {request.scheme.format}{tuned}"
        if stage == "verify":
            return f"{request.out} against {request.source.root}"
        if stage == "card":
            return f"{request.out / 'README.md'}"
        return f"{request.out} against {request.source.root} over {_size(request.eval_windows)}"


def _size(windows: Windows | None) -> str:
    assert windows is not None
    return f"{count(len(windows.lengths_N), 'window')}, {short(int(windows.lengths_N.sum()))} tokens"


def _show(prepared: Prepared, settings: Settings, as_json: bool) -> None:
    from shardxform.compress.forecast import forecast, free_bytes

    request, stages = prepared.request, forecast(prepared, settings)
    totals = {
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages),
        "disk_bytes": _most_disk(stages),
        "free_disk_bytes": free_bytes(request),
    }
    if as_json:
        paths = {"source": str(request.source.root), "out": str(request.out), "folder": str(request.folder)}
        known = {"summary": dict(prepared.sketch.summary), "notes": list(prepared.sketch.notes)}
        print_json({**paths, "stages": stages, **totals, **known})
        return
    summary = prepared.sketch.summary
    click.echo(f"compress {request.source.root} -> {request.out}  (dry run: nothing is written)")
    rows(
        [
            ("experts", f"{summary['experts_before']} -> {summary['experts_after']} per layer, top-{summary['top_k']}"),
            ("size", _sizes(summary["bytes_before"], prepared.sketch.data_bytes)),
            ("results", str(request.folder)),
        ]
    )
    table(("stage", "state", "memory", "written", "disk meanwhile", "tokens x blocks"), map(_stage_line, stages))
    rows(
        [
            ("memory", f"about {gb(totals['peak_memory_bytes'])} at most"),
            ("free disk", f"{gb(totals['free_disk_bytes'])} of {gb(totals['disk_bytes'])} needed"),
            ("time", "not predicted: it goes with tokens x blocks, and the first stage shows how fast this machine is"),
        ]
    )
    for note in prepared.sketch.notes:
        click.echo(f"  note: {note}")
    if request.eval_windows is None:
        click.echo("  note: OUT is not measured without --eval-data")


def _most_disk(stages: list[dict[str, Any]]) -> int:
    """Disk at the fullest moment: what stays so far, and what lies there meanwhile."""
    most = written = 0
    for stage in stages:
        written += stage["written_bytes"]
        most = max(most, written + stage["work_bytes"])
    return most


def _stage_line(stage: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = [gb(stage[key]) if stage[key] else "-" for key in ("peak_memory_bytes", "written_bytes", "work_bytes")]
    return (stage["stage"], stage["state"], *sizes, short(stage["tokens"]) if stage["tokens"] else "-")


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
        "seconds": round(outcome.seconds, 3),
        "peak_rss_bytes": outcome.peak_rss_bytes,
    }


def _report(outcome: Outcome, source: Path) -> None:
    if outcome.made:
        click.echo(f"{outcome.out}: complete and durable")
    else:
        click.echo(f"{outcome.out}: already complete, made from the same inputs; nothing written")
    rows(_lines(outcome, source))
    for block in outcome.report.facts.get("blocks", []):
        if "rounded_to_nearest" in block:
            why = block["rounded_to_nearest"]
            tell(f"WARNING: block {block['layer']} is NOT tuned but rounded to nearest: {why}")
    if left := outcome.facts["card"].get("left"):
        tell(f"note: no card was written: {left}")
    if "evaluate" not in outcome.facts:
        tell("note: not measured; give --eval-data, held-out text, and only that is done")


def _lines(outcome: Outcome, source: Path) -> Iterator[tuple[str, str]]:
    facts = outcome.facts
    if "select" in facts:
        yield from _choice_lines(facts["select"])
    yield "size", _sizes(facts["quantize"]["bytes_before"], facts["quantize"]["bytes_after"])
    if blocks := [block for block in outcome.report.facts.get("blocks", []) if block.get("rtn_error")]:
        yield (
            "tuned",
            f"squared error {_tuned_share(blocks):.1%} of that of rounding, over {count(len(blocks), 'block')}",
        )
    checked = facts["verify"]
    depth = f"{gb(checked['bytes_scanned'])} scanned" if checked["full"] else "headers only"
    warned = f", {count(checked['warnings'], 'warning')}" if checked["warnings"] else ""
    yield "verified", f"sound: {count(checked['tensors'], 'tensor')}, {depth}{warned}"
    if "evaluate" in facts:
        yield from _evaluation_lines(facts["evaluate"])
    yield "time", f"{outcome.seconds:.1f} s"
    yield "memory", f"{gb(outcome.peak_rss_bytes)} peak"
    yield "results", f"{outcome.folder}, {outcome.out / 'README.md'}"
    if not checked["full"]:
        yield "prove it", f"shardxform verify {outcome.out} --source {source}"


def _choice_lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    share = facts["saliency_kept"]
    kept = "" if share is None else f", with {share:.1%} of the saliency"
    yield "experts", f"{facts['experts']} -> {facts['kept']} per layer, by {facts['criterion']}{kept}"
    if facts["never_reached_kept"]:
        yield "note", f"kept {count(facts['never_reached_kept'], 'expert')} that no token reached; score more data"


def _tuned_share(blocks: list[Mapping[str, Any]]) -> float:
    return float(sum(block["tuned_error"] for block in blocks) / sum(block["rtn_error"] for block in blocks))


def _evaluation_lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found, against = facts["perplexity"], facts["against"]
    if found is not None and against["perplexity"]:
        before = against["perplexity"]
        yield "perplexity", f"{found:.4f}, of the source {before:.4f}: {found / before - 1:+.2%}"
    yield "KL divergence", f"{against['kl']:.6f} nats, same choice at {against['top1_agreement']:.2%} of positions"
