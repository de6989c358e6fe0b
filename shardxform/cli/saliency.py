"""`shardxform saliency`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Final

import click

from shardxform.checkpoint.gguf import GgufModel
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.console import count, print_json, progress, rows, say, table, tell
from shardxform.cli.inputs import open_gguf_named, open_named, refuse_unwritable
from shardxform.cli.options import (
    PATH,
    SOURCE,
    FamilyFlags,
    HubFlags,
    JsonFlags,
    QuietFlags,
    Source,
    command,
    option,
)
from shardxform.experts.choosing import criteria_of, super_experts
from shardxform.experts.statistics import ExpertStats, Saliency

__all__ = ["saliency_command"]

_DIGEST: Final = re.compile("[0-9a-f]{64}")
_LINE: Final = 90  # characters of what a run says of itself, about
_MOST_LINES: Final = 8
_MOST_SHOWN: Final = 80  # characters of one thing of it


@click.group("saliency")
def saliency_command() -> None:
    """Look at saliency files, add up those of several runs, and make them of importance matrices."""


@command("show")
@click.argument("file", metavar="FILE", type=PATH)
def _show(file: Path, output: JsonFlags) -> None:
    """Show what FILE says of every layer's experts."""
    read = Saliency.load(file)
    if output.as_json:
        print_json(_as_json(read))
        return
    model = read.model
    say(f"{file}: {read.num_experts} experts in each of {count(len(read.layers), 'layer')}")
    groups = f", {model['num_groups']} router groups" if model["num_groups"] > 1 else ""
    supers = [f"layer {layer}: {', '.join(map(str, ids))}" for layer, ids in _supers(read).items()]
    rows(
        [
            (
                "model",
                f"{model['model_type']}, {model['num_layers']} layers, top-{model['num_experts_per_tok']}{groups}",
            ),
            ("source", _value(model["source_fingerprint"])),
            ("tokens", f"{read.tokens:,} in {count(len(read.runs), 'run')}"),
            *(line for number, run in enumerate(read.runs, 1) for line in _run_lines(f"run {number}", run)),
            ("criteria", ", ".join(criteria_of(read))),
            ("super experts", "; ".join(supers) or "none" if "peak" in read.known else "not known"),
        ]
    )
    table(
        ("layer", "reached", "tokens, least", "mean", "most", "largest peak"),
        [_line(*layer) for layer in _layers(read)],
    )


@command("add")
@click.argument("files", metavar="FILE FILE...", nargs=-1, required=True, type=PATH)
@click.option("--out", "-o", metavar="FILE", required=True, type=PATH, help="The saliency file to write.")
def _add(files: tuple[Path, ...], out: Path) -> None:
    """Add up the statistics of several runs over one checkpoint, as if one run had seen all their data."""
    if len(files) < 2:
        raise click.UsageError("give at least two files to add")
    read = [Saliency.load(file) for file in files]
    total = reduce(Saliency.added, read)
    total.save(out)
    say(
        f"{out}: {total.tokens:,} tokens in {count(len(total.runs), 'run')},"
        f" {total.num_experts} experts in each of {count(len(total.layers), 'layer')}"
    )
    if twice := sum(run in total.runs[:at] for at, run in enumerate(total.runs)):
        tell(f"note: {count(twice, 'run')} with the provenance of another: the same data may count twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Imported(QuietFlags):
    source: Source = option(
        "The checkpoint that experts are to be chosen of, in safetensors or in GGUF.",
        metavar="SRC",
        type=SOURCE,
        required=True,
        first=True,
    )
    out: Path = option("The saliency file to write.", "--out", "-o", metavar="FILE", required=True, first=True)
    weigh: bool = option(
        "Also read the experts' down projections once, for the criterion output-energy.", default=False
    )


@command("import")
@click.argument("imatrix", metavar="IMATRIX", type=PATH)
def _import(imatrix: Path, family: FamilyFlags, hub: HubFlags, asked: _Imported) -> None:
    """Make a saliency file of IMATRIX, an importance matrix of llama.cpp in GGUF, without running the model.

    It tells how many tokens reached every expert, and the energy inside it: criteria frequency and energy.
    """
    from shardxform.experts.imatrix import UNKNOWN, import_imatrix, open_imatrix

    refuse_unwritable(asked.out)
    read = open_imatrix(imatrix)
    source: Checkpoint | GgufModel | None = open_gguf_named(asked.source, hub, asked.out.parent)
    if source is None:
        family.load()
        source = open_named(asked.source, hub, asked.out.parent)
    with progress("read", asked.quiet or not asked.weigh) as on_progress:
        made = import_imatrix(read, source, weigh=asked.weigh, on_progress=on_progress)
    made.save(asked.out)
    tell(f"note: {UNKNOWN}")
    if asked.as_json:
        print_json(_as_json(made))
    else:
        say(
            f"{asked.out}: {made.tokens:,} tokens, {made.num_experts} experts in each of"
            f" {count(len(made.layers), 'layer')}; criteria {', '.join(criteria_of(made))}"
        )


def _run_lines(label: str, run: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What a run says of itself, over as many lines as it takes; what a stranger's file says, over a few at most."""
    lines = [""]
    for key, value in run.items():
        if key != "files" or value != [run.get("data")]:
            item = f"{key} {_value(value)}"
            item = item if len(item) <= _MOST_SHOWN else item[: _MOST_SHOWN - 3] + "..."
            if lines[-1] and len(lines[-1]) + len(item) > _LINE:
                lines.append("")
            lines[-1] += f"{', ' if lines[-1] else ''}{item}"
    shown = lines[:_MOST_LINES] + (["..."] if len(lines) > _MOST_LINES else [])
    yield from zip([label, *[""] * len(lines)], shown, strict=False)


def _value(value: object) -> str:
    """A value as people read it: a digest by its first 12 characters, a list without brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text[:12] if _DIGEST.fullmatch(text) else text
    return text if text.isprintable() else ascii(text)


def _layers(saliency: Saliency) -> list[tuple[str, ExpertStats]]:
    named = [(str(number), stats) for number, stats in saliency.layers.items()]
    return named + [(f"MTP {number}", stats) for number, stats in saliency.mtp_layers.items()]


def _supers(saliency: Saliency) -> dict[int, tuple[int, ...]]:
    return super_experts(saliency) if "peak" in saliency.known else {}


def _facts(stats: ExpertStats) -> dict[str, Any]:
    return {
        "known": list(stats.arrays()),
        "reached": None if stats.count_E is None else int((stats.count_E > 0).sum()),
        "least_tokens": None if stats.count_E is None else int(stats.count_E.min()),
        "mean_tokens": None if stats.count_E is None else float(stats.count_E.mean()),
        "most_tokens": None if stats.count_E is None else int(stats.count_E.max()),
        "largest_peak": None if stats.peak_E is None else float(stats.peak_E.max()),
    }


def _line(label: str, stats: ExpertStats) -> tuple[str, ...]:
    facts = _facts(stats)
    return (
        label,
        "-" if facts["reached"] is None else f"{facts['reached']} of {stats.size}",
        _number(facts["least_tokens"], ","),
        _number(facts["mean_tokens"], ",.0f"),
        _number(facts["most_tokens"], ","),
        _number(facts["largest_peak"], ".4g"),
    )


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _as_json(saliency: Saliency) -> dict[str, Any]:
    return {
        "model": dict(saliency.model),
        "tokens": saliency.tokens,
        "runs": [dict(run) for run in saliency.runs],
        "criteria": list(criteria_of(saliency)),
        "super_experts": {str(layer): list(ids) for layer, ids in _supers(saliency).items()},
        "layers": {str(number): _facts(stats) for number, stats in saliency.layers.items()},
        "mtp_layers": {str(number): _facts(stats) for number, stats in saliency.mtp_layers.items()},
    }


for _each in (_show, _add, _import):
    saliency_command.add_command(_each)
