"""`shardxform compress`: what is asked for, what is said meanwhile, what it would take, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from shardxform.calibration.documents import local_files
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import options
from shardxform.cli.console import (
    LOWER,
    Label,
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
from shardxform.cli.inputs import family_words, load_text, make_precision, open_named, refuse_nothing_pruned, require
from shardxform.cli.outputs import Block, judged_on, only_merged, tell_blocks, told_blocks
from shardxform.cli.select import ChoiceFlags
from shardxform.cli.tuning import Tuning, read_tuning
from shardxform.compress.request import CompressOptions, Pruning, Request
from shardxform.errors import PlanError
from shardxform.experts.choosing import DEFAULT
from shardxform.formats.scheme import GGUF

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.compress.driver import Outcome
    from shardxform.compress.request import Forecast, Prepared

__all__ = ["compress_command"]

_TUNE_SAMPLES, _TUNE_SEQLEN, _TUNE_ITERS = 64, 512, 50  # a quarter of the steps gives nearly all of the gain


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChoiceFlags(ChoiceFlags):
    ratio: float | None = options.option(
        "Or the share of them to remove, such as 0.5. Neither: all are kept.", metavar="R", first=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RoundingFlags(options.BatchFlags):
    """How the rounding is tuned; less by default than `quantize` does, so that it ends on a CPU."""

    method: options.Method = options.option(
        "auto-round: tune the rounding of each block on the data. rtn: round to nearest, in minutes.",
        default="auto-round",
        first=True,
    )
    tune_samples: int | None = options.option(
        f"Windows of --data that the rounding is tuned on.  [default: --samples, or {_TUNE_SAMPLES}]",
        type=click.IntRange(1),
    )
    tune_seqlen: int | None = options.option(
        f"Tokens of such a window.  [default: --seqlen, or {_TUNE_SEQLEN}]", type=click.IntRange(2)
    )
    iters: int | None = options.option(f"Steps of tuning a block.  [default: {_TUNE_ITERS}]", type=click.IntRange(1))
    lr: float | None = options.FIRST_STEP
    minmax_lr: float | None = options.FIRST_CLIP_STEP


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text(options.TuningTextFlags):
    """The text that experts are scored on too, and so more of it."""

    usual_samples: ClassVar[int] = options.TextFlags.usual_samples

    samples: int | None = options.option(f"Windows.  [default: {usual_samples}]", type=click.IntRange(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _CheckFlags(options.Flags, heading="Checking and measuring"):
    eval_data: str | None = options.option(
        "Held-out text, as --data: also measure OUT against SRC on it.", metavar="D", type=options.DATA, first=True
    )
    eval_samples: int | None = options.option("Windows of it.  [default: 256]", type=click.IntRange(1))
    eval_seqlen: int | None = options.option("Tokens of such a window.  [default: 2048]", type=click.IntRange(2))
    full_verify: bool = options.option("Verify all data of OUT against SRC, not headers alone.", default=False)

    @property
    def text(self) -> options.TextFlags:
        """The held-out text."""
        return options.TextFlags(data=self.eval_data, samples=self.eval_samples, seqlen=self.eval_seqlen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output(options.WriteFlags):
    results: Path | None = options.option(
        "Directory for what the stages give, and for hidden states of scoring and evaluating.  [default: OUT.compress]",
        metavar="DIR",
    )
    plots: bool = options.option("Also draw the choice of experts, and the blocks' errors, as PNG.", default=False)
    verbose: bool = options.option("Also print what every stage and every block took.", "-v", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked(options.Flags):
    """The options that decide what is made, and what is needed for it."""

    choice: _ChoiceFlags
    viewed: options.ViewFlags
    stored: options.SchemeFlags
    file: options.GgufFlags
    rounding: _RoundingFlags
    healing: options.HealFlags
    text: _Text
    checks: _CheckFlags
    computation: options.ComputeFlags
    jobs: options.JobFlags
    family: options.FamilyFlags
    transfer: options.TransferFlags
    output: _Output

    @property
    def prunes(self) -> bool:
        """Whether experts are chosen."""
        return self.choice.keep is not None or self.choice.ratio is not None

    @property
    def tunes(self) -> bool:
        """Whether rounding is tuned."""
        return self.rounding.method == "auto-round"

    @property
    def measures(self) -> bool:
        """Whether OUT is measured."""
        return self.checks.eval_data is not None


@options.command("compress")
@options.source_argument
@options.out_argument
def compress_command(source: options.Source, out: Path, asked: _Asked) -> None:
    """Make OUT of SRC: choose experts, prune, round to 4 bits, verify and measure, each as its own command does.

    score runs SRC over --data, 256 windows of 2048 tokens unless --samples and --seqlen say; select chooses the experts
    that stay, by --keep or --ratio, and without these all stay; quantize writes OUT, pruned and rounded in one pass,
    the rounding tuned on 64 windows of 512 tokens of --data; verify holds OUT against SRC; evaluate measures both,
    with --eval-data. --dry-run predicts memory and disk from headers, and time from a measurement of this machine.

    A model card, OUT/README.md, says what came of it. What the stages gave lies in OUT.compress, and is kept:
    saliency.safetensors, keep.json, evaluation.json.
    Interrupted, the same command goes on where it stopped; a stage that is done is not done again. With other options
    it refuses to go on; --force then makes again what depends on them, and keeps what the other stages gave.
    """
    output = asked.output
    asked.family.load()
    _refuse_idle(asked)
    request = _request(open_named(source, asked.transfer, out.parent), out, asked)
    settings = CompressOptions(
        jobs=asked.jobs.count,
        device=asked.computation.device,
        force=output.force,
        full_verify=asked.checks.full_verify,
        plot=output.plots,
    )
    from shardxform.compress.driver import compress
    from shardxform.compress.request import plan_compress

    prepared = plan_compress(request, force=settings.force)
    if output.dry_run:
        _show(prepared, settings, as_json=output.as_json)
        return
    for note in map(with_options, prepared.sketch.notes):
        tell(f"note: {note}")
    watcher = _Watcher(request, Label("compress"))
    with progress(watcher.label, output.quiet) as on_progress:
        outcome = compress(prepared, settings, on_stage=None if output.quiet else watcher, on_progress=on_progress)
    _report(outcome, source, output)


# -- what is asked for ------------------------------------------------------------------------------------------------


def _refuse_idle(asked: _Asked) -> None:
    """Refuse what would do nothing, and what lacks its text or a library."""
    prunes, tunes = asked.prunes, asked.tunes or asked.healing.asked
    if asked.choice.keep is not None and asked.choice.ratio is not None:
        raise click.UsageError("give either --keep or --ratio")
    refuse_nothing_pruned(asked.healing, asked.text, prunes=prunes, ways="--keep or --ratio")
    if not prunes:
        options.refuse_idle(asked.choice, wanted="choosing experts: give --keep or --ratio")
    if not tunes:
        names = ("iters", "lr", "minmax_lr", "batch_size", "tune_samples", "tune_seqlen")
        options.refuse_idle(asked.rounding, *names, wanted="--method auto-round, but the method is rtn")
    if not prunes and not tunes:
        ways = "give --keep, --ratio or --method auto-round"
        options.refuse_idle(asked.text, wanted=f"choosing experts and tuning: {ways}")
    if not asked.measures:
        options.refuse_idle(asked.checks, "eval_samples", "eval_seqlen", wanted="measuring OUT: give --eval-data")
    if not prunes and not asked.measures:
        ways = "give --keep, --ratio or --eval-data"
        options.refuse_idle(asked.output, "plots", wanted=f"choosing experts and measuring: {ways}")
    if (prunes or tunes) and asked.text.data is None:
        less = "" if prunes else "; --method rtn needs no text"
        raise click.UsageError(f"Missing option '--data'{less}.")
    for text in filter(None, (asked.text.data, asked.checks.eval_data)):
        local_files(text)
    if asked.output.plots:
        require("matplotlib", extra="plot")


def _request(source: Checkpoint, out: Path, asked: _Asked) -> Request:
    precision = make_precision(asked.computation) if asked.prunes or asked.tunes or asked.measures else None
    tuning = _tuning(source, asked) if asked.tunes or asked.healing.asked else None
    return Request(
        source=source,
        out=out,
        scheme=asked.stored.read(tuned=asked.tunes),
        view=asked.viewed.view(asked.output, asked.file.read(gguf=asked.stored.format == GGUF)),
        pruning=_pruning(asked.choice) if asked.prunes else None,
        score_windows=load_text(asked.text, source) if asked.prunes else None,
        tune_windows=tuning.windows if tuning else None,
        recipe=tuning.recipe if tuning else None,
        eval_windows=_eval_windows(source, asked) if asked.measures else None,
        precision=precision,
        work=asked.output.results,
    )


def _pruning(choice: ChoiceFlags) -> Pruning:
    return Pruning(
        keep=choice.keep,
        ratio=choice.ratio,
        criterion=choice.criterion or DEFAULT,
        protect=choice.protect,
        width=choice.width,
    )


def _tuning(source: Checkpoint, asked: _Asked) -> Tuning | None:
    text, rounding = asked.text, asked.rounding
    windows = replace(
        text,
        samples=rounding.tune_samples or text.samples or _TUNE_SAMPLES,
        seqlen=rounding.tune_seqlen or text.seqlen or _TUNE_SEQLEN,
    )
    iters = rounding.iters or (_TUNE_ITERS if asked.tunes else None)
    steps = options.RoundingFlags(
        method=rounding.method,
        iters=iters,
        lr=rounding.lr,
        minmax_lr=rounding.minmax_lr,
        batch_size=rounding.batch_size,
    )
    wanted = options.TuneRequest(text=windows, healing=asked.healing, rounding=steps, computation=asked.computation)
    return read_tuning(wanted, source)


def _eval_windows(source: Checkpoint, asked: _Asked) -> Windows:
    if asked.checks.eval_data == asked.text.data:
        tell("note: --eval-data is the text that OUT was made with: the figures will flatter it")
    try:
        return load_text(asked.checks.text, source)
    except PlanError as e:
        raise PlanError(with_options(str(e), "evaluate")) from e


# -- what is said meanwhile -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Watcher:
    """Says on stderr which stage begins, and has the progress named after it."""

    request: Request
    label: Label

    def __call__(self, number: int, total: int, stage: str, *, done: bool) -> None:
        self.label.text = f"[{number}/{total}] {stage}"
        tell(f"[{number}/{total}] {stage}: " + ("done already" if done else self._what(stage)))

    def _what(self, stage: str) -> str:
        request = self.request
        if stage == "score":
            return f"{request.source.where} over {_size(request.score_windows)}"
        if stage == "select":
            pruning = request.pruning
            assert pruning is not None
            kept = f"{pruning.keep} experts of each layer stay"
            return f"by {pruning.criterion}, " + (f"{pruning.ratio:g} of the experts go" if pruning.ratio else kept)
        if stage == "quantize":
            return f"{request.out}, {request.scheme.grid.bits} bits, {request.scheme.format}{self._tuned()}"
        if stage == "verify":
            return f"{request.out} against {request.source.where}"
        if stage == "card":
            return f"of {request.out}"  # no README.md: it may be somebody else's, and stay
        return f"{request.out} against {request.source.where} over {_size(request.eval_windows)}"

    def _tuned(self) -> str:
        recipe = self.request.recipe
        if recipe is None:
            return ""
        healed = "healed" if recipe.heal and recipe.heal.iters else "merged"
        done = [what for what, asked in ((healed, recipe.heal is not None), ("tuned", recipe.iters > 0)) if asked]
        return f", {' and '.join(done)} on {_size(self.request.tune_windows)}"


def _size(windows: Windows | None) -> str:
    assert windows is not None
    return f"{count(len(windows.ids_NT), 'window')}, {short(windows.ids_NT.size)} tokens"


# -- what it would take, and what came of it ---------------------------------------------------------------------------


def _show(prepared: Prepared, settings: CompressOptions, *, as_json: bool) -> None:
    """Print what every stage would take; the machine is measured for it."""
    from shardxform.base.file_system import FileSystem
    from shardxform.compress.request import forecast

    request, stages = prepared.request, forecast(prepared, settings, timed=True)
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
        known = {
            "summary": dict(prepared.sketch.summary),
            "notes": [*map(with_options, prepared.sketch.notes), *dict.fromkeys(of_text)],
        }
        print_json({**paths, "stages": list(map(asdict, stages)), **totals, **known})
        return
    summary = prepared.sketch.summary
    say(f"compress {request.source.where} -> {request.out}  (dry run: nothing is written)")
    rows(
        [
            ("experts", _experts(prepared)),
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
    for note in map(with_options, prepared.sketch.notes):
        say(f"  note: {note}")
    if request.eval_windows is None:
        say("  note: OUT is not measured without --eval-data")


def _total_lines(request: Request, totals: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """What all stages together would take."""
    yield "memory", f"about {gb(totals['peak_memory_bytes'])} at most"
    yield "free disk", f"{gb(totals['free_disk_bytes'])} of {gb(totals['disk_bytes'])} needed"
    yield "time", f"about {span(totals['seconds'])}: an estimate, {_basis(request)}"


def _experts(prepared: Prepared) -> str:
    summary = prepared.sketch.summary
    before, after = summary["experts_before"], summary["experts_after"]
    if prepared.request.pruning is None:
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


def _report(outcome: Outcome, source: options.Source, output: _Output) -> None:
    """Print what came of it."""
    if output.as_json:
        print_json(_as_json(outcome))
        return
    if outcome.made:
        say(f"{outcome.out}: complete and durable")
    else:
        say(f"{outcome.out}: already complete, made from the same inputs; nothing written")
    rows(_lines(outcome, source))
    if output.verbose:
        say()
        spent = outcome.spent.items()
        table(("stage", "time", "peak so far"), ((stage, span(took), gb(peak)) for stage, (took, peak) in spent))
    blocks = told_blocks(outcome.report.facts)
    told = blocks if output.verbose else [block for block in blocks if "rounded_to_nearest" in block]
    tell_blocks({"blocks": told}, outcome.report.measured)
    if left := outcome.facts["card"].get("left"):
        tell(f"note: no card was written: {left}")
    if "evaluate" not in outcome.facts:
        tell("note: not measured; give --eval-data, held-out text, and only that is done")


def _lines(outcome: Outcome, source: options.Source) -> Iterator[tuple[str, str]]:
    facts = outcome.facts
    if "select" in facts:
        yield from _choice_lines(outcome)
    else:
        yield "experts", f"all {facts['quantize']['experts_before']} of each layer: nothing was pruned"
    yield "size", _sizes(facts["quantize"]["bytes_before"], facts["quantize"]["bytes_after"])
    yield from _block_lines(told_blocks(outcome.report.facts))
    checked = facts["verify"]
    depth = f"{gb(checked['bytes_scanned'])} scanned" if checked["full"] else "bit for bit as written"
    if checked["full"] and "values_compared" in checked:
        depth += f", values of {checked['values_compared']:,} compared"
    warned = f", {count(checked['warnings'], 'warning')}" if checked["warnings"] else ""
    yield "verified", f"sound: {count(checked['tensors'], 'tensor')}, {depth}{warned}"
    if "evaluate" in facts:
        yield from _evaluation_lines(outcome)
    earlier = len(outcome.made) < len(facts) or outcome.report.resumed_bytes > 0
    yield "time", span(outcome.seconds) + (" in this run" if earlier else "")
    yield "memory", f"{gb(outcome.peak_rss_bytes)} peak"
    card = "" if facts["card"].get("left") else f", {outcome.out / 'README.md'}"
    yield "results", f"{outcome.folder}{card}"
    if not checked["full"]:
        yield "prove it", pasteable("shardxform", "verify", outcome.out, "--source", source, *family_words())


def _block_lines(blocks: Sequence[Block]) -> Iterator[tuple[str, str]]:
    """What healing and tuning did, over all blocks."""
    healed = [block["healed"] for block in blocks if block.get("healed")]
    tuned = [block for block in blocks if block.get("rtn_error")]
    for label, what, found, before, after in (
        ("merged" if only_merged(healed) else "healed", "pruning", healed, "pruned_error", "healed_error"),
        ("tuned", "rounding", tuned, "rtn_error", "tuned_error"),
    ):
        total = sum(block[before] for block in found)
        if total:
            share = sum(block[after] for block in found) / total
            yield label, f"squared error {share:.1%} of that of {what}, over {count(len(found), 'block')}"
    if (healed or tuned) and (text := judged_on(blocks)):
        yield "", f"on {text}"


def _choice_lines(outcome: Outcome) -> Iterator[tuple[str, str]]:
    facts = outcome.facts["select"]
    share = facts["saliency_kept"]
    kept = "" if share is None else f", with {share:.1%} of the saliency"
    yield "experts", f"{facts['experts']} -> {facts['kept']} per layer, by {facts['criterion']}{kept}"
    if "channels" in facts:
        before, after = facts["channels"]
        yield "channels", f"{before:,} -> {after:,} of every expert that stays"
    if facts["never_reached_kept"]:
        yield "note", f"kept {count(facts['never_reached_kept'], 'expert')} that no token reached; score more data"


def _evaluation_lines(outcome: Outcome) -> Iterator[tuple[str, str]]:
    found, against = outcome.facts["evaluate"]["perplexity"], outcome.facts["evaluate"]["against"]
    if found is not None and against["perplexity"]:
        before = against["perplexity"]
        changed = f"{found / before - 1:+.2%}{give_or_take(against['perplexity_ratio_standard_error'], '{:.2%}')}"
        yield "perplexity", f"{found:.4f}, of the source {before:.4f}: {changed}"
        if found < before:
            yield "", LOWER
    divergence = f"{against['kl']:.6f}{give_or_take(against['kl_standard_error'], '{:.6f}')} nats"
    agreement = f"{against['top1_agreement']:.2%}{give_or_take(against['top1_standard_error'], '{:.2%}')}"
    yield "KL divergence", f"{divergence}, same choice at {agreement} of positions"
