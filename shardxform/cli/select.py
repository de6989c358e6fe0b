"""`shardxform select`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from shardxform.ask.manifest import Manifest, manifest_text
from shardxform.base.file_system import refuse_other, write_new
from shardxform.checkpoint.remote.repository import RepoName
from shardxform.cli.console import count, print_json, progress, rows, say, table, tell
from shardxform.cli.inputs import open_named
from shardxform.cli.options import SOURCE, FamilyFlags, Flags, HubFlags, QuietFlags, Source, command, option
from shardxform.errors import OutputError, PlanError
from shardxform.experts.choosing import (
    CRITERIA,
    DEFAULT,
    WEIGHTS,
    Choice,
    LayerChoice,
    channels_kept,
    decide,
    keep_of_ratio,
    with_width,
)
from shardxform.experts.plotting import plot_choice
from shardxform.experts.statistics import Saliency
from shardxform.experts.weighing import weigh

__all__ = ["ChoiceFlags", "select_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file to write: its whole content, before anything is written."""

    path: Path
    data: bytes
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceFlags(Flags, heading="Which experts stay"):
    """Which experts stay."""

    keep: int | None = option("Experts to keep in every layer.", type=click.IntRange(1), metavar="N", first=True)
    ratio: float | None = option("Or the share of the experts to remove, such as 0.5.", metavar="R", first=True)
    criterion: str | None = option(
        f"What an expert is scored by: {', '.join(CRITERIA)}.  [default: {DEFAULT}]",
        type=click.Choice(list(CRITERIA)),
        metavar="NAME",
    )
    width: int | None = option(
        "Also keep only N channels of every expert that stays, those that gave most to its output; needs `score "
        "--channels`.",
        type=click.IntRange(1),
        metavar="N",
    )
    protect: bool = option(
        "Keep experts with outlying activations, whatever they score.", "--protect-super-experts", default=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output(QuietFlags):
    out: Path | None = option("The keep manifest to write.", "--out", "-o", metavar="FILE", first=True)
    plot: Path | None = option("Also draw scores and cut; needs matplotlib.", metavar="PNG")
    dry_run: bool = option("Print the choice and stop; nothing is written.", default=False)


@command("select")
@click.argument("saliency", metavar="SALIENCY|SRC", type=SOURCE)
def select_command(
    saliency: Source, asked: ChoiceFlags, transfer: HubFlags, family: FamilyFlags, output: _Output
) -> None:
    """Choose the experts that every layer keeps, by what SALIENCY says of them, and write a keep manifest.

    SALIENCY is a file of `shardxform score`. The highest scores stay, ties go to the lower id, and all layers keep
    equally many; with router groups, all groups do. A checkpoint in its place is read once, by criteria of weights
    alone (aimer): no text is needed, and no model is run.
    """
    family.load()
    if (asked.keep is None) == (asked.ratio is None):
        raise click.UsageError("give either --keep or --ratio")
    if output.out is None and not output.dry_run:
        raise click.UsageError("give -o, the manifest to write, or --dry-run")
    written = None if output.dry_run else output.out
    read = _read(saliency, asked.criterion or DEFAULT, transfer, output)
    number = asked.keep if asked.keep is not None else keep_of_ratio(read.num_experts, asked.ratio or 0.0)
    choice = decide(read, number, asked.criterion or DEFAULT, asked.protect)
    choice = with_width(choice, asked.width) if asked.width is not None else choice
    manifest = choice.manifest(asked.ratio)
    if not output.dry_run:
        _write(list(_files(choice, manifest, output.out, output.plot)))
    if output.as_json:
        print_json(_as_json(choice, manifest, written))
    else:
        _show(choice, saliency, written)
    _notes(choice)


def _read(named: Source, criterion: str, transfer: HubFlags, output: _Output) -> Saliency:
    """The saliency that was named, or that of the weights of a checkpoint."""
    if isinstance(named, Path) and not named.is_dir():
        return Saliency.load(named)
    if criterion not in WEIGHTS:
        there = f"no folder or file {named.repo} here, and " if isinstance(named, RepoName) and named.as_path else ""
        raise PlanError(
            f"`criterion` {criterion}: {there}{named} is a checkpoint, of which only {', '.join(sorted(WEIGHTS))}"
            " can be told; give a file of `shardxform score`"
        )
    checkpoint = open_named(named, transfer, output.out.parent if output.out else Path())
    with progress("read", quiet=output.quiet) as on_progress:
        return weigh(checkpoint, on_progress)


def _files(choice: Choice, manifest: Manifest, out: Path | None, plot: Path | None) -> Iterator[_File]:
    if out is not None:
        yield _File(path=out, data=manifest_text(manifest).encode("utf-8"), kind="file")
    if plot is not None:
        if plot == out:
            raise OutputError(f"{plot}: expected another file for the picture than for the manifest")
        if plot.suffix.lower() != ".png":
            raise OutputError(f"{plot}: expected a name that ends in .png")
        yield _File(path=plot, data=plot_choice(choice), kind="picture")


def _write(files: list[_File]) -> None:
    """Write all, or refuse before the first."""
    for file in files:
        refuse_other(file.path, file.data, file.kind)
    for file in files:
        write_new(file.path, file.data, file.kind)


def _show(choice: Choice, source: Source, out: Path | None) -> None:
    model = choice.saliency.model
    say(f"select {source}" + ("  (dry run: nothing is written)" if out is None else f" -> {out}"))
    facts = [
        ("model", f"{model['model_type']}, top-{model['num_experts_per_tok']}"),
        ("experts", f"{choice.saliency.num_experts} -> {choice.num_kept} per layer, by {choice.criterion}"),
        *([] if choice.criterion in WEIGHTS else [("tokens", _tokens(choice))]),
    ]
    if choice.width:
        facts.append(("channels", f"{choice.width.of:,} -> {choice.width.channels:,} of every expert"))
    if choice.protect:
        found = [f"layer {n}: {', '.join(map(str, c.protected))}" for n, c in choice.layers.items() if c.protected]
        facts.append(("super", "; ".join(found) or "none found"))
    rows(facts)
    header: tuple[str, ...] = ("layer", "saliency kept", "routing kept", "never reached", "last kept", "first pruned")
    lines = [_line(label, layer) for label, layer in _layers(choice)]
    if choice.width:
        shares = [*channels_kept(choice).values(), *[None] * len(choice.mtp_layers)]
        header, lines = (
            (*header, "channels kept"),
            [(*line, _percent(s)) for line, s in zip(lines, shares, strict=True)],
        )
    table(header, lines)


def _tokens(choice: Choice) -> str:
    return f"{choice.saliency.tokens:,} in {count(len(choice.saliency.runs), 'run')}"


def _layers(choice: Choice) -> list[tuple[str, LayerChoice]]:
    named = [(str(number), layer) for number, layer in choice.layers.items()]
    return named + [(f"MTP {number}", layer) for number, layer in choice.mtp_layers.items()]


def _line(label: str, layer: LayerChoice) -> tuple[str, ...]:
    unreached = layer.unreached_kept + layer.unreached_pruned
    return (
        label,
        _percent(layer.saliency_kept),
        _percent(layer.routing_kept),
        f"{unreached}, {layer.unreached_kept} kept" if layer.unreached_kept else str(unreached),
        _score(layer.last_kept),
        _score(layer.first_pruned),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.4g}"


def _notes(choice: Choice) -> None:
    """What a person should know before pruning by it."""
    layers = _layers(choice)
    if kept := sum(layer.unreached_kept for _, layer in layers):
        where = count(sum(layer.unreached_kept > 0 for _, layer in layers), "layer")
        experts = count(kept, "expert")
        tell(f"note: kept {experts} in {where} that no token reached, by id and not by worth; score more data")
    if pruned := sum(layer.unreached_pruned for _, layer in layers):
        tell(f"note: pruned {count(pruned, 'expert')} that no token reached, of which nothing is known")


def _as_json(choice: Choice, manifest: Manifest, out: Path | None) -> dict[str, Any]:
    return {
        "manifest": None if out is None else str(out),
        "criterion": choice.criterion,
        "kept": choice.num_kept,
        "experts": choice.saliency.num_experts,
        "ratio": manifest.ratio,
        "channels": choice.width and {"kept": choice.width.channels, "of": choice.width.of},
        "super_experts": {str(n): list(c.protected) for n, c in choice.layers.items() if c.protected},
        "layers": {str(number): _facts(layer) for number, layer in choice.layers.items()},
        "mtp_layers": {str(number): _facts(layer) for number, layer in choice.mtp_layers.items()},
    }


def _facts(layer: LayerChoice) -> dict[str, Any]:
    return {
        "saliency_kept": layer.saliency_kept,
        "routing_kept": layer.routing_kept,
        "never_reached_kept": layer.unreached_kept,
        "never_reached_pruned": layer.unreached_pruned,
        "last_kept": layer.last_kept,
        "first_pruned": layer.first_pruned,
    }
