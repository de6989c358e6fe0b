"""`shardxform inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from shardxform.base.strict_json import Fields
from shardxform.checkpoint.history import past_of
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.console import gb, print_json, rows, say, short, table, tell
from shardxform.cli.inputs import open_gguf_named, open_named
from shardxform.cli.options import FamilyFlags, HubFlags, JsonFlags, Source, command, option, source_argument
from shardxform.plan.inspection import Inspection, inspect_checkpoint
from shardxform.plan.slabs import GgufInspection, inspect_gguf
from shardxform.publish.card.steps import read_steps, words_of

__all__ = ["inspect_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown(JsonFlags):
    pattern: str | None = option(
        "List tensors instead, all or those that match a pattern such as '*.experts.*'.",
        "--tensors",
        metavar="PATTERN",
        is_flag=False,
        flag_value="*",
    )


@command("inspect")
@source_argument
def inspect_command(source: Source, family: FamilyFlags, hub: HubFlags, shown: _Shown) -> None:
    """Show what SRC is made of: family, experts, sizes by role, and what pruning would make of it.

    Reads headers only, never tensor data. Of an output of shardxform it also shows by which steps that came about, as
    its record tells. SRC may be a model in GGUF too: a file, or the first of several.
    """
    model = open_gguf_named(source, hub)
    if model is None:
        family.load()
    checkpoint = model.table if model else open_named(source, hub, Path())
    if shown.pattern is not None:
        _list_tensors(checkpoint, shown.pattern, shown.as_json)
        return
    inspection = inspect_gguf(model) if model else inspect_checkpoint(checkpoint)
    made = _made(checkpoint)
    if shown.as_json:
        print_json({**inspection.to_dict(), "made": [{"command": verb, "what": what} for verb, what in made]})
    elif isinstance(inspection, GgufInspection):
        _show_gguf(inspection, made)
    else:
        _show(inspection, made)


def _list_tensors(checkpoint: Checkpoint, pattern: str, as_json: bool) -> None:
    found = [ref for name, ref in checkpoint.tensors.items() if fnmatchcase(name, pattern)]
    if as_json:
        specs = [
            {
                "name": ref.name,
                "dtype": ref.spec.dtype,
                "shape": list(ref.spec.shape),
                "bytes": ref.nbytes,
                "shard": ref.ranges[0].file if ref.ranges else None,
            }
            for ref in found
        ]
        print_json({"pattern": pattern, "tensors": specs})
        return
    lines = [
        (ref.name, ref.spec.dtype, str(list(ref.spec.shape)), gb(ref.nbytes), ref.ranges[0].file if ref.ranges else "-")
        for ref in found
    ]
    table(("tensor", "dtype", "shape", "size", "shard"), lines)
    say(f"  {len(found):,} of {len(checkpoint.tensors):,} tensors, {gb(sum(ref.nbytes for ref in found))}")


def _made(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The steps by which an output of ours came about, as its record tells; one line says why that is not believed."""
    past = past_of(checkpoint)
    steps = read_steps(tuple(map(Fields, past.steps)), checkpoint.nbytes) if past.steps else ()
    if past.note:
        tell(f"note: {past.note}")
    return [(step.command, words_of(step)) for step in steps]


def _made_rows(made: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for number, (verb, what) in enumerate(made):
        yield "" if number else "made by", f"{verb}: {what}"


def _show(i: Inspection, made: Sequence[tuple[str, str]]) -> None:
    say(f"{i.path}: {gb(i.nbytes)}, {_parameters(i)}")
    rows([*_facts(i), *_made_rows(made)])
    say()
    table(("role", "tensors", "size", "share"), _shares(i.roles, i.nbytes))
    if i.outlook:
        say()
        table(
            ("could become", "size", "share"), [(what, gb(n), f"{n / i.nbytes:.1%}") for what, n in i.outlook.items()]
        )
    if i.unknown:
        say(f"\n  {len(i.unknown)} tensors unknown to the family, such as {i.unknown[0]}")


def _show_gguf(i: GgufInspection, made: Sequence[tuple[str, str]]) -> None:
    say(f"{i.path}: {gb(i.nbytes)}, {short(i.parameters)} parameters")
    rows([*_gguf_facts(i), *_made_rows(made)])
    say()
    table(("role", "tensors", "size", "share"), _shares(i.roles, i.nbytes))
    say()
    table(("dtype", "tensors", "size", "share"), _shares(i.dtypes, i.nbytes))
    if i.outlook:
        say()
        outlook = [(what, gb(n), f"{n / max(i.nbytes, 1):.1%}") for what, n in i.outlook.items()]
        table(("could become", "size", "share"), outlook)


def _gguf_facts(i: GgufInspection) -> Iterator[tuple[str, str]]:
    yield "architecture", f"{i.architecture or 'none said'} (GGUF)"
    if i.slabs:
        groups = f" in {i.slabs.groups} router groups" if i.slabs.groups > 1 else ""
        yield "experts", f"{i.slabs.num_experts} per layer{groups}, top-{i.slabs.top_k}"
        dense = i.slabs.num_layers - len(i.slabs.moe_layers)
        more = f" + {i.slabs.nextn} that predict further tokens" if i.slabs.nextn else ""
        yield "layers", f"{i.slabs.num_layers}" + (f", {dense} of them dense" if dense else "") + more
    else:
        yield "not prunable", i.refusal
    yield "files", f"{i.files}, {i.tensors:,} tensors"
    if i.unread:
        yield "not part of it", ", ".join(i.unread)


def _parameters(i: Inspection) -> str:
    if i.parameters is None:
        return "parameters not known: quantized in a form that is not understood"
    apart = f", and {short(i.parameters_apart)} in {_apart(i)}" if i.parameters_apart else ""
    return f"{short(i.parameters)} parameters{apart}"


def _apart(i: Inspection) -> str:
    parts = ("the vision tower" if i.vision else "", "MTP layers" if i.mtp_layers_found else "")
    return " and ".join(filter(None, parts)) or "other parts"


def _facts(i: Inspection) -> Iterator[tuple[str, str]]:
    yield "family", f"{i.family} ({i.architecture})"
    groups = f" in {i.groups} router groups" if i.groups > 1 else ""
    groups = f" in {len(i.sets)} sets ({', '.join(i.sets)})" if i.sets else groups
    yield "experts", f"{i.experts} per layer{groups}, top-{i.top_k}, {i.experts_spelling}"
    dense = f", {i.layers - i.moe_layers} of them dense" if i.moe_layers != i.layers else ""
    yield "layers", f"{i.layers}{dense}{_mtp(i)}"
    yield "vision tower", "yes" if i.vision else "no"
    yield "dtypes", ", ".join(f"{dtype} {gb(nbytes)}" for dtype, nbytes in i.dtypes.items())
    if i.quantization:
        each = [f"{name} ({count:,} weights, {gb(nbytes)})" for name, (count, nbytes) in i.encodings.items()]
        yield "quantized", ", ".join([i.quantization, *each])
    yield "shards", f"{i.shards}, {i.tensors:,} tensors"
    yield "sidecars", ", ".join(i.sidecars) or "none"
    if i.unread:
        yield "not part of it", ", ".join(i.unread)


def _mtp(i: Inspection) -> str:
    """MTP layers that are there, and what the config says of them where it says something else."""
    if i.mtp_layers_found == i.mtp_layers:
        return f" + {i.mtp_layers} MTP" if i.mtp_layers else ""
    declared = f"config.json declares {i.mtp_layers}" if i.mtp_layers else "which config.json does not declare"
    return f" + {i.mtp_layers_found} MTP, {declared}" if i.mtp_layers_found else f"; no MTP layers, though {declared}"


def _shares(found: Mapping[str, tuple[int, int]], total: int) -> list[tuple[str, str, str, str]]:
    """Lines of a table: what, number of tensors, size, and the size's share of the whole."""
    return [
        (what, f"{count:,}", gb(nbytes), f"{nbytes / max(total, 1):.1%}") for what, (count, nbytes) in found.items()
    ]
