"""`shardxform evaluate`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from shardxform.base.progress import peak_rss_bytes
from shardxform.calibration.options import DataOptions
from shardxform.checkpoint.identity import identify
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import options
from shardxform.cli.console import LOWER, count, gb, give_or_take, print_json, progress, rows, say, short, table, tell
from shardxform.cli.inputs import (
    load_manifest,
    load_text,
    make_precision,
    open_all_named,
    open_gguf_named,
    refuse_no_data,
    refuse_unwritable,
    require,
)
from shardxform.errors import OutputError
from shardxform.model.layout import layout_of
from shardxform.model.tied_head import tied_notes
from shardxform.plan.gguf_origin import stands_for
from shardxform.plan.view import pruned_view

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.evaluation.evaluate import Comparison, EvaluateOptions, Evaluation
    from shardxform.evaluation.routing import Load
    from shardxform.evaluation.tasks import TaskOptions, TaskSize

__all__ = ["evaluate_command"]

_WORK: Final = "shardxform-evaluate.work"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference(options.Flags, heading="What is measured"):
    against: options.Source | None = options.option(
        "Reference, such as the 16-bit source: compare.", metavar="REF", type=options.SOURCE, first=True
    )
    against_dtype: Literal["float32", "bfloat16"] | None = options.option(
        "Type in which REF is computed.  [default: as --dtype]"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text(options.TextFlags):
    by_text_source: bool = options.option(
        "Keep the sources apart that documents name in their field `source`: --samples windows of each, and its own "
        "figures beside those of all.",
        default=False,
    )

    def read(self) -> DataOptions:
        return replace(options.TextFlags.read(self), by_source=self.by_text_source)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tasks(options.Flags, heading="Tasks"):
    """Tasks of lm-evaluation-harness, in the place of text."""

    tasks: str | None = options.option(
        "Accuracy instead: tasks of lm-evaluation-harness that compare answers, such as arc_challenge,hellaswag,mmlu.",
        metavar="NAME[,NAME]",
        first=True,
    )
    limit: int | None = options.option("Documents of each task.  [default: all]", type=click.IntRange(1), metavar="N")
    shots: int | None = options.option(
        "Examples before each document.  [default: as the task says]", type=click.IntRange(0), metavar="N"
    )
    task_files: Path | None = options.option("Directory of task files beside the harness's own.", metavar="DIR")

    def read(self) -> TaskOptions | None:
        """What is asked for; None where no task is."""
        if self.tasks is None:
            for name in ("limit", "shots", "task_files"):
                if getattr(self, name) is not None:
                    raise click.UsageError(f"--{name.replace('_', '-')} is of tasks: give --tasks")
            return None
        require("lm_eval", extra="tasks")
        from shardxform.evaluation.tasks import TaskOptions

        names = tuple(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))
        if not names:
            raise click.UsageError("--tasks: expected names, found none")
        return TaskOptions(names=names, limit=self.limit, shots=self.shots, files=self.task_files)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output(options.DryFlags):
    plot: Path | None = options.option(
        "Draw the errors of the blocks, with --by-text-source the divergence on each source; or the tasks.",
        metavar="PNG",
    )


@options.command("evaluate")
@click.argument("checkpoint", metavar="CKPT", type=options.SOURCE)
def evaluate_command(
    checkpoint: options.Source,
    pruned: options.PruneFlags,
    compared: _Reference,
    text: _Text,
    asked: _Tasks,
    computation: options.ComputeFlags,
    place: options.WorkFlags,
    transfer: options.TransferFlags,
    family: options.FamilyFlags,
    output: _Output,
) -> None:
    """Measure CKPT on held-out text, block by block: perplexity, and with --against how far it is from REF.

    With --tasks, accuracy on tasks in its place.

    CKPT and REF are 16-bit or quantized; with --manifest, CKPT is seen as it would be after pruning. CKPT may be a
    model in GGUF that was made of REF, which gives its config and tokenizer. Hidden states lie in
    ./shardxform-evaluate.work meanwhile; interrupted, the same command goes on after the last finished block.
    """
    family.load()
    if tasks := _tasks(asked, text, compared):
        _run_tasks(checkpoint, pruned, compared, tasks, computation, place, transfer, output)
        return
    refuse_no_data(text)
    against, plot, work = compared.against, output.plot, place.work or Path(_WORK)
    if compared.against_dtype and not against:
        raise click.UsageError("--against-dtype is the type of a reference: give --against")
    if plot:
        _refuse_plot(plot, against)
    named = _opened(checkpoint, pruned, against, transfer, work.parent)
    source, tested, reference = named.source, named.tested, named.reference
    settings = _options(computation, compared, work)
    from shardxform.evaluation.evaluate import evaluate, evaluation_facts, identified
    from shardxform.forward.work import refuse_inside

    others = [reference] if reference else []
    for path in (work, *([plot] if plot else [])):
        refuse_inside(path, [each.root for each in (source, *others)])
    windows = load_text(text, named.tokenizer, against=reference)
    if output.dry_run:
        _show(tested, reference, windows, settings, output.as_json)
        return
    for each in (tested, *others):
        for note in tied_notes(each, layout_of(each.config, each.tensors, each.where)):
            tell(f"note: {each.where}: {note}")
    started = time.monotonic()
    with progress("evaluate", output.quiet) as settings.on_progress:
        found = evaluate(tested, windows, settings, reference, _kept(source, pruned, reference))
    if output.as_json:
        facts = identified(evaluation_facts(found, windows), tested, reference)
        print_json({**facts, **_spent(windows, time.monotonic() - started)})
    else:
        _report(found, checkpoint, pruned.manifest, against, time.monotonic() - started)
    if plot and found.against:  # last: a picture that fails must not cost the figures
        from shardxform.evaluation.plot import draw

        draw(found.against, plot, title=_title(checkpoint, pruned.manifest, against), sources=found.sources)


def _kept(
    source: Checkpoint, pruned: options.PruneFlags, reference: Checkpoint | None
) -> Mapping[int, Sequence[int]] | None:
    """Which of the reference's experts are measured, where the manifest says so: the reference is what it prunes."""
    manifest = load_manifest(pruned, source) if reference else None
    if manifest is None or reference is None or identify(source).difference(identify(reference)):
        return None
    return manifest.keep


def _tasks(asked: _Tasks, text: _Text, compared: _Reference) -> TaskOptions | None:
    """The tasks that are asked for, if any; refuses what says nothing of them."""
    tasks = asked.read()
    if tasks is None:
        return None
    for given, name in ((text.data, "--data"), (compared.against_dtype, "--against-dtype")):
        if given is not None:
            raise click.UsageError(f"{name} is of text, and --tasks bring their own: give one of the two")
    return tasks


def _run_tasks(
    checkpoint: options.Source,
    pruned: options.PruneFlags,
    compared: _Reference,
    tasks: TaskOptions,
    computation: options.ComputeFlags,
    place: options.WorkFlags,
    transfer: options.TransferFlags,
    output: _Output,
) -> None:
    against, work = compared.against, place.work or Path(_WORK)
    named = _opened(checkpoint, pruned, against, transfer, work.parent)
    tested, reference = named.tested, named.reference
    if output.plot:
        _refuse_picture(output.plot)
    settings = _options(computation, compared, work)
    from shardxform.evaluation.evaluate import identified
    from shardxform.evaluation.tasks import accuracy, size_of_tasks

    if output.dry_run:
        _show_size(size_of_tasks(tested, tasks, named.tokenizer.root), tested, reference, output.as_json)
        return
    started = time.monotonic()
    with progress("evaluate", output.quiet) as settings.on_progress:
        found = accuracy(tested, tasks, settings, reference, named.tokenizer.root)
    dtype = str(settings.precision.dtype).removeprefix("torch.")
    if output.as_json:
        facts = identified({"tasks": found, "dtype": dtype, "against": {} if reference else None}, tested, reference)
        spent = {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
        print_json({**facts, **spent})
    else:
        _tell_tasks(found, checkpoint, pruned.manifest, against, tasks)
        rows([("time", f"{time.monotonic() - started:.1f} s"), ("memory", f"{gb(peak_rss_bytes())} peak")])
    if output.plot:
        from shardxform.evaluation.plot import draw_tasks

        draw_tasks(found["results"], output.plot, title=_title(checkpoint, pruned.manifest, against))


def _tell_tasks(
    found: Mapping[str, object],
    checkpoint: options.Source,
    manifest: Path | None,
    against: options.Source | None,
    tasks: TaskOptions,
) -> None:
    seen = f"{checkpoint}" + (f" pruned by {manifest}" if manifest else "")
    say(f"{seen}: {found['harness']}" + (f", {tasks.limit} documents of each task" if tasks.limit else ""))
    table(*_task_lines(found, against))


def _show_size(size: TaskSize, tested: Checkpoint, reference: Checkpoint | None, as_json: bool) -> None:
    if as_json:
        print_json({"checkpoint": tested.where, **asdict(size)})
        return
    say(f"evaluate {tested.where}  (dry run: nothing is written)")
    each = " of each model" if reference else ""
    rows(
        [
            ("requests", f"{size.requests:,}, of which {size.distinct:,} read something else"),
            ("tokens", f"{size.tokens:,}, in {count(size.passes, 'pass')} over the weights{each}"),
        ]
    )


def _task_lines(
    found: Mapping[str, Any], against: options.Source | None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines of a table: every metric of every task."""
    head: tuple[str, ...] = ("task", "shots", "documents", "metric", "value")
    if against:
        head = (*head, "reference", "difference")
    lines: list[tuple[str, ...]] = []
    for name, task in found["results"].items():
        for metric, each in task["metrics"].items():
            shown = ("-" if task[key] is None else f"{task[key]:,}" for key in ("shots", "documents"))
            line = (name, *shown, metric, f"{each['value']:.4f}{give_or_take(each['standard_error'])}")
            if against:
                error = each["difference_standard_error"]
                difference = f"{each['value'] - each['reference']:+.4f}{give_or_take(error)}"
                line = (*line, f"{each['reference']:.4f}", difference)
            lines.append(line)
    return head, lines


def _options(computation: options.ComputeFlags, compared: _Reference, work: Path) -> EvaluateOptions:
    precision, other = make_precision(computation), compared.against_dtype
    from shardxform.evaluation.evaluate import EvaluateOptions

    reference_dtype = make_precision(replace(computation, dtype=other)).dtype if other else None
    return EvaluateOptions(precision=precision, work=work, against_dtype=reference_dtype)


def _refuse_plot(plot: Path, against: options.Source | None) -> None:
    """Refuse a picture that could not be drawn when all is done."""
    if against is None:
        raise click.UsageError("--plot draws the errors of the blocks against a reference: give --against")
    _refuse_picture(plot)


def _refuse_picture(plot: Path) -> None:
    """Refuse a name under which no picture can be written."""
    require("matplotlib", extra="plot")
    if plot.suffix.lower() != ".png":
        raise OutputError(f"{plot}: expected a name that ends in .png")
    refuse_unwritable(plot)
    from shardxform.evaluation.plot import refuse_foreign_picture

    refuse_foreign_picture(plot)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """What the command line names.

    Attributes:
        source: what lies there.
        tested: what is measured: the same, or pruned.
        reference: what it is held against.
        tokenizer: the checkpoint whose tokenizer reads the text.

    """

    source: Checkpoint
    tested: Checkpoint
    reference: Checkpoint | None
    tokenizer: Checkpoint


def _opened(
    checkpoint: options.Source,
    pruned: options.PruneFlags,
    against: options.Source | None,
    transfer: options.TransferFlags,
    folder: Path,
) -> _Named:
    """Open what is named; what a model in GGUF lacks is the reference's.

    Raises:
        UsageError: a model in GGUF without a reference.
        CheckpointError: it is not made of the reference; see `gguf_origin.stands_for`.

    """
    model = open_gguf_named(checkpoint)
    if model is None:
        source, *others = open_all_named([checkpoint, *([against] if against else [])], transfer, folder)
        return _Named(source=source, tested=_view(source, pruned), reference=next(iter(others), None), tokenizer=source)
    if against is None:
        raise click.UsageError(f"{model.where} is GGUF, which has no config.json: give --against, what it was made of")
    (reference,) = open_all_named([against], transfer, folder)
    tested = stands_for(model, reference, load_manifest(pruned, reference))
    return _Named(source=tested, tested=tested, reference=reference, tokenizer=reference)


def _view(checkpoint: Checkpoint, pruned: options.PruneFlags) -> Checkpoint:
    if pruned.manifest is None:
        return checkpoint
    return pruned_view(checkpoint, load_manifest(pruned, checkpoint)).checkpoint


def _show(
    tested: Checkpoint, reference: Checkpoint | None, windows: Windows, settings: EvaluateOptions, as_json: bool
) -> None:
    from shardxform.forward.passes import estimate

    chains = {"tested": tested} | ({"reference": reference} if reference else {})
    widest = max(settings.precision, settings.against, key=lambda precision: precision.dtype.itemsize)
    needs = estimate(chains, windows, widest if reference else settings.precision, settings.work)
    if as_json:
        told = {"data": dict(windows.provenance), "notes": list(windows.notes)}
        print_json({"checkpoint": tested.where, **told, **needs})
        return
    say(f"evaluate {tested.where}  (dry run: nothing is written)")
    rows(
        [
            ("data", f"{count(len(windows.ids_NT), 'window')}, {short(needs['tokens'])} tokens"),
            *([("sources", _of_sources(windows))] if windows.rows else []),
            (
                "blocks",
                f"{needs['blocks']} each of {count(len(chains), 'model')}, {needs['dtype']} on {needs['device']}",
            ),
            ("memory", f"about {gb(needs['peak_memory_bytes'])}"),
            ("work", f"{gb(needs['work_bytes'])} of {gb(needs['free_disk_bytes'])} free in {settings.work}"),
        ]
    )


def _of_sources(windows: Windows) -> str:
    return ", ".join(f"{name} {len(rows):,}" for name, rows in windows.rows) + " windows"


def _title(checkpoint: options.Source, manifest: Path | None, against: options.Source | None) -> str:
    pruned = f" pruned by {manifest.name}" if manifest else ""
    compared = f" against {Path(str(against)).name}" if against else ""
    return f"{Path(str(checkpoint)).name}{pruned}{compared}"


def _spent(windows: Windows, seconds: float) -> dict[str, Any]:
    return {"notes": list(windows.notes), "seconds": round(seconds, 3), "peak_rss_bytes": peak_rss_bytes()}


def _report(
    found: Evaluation, checkpoint: options.Source, manifest: Path | None, against: options.Source | None, seconds: float
) -> None:
    seen = f"{checkpoint}" + (f" pruned by {manifest}" if manifest else "")
    say(f"{seen}: {count(found.windows, 'window')}, {found.tokens:,} tokens")
    lines = [("perplexity", f"{found.perplexity:.4f}")]  # a number alone: scripts read it
    if math.isfinite(found.perplexity_error):
        lines.append(("its error", f"{found.perplexity_error:.4f}, by which another text of the kind may differ"))
    if found.against:
        change = found.ratio - 1
        changed = f"{change:+.2%}{give_or_take(found.against.ratio_error, '{:.2%}')}"
        lines += [
            ("reference", f"{found.against.perplexity:.4f} ({against}); this is {changed}"),
            *([("", LOWER)] if change < 0 else []),
            ("KL divergence", f"{_divergence(found.against)} nats"),
            ("same choice", f"{_agreement(found.against)} of positions"),
        ]
        lines += [("computed in", told)] if (told := _computed(found)) else []
    rows([*lines, ("time", f"{seconds:.1f} s"), ("memory", f"{gb(peak_rss_bytes())} peak")])
    if found.sources:
        say()
        table(*_source_lines(found))
    if found.against:
        say()
        table(*_block_lines(found.against))
        if any(after < before for before, after in itertools.pairwise(found.against.block_errors)):
            say("  added: to the block before; negative where what goes through grows faster than the error")
        if found.against.loads:
            say("  lost: the reference's choices that fell on experts that are gone; moved: choices that fall on")
            say("  other experts than its own choices among the kept ones; used: as how many equally busy ones")


def _computed(found: Evaluation) -> str:
    """What the type of the computation does to the figures; nothing of float32, whose rounding is far below them."""
    against = found.against
    if against is None or {found.dtype, against.dtype} <= {"float32", ""}:
        return ""
    if found.dtype != against.dtype:
        return f"{found.dtype}, the reference in {against.dtype}: what that does is in these figures"
    return (
        f"{found.dtype}, whose own rounding is in these figures: with --against-dtype float32, the reference against"
        " itself shows how much of them"
    )


def _divergence(against: Comparison) -> str:
    return f"{against.kl:.6f}{give_or_take(against.kl_error, '{:.6f}')}"


def _agreement(against: Comparison) -> str:
    return f"{against.top1:.2%}{give_or_take(against.top1_error, '{:.2%}')}"


def _source_lines(found: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines of a table: the sources, and all of them together."""
    head: tuple[str, ...] = ("source", "windows", "perplexity")
    if found.against:
        head = (*head, "reference", "ratio", "KL divergence", "same choice")
    return head, [_source_line(name, each) for name, each in (*found.sources.items(), ("all", found))]


def _source_line(name: str, found: Evaluation) -> tuple[str, ...]:
    line = (name, f"{found.windows:,}", f"{found.perplexity:.4f}")
    if found.against is None:
        return line
    against = found.against
    ratio = f"{found.ratio:.4f}{give_or_take(against.ratio_error)}"
    return (*line, f"{against.perplexity:.4f}", ratio, _divergence(against), _agreement(against))


def _block_lines(against: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines of a table of the blocks; how their routers' choices changed where that is known."""
    before = (0.0, *against.block_errors)
    head: tuple[str, ...] = ("block", "error of its output", "added")
    if against.loads:
        head = (*head, "lost", "moved", "used")
    lines: list[tuple[str, ...]] = []
    for layer, error in enumerate(against.block_errors):
        line = (str(layer), f"{error:.2%}", f"{error - before[layer]:+.2%}")
        lines.append((*line, *_load_cells(against.loads.get(layer))) if against.loads else line)
    return head, lines


def _load_cells(load: Load | None) -> tuple[str, str, str]:
    if load is None:
        return "", "", ""
    was, now = load.even
    return f"{load.lost:.1%}", f"{load.moved:.1%}", f"{was:.1f} -> {now:.1f} of {len(load.keep)}"
