"""`shardxform saliency`."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import click

from shardxform.cli.console import count, print_json, rows, table, tell
from shardxform.cli.options import json_option
from shardxform.saliency.choosing import super_experts
from shardxform.saliency.statistics import ExpertStats, Saliency

__all__ = ["command"]


@click.group("saliency")
def command() -> None:
    """Look at saliency files, and add up those of several runs."""


@command.command("show")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@json_option
def show(file: Path, as_json: bool) -> None:
    """Show what FILE says of every layer's experts."""
    read = Saliency.load(file)
    if as_json:
        print_json(_as_json(read))
        return
    model = read.model
    click.echo(f"{file}: {read.num_experts} experts in each of {count(len(read.layers), 'layer')}")
    groups = f", {model['num_groups']} router groups" if model["num_groups"] > 1 else ""
    supers = [f"layer {layer}: {', '.join(map(str, ids))}" for layer, ids in super_experts(read).items()]
    rows(
        [
            (
                "model",
                f"{model['model_type']}, {model['num_layers']} layers, top-{model['num_experts_per_tok']}{groups}",
            ),
            ("source", model["source_fingerprint"]),
            ("tokens", f"{read.tokens:,} in {count(len(read.runs), 'run')}"),
            *((f"run {number}", _run(run)) for number, run in enumerate(read.runs, 1)),
            ("super experts", "; ".join(supers) or "none"),
        ]
    )
    table(
        ("layer", "reached", "tokens, least", "mean", "most", "largest peak"),
        [_line(*layer) for layer in _layers(read)],
    )


@command.command("add")
@click.argument("files", metavar="FILE FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", "-o", metavar="OUT", required=True, type=click.Path(path_type=Path), help="The saliency file to write."
)
def add(files: tuple[Path, ...], out: Path) -> None:
    """Add up the statistics of several runs over one checkpoint, as if one run had seen all their data."""
    if len(files) < 2:
        raise click.UsageError("give at least two files to add")
    read = [Saliency.load(file) for file in files]
    total = reduce(Saliency.added, read)
    total.save(out)
    click.echo(
        f"{out}: {total.tokens:,} tokens in {count(len(total.runs), 'run')},"
        f" {total.num_experts} experts in each of {count(len(total.layers), 'layer')}"
    )
    if twice := sum(run in total.runs[:at] for at, run in enumerate(total.runs)):
        tell(f"note: {count(twice, 'run')} with the provenance of another: the same data may count twice")


def _run(run: Any) -> str:  # noqa: ANN401
    text = ", ".join(f"{key} {value}" for key, value in run.items())
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 100 else text[:97] + "..."


def _layers(saliency: Saliency) -> list[tuple[str, ExpertStats]]:
    named = [(str(number), stats) for number, stats in saliency.layers.items()]
    return named + [(f"MTP {number}", stats) for number, stats in saliency.mtp_layers.items()]


def _facts(stats: ExpertStats) -> dict[str, Any]:
    return {
        "reached": int((stats.count_E > 0).sum()),
        "least_tokens": int(stats.count_E.min()),
        "mean_tokens": float(stats.count_E.mean()),
        "most_tokens": int(stats.count_E.max()),
        "largest_peak": float(stats.peak_E.max()),
    }


def _line(label: str, stats: ExpertStats) -> tuple[str, ...]:
    facts = _facts(stats)
    return (
        label,
        f"{facts['reached']} of {stats.count_E.size}",
        f"{facts['least_tokens']:,}",
        f"{facts['mean_tokens']:,.0f}",
        f"{facts['most_tokens']:,}",
        f"{facts['largest_peak']:.4g}",
    )


def _as_json(saliency: Saliency) -> dict[str, Any]:
    return {
        "model": dict(saliency.model),
        "tokens": saliency.tokens,
        "runs": [dict(run) for run in saliency.runs],
        "super_experts": {str(layer): list(ids) for layer, ids in super_experts(saliency).items()},
        "layers": {str(number): _facts(stats) for number, stats in saliency.layers.items()},
        "mtp_layers": {str(number): _facts(stats) for number, stats in saliency.mtp_layers.items()},
    }
