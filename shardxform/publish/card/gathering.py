"""Gathering what a card says: an output's record and headers, a manifest, evaluations, and the source's own card.

A record that contradicts the files beside it is refused; of what it does not say, nothing is said. Changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shardxform.ask.manifest import Manifest
from shardxform.base.file_system import not_a_directory
from shardxform.checkpoint.identity import Identity
from shardxform.checkpoint.record import PROVENANCE, Record, read_record
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ManifestError, OutputError, PlanError
from shardxform.execution.output import WORK, is_ours
from shardxform.formats.stored import Stored
from shardxform.model.layout import layout_of
from shardxform.plan.inspection import count_parameters, stored_of
from shardxform.publish.card.evaluations import read_evaluation
from shardxform.publish.card.facts import Change, Facts, Healing, Origin, Pruning, Quantization
from shardxform.publish.card.frontmatter import is_hub_name, origin_of
from shardxform.publish.card.record import (
    block_errors,
    data_of,
    flag,
    healed_blocks,
    judged_apart,
    section,
    text,
    whole,
)
from shardxform.publish.card.reproduction import commands
from shardxform.publish.card.writing import is_card, picture_name, read_readme

__all__ = ["CardOptions", "gather"]

_LICENSES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
_HEAD_BYTES: Final = 4096
_RECIPE: Final = ("samples", "seqlen", "iters", "batch_size", "seed", "inputs", "device", "dtype")
_FLOATS: Final = {"bf16": "bfloat16", "fp16": "float16"}
_PARTS: Final = {"MTP layers": "MTP layers", "vision tower": "the vision tower"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOptions:
    """What a card is made from, beside the output.

    Attributes:
        base_model: hub name of the source; empty to take it from the source's card or config.
        manifest: the keep manifest that the output was pruned by, for the reasons that it gives.
        evaluations: files that hold what `evaluate` printed as JSON.
        plots: pictures to show, as PNG.

    """

    base_model: str = ""
    manifest: Path | None = None
    evaluations: Sequence[Path] = ()
    plots: Sequence[Path] = ()


def gather(out: Path, options: CardOptions | None = None) -> Facts:
    """Read everything that is known of an output of shardxform.

    Raises:
        OutputError: OUT is no finished output of shardxform, or not as it was written; a picture is none.
        CheckpointError, FamilyError: OUT cannot be read.
        ManifestError: the manifest is malformed, or not the one that OUT was pruned by.
        PlanError: an evaluation is malformed, of another checkpoint, or against another than OUT's source; the base
            model's name is none.

    """
    options = options or CardOptions()
    if options.base_model and not is_hub_name(options.base_model):
        raise PlanError(f"`base_model`: expected a hub name such as owner/name, found {options.base_model!r}")
    record = _record(out)
    checkpoint = Checkpoint.open(out)
    stored = stored_of(checkpoint)
    layout = stored.layout if stored else layout_of(checkpoint.config, checkpoint.tensors, checkpoint.where)
    inputs, summary = record.inputs, record.summary
    manifest = _manifest(options.manifest, inputs, out)
    before = _experts_before(inputs, summary, manifest, layout.num_experts)
    counts = count_parameters(checkpoint, stored)
    top_k = layout.top_k
    origin = _origin(out, checkpoint, options.base_model)
    origins = [
        found for made in (inputs, section(inputs, "origin")) if (found := Identity.from_dict(made.get("source")))
    ]
    name = out.resolve().name or "OUT"
    return Facts(
        name=name,
        command=text(inputs, "command"),
        origin=origin,
        family=layout.family.name,
        architecture=layout.wrapper.architecture,
        model_type=text(layout.config, "model_type"),
        has_mtp=layout.has_mtp,
        vision=layout.wrapper.vision and layout.has_vision,
        bfloat16_only=layout.family.bfloat16_only,
        layers=layout.num_layers,
        moe_layers=len(layout.moe_layers),
        top_k=top_k,
        max_positions=whole(layout.text, "max_position_embeddings") or 0,
        experts=Change(before, layout.num_experts),
        nbytes=Change(_source_bytes(record), checkpoint.nbytes),
        parameters=Change(before and counts.total(before), counts.total(layout.num_experts)),
        active=Change(before and counts.active(before, top_k), counts.active(layout.num_experts, top_k)),
        dropped=tuple(told for key, told in _PARTS.items() if whole(section(summary, "dropped"), key)),
        pruning=None if before == layout.num_experts else _pruning(inputs, manifest),
        healing=_healing(record),
        quantization=_quantization(record, stored) if stored else None,
        evaluations=tuple(read_evaluation(path, checkpoint, origins) for path in options.evaluations),
        plots=_plots(options.plots),
        commands=commands(inputs, origin.base_model or "SRC", name),
        dequantized=_FLOATS.get(text(section(inputs, "target"), "format"), ""),
    )


def _record(out: Path) -> Record:
    """The record of a finished output, held against the headers of its shards."""
    if not out.is_dir():
        raise OutputError(f"{out}: {not_a_directory(out)}; expected an output of shardxform")
    if os.path.lexists(out / WORK):
        raise OutputError(f"{out}: unfinished; run the command that writes it again, then make the card")
    record = read_record(out / PROVENANCE)
    if record is None:
        raise OutputError(
            f"{out}: no {PROVENANCE} that can be read; expected an output of shardxform, which says how it was made"
        )
    for name, shard in record.shards.items():
        if name not in record.files or "/" in name or not is_ours(out / name, None, shard):
            raise OutputError(f"{out / name}: not as {PROVENANCE} has it; see `shardxform verify`")
    return record


def _origin_of_inputs(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was done to the 16-bit checkpoint: the inputs themselves, or for a converted output those before."""
    return section(inputs, "origin") or inputs


def _source_bytes(record: Record) -> int | None:
    """Bytes of all tensors of the checkpoint that was pruned or quantized first, as every command counts them."""
    origin = section(record.inputs, "origin")
    return whole(section(origin, "summary") if origin else record.summary, "bytes_before")


def _manifest(path: Path | None, inputs: Mapping[str, Any], out: Path) -> Manifest | None:
    """The manifest given, which must be the one that was used: its reasons are published as OUT's."""
    if path is None:
        return None
    manifest = Manifest.load(path)
    recorded = section(_origin_of_inputs(inputs), "manifest", "keep")
    if not recorded:
        raise ManifestError(f"{path}: {out} was not pruned by a manifest, says its {PROVENANCE}")
    for layer, ids in manifest.keep.items():
        if recorded.get(str(layer)) != list(ids):
            raise ManifestError(f'{path}: keep["{layer}"]: not what {out} was pruned by, says its {PROVENANCE}')
    if len(recorded) != len(manifest.keep):
        raise ManifestError(f"{path}: {len(manifest.keep)} layers, but {out} was pruned in {len(recorded)}")
    return manifest


def _experts_before(
    inputs: Mapping[str, Any], summary: Mapping[str, Any], manifest: Manifest | None, after: int
) -> int | None:
    """Experts per layer of the source; a converted output's record has those of the pruned one alone."""
    if not section(inputs, "origin", "manifest", "keep"):
        before = whole(summary, "experts_before")
    else:
        before = whole(manifest.model, "num_experts") if manifest else None
    return before if before and before >= after else None


def _pruning(inputs: Mapping[str, Any], manifest: Manifest | None) -> Pruning | None:
    if manifest is None:
        return Pruning() if section(_origin_of_inputs(inputs), "manifest", "keep") else None
    told = manifest.provenance
    runs = told.get("runs")
    layers = section(told, "layers")
    return Pruning(
        criterion=manifest.criterion if manifest.criterion.isprintable() else "",
        tokens=whole(told, "tokens"),
        data=tuple(found for run in runs if (found := data_of(section(run)))) if isinstance(runs, list) else (),
        saliency_kept=_shares(layers.get("saliency_kept")),
        never_reached_kept=_sum(layers.get("never_reached_kept")),
    )


def _shares(values: object) -> tuple[float, ...]:
    """One share per layer; none when one of them is not known."""
    listed = values if isinstance(values, list) else []
    return tuple(listed) if all(isinstance(share, float | int) and 0 <= share <= 1 for share in listed) else ()


def _sum(values: object) -> int | None:
    known = isinstance(values, list) and values and all(type(count) is int for count in values)
    return sum(values) if known and isinstance(values, list) else None


def _healing(record: Record) -> Healing | None:
    """How pruned blocks were healed, as the record has it."""
    recipe = section(_origin_of_inputs(record.inputs), "recipe")
    heal = section(recipe, "heal")
    if not heal:
        return None
    return Healing(
        what=text(heal, "what"),
        iters=whole(heal, "iters"),
        batch_size=whole(heal, "batch_size"),
        data=data_of(section(recipe, "data")),
        blocks=healed_blocks(record.facts),
    )


def _quantization(record: Record, stored: Stored) -> Quantization:
    """How weights are stored, as the headers have it, and how they came about, as the record has it."""
    inputs = record.inputs
    scheme = section(_origin_of_inputs(inputs), "scheme")
    recipe = section(_origin_of_inputs(inputs), "recipe") if text(scheme, "method") == "auto-round" else {}
    return Quantization(
        bits=stored.scheme.grid.bits,
        group_size=stored.scheme.grid.group_size,
        format=stored.scheme.format,
        expert_names="fused-indexed" if "fused-indexed" in stored.spellings else "split",
        modules=len(stored.modules),
        g_idx=stored.scheme.g_idx,
        method=text(scheme, "method"),
        search=flag(section(scheme, "grid"), "search"),
        data=data_of(section(recipe, "data")),
        recipe={key: recipe[key] for key in _RECIPE if type(recipe.get(key)) is int or text(recipe, key)},
        blocks=block_errors(record.facts),
        judged_apart=judged_apart(record.facts),
    )


def _origin(out: Path, checkpoint: Checkpoint, base_model: str) -> Origin:
    """Whom the weights are from: as told, else as the card in OUT or the config says."""
    card = read_readme(out)
    found = origin_of(card, _license_text(out), ours=is_card(card))
    config_name = checkpoint.config.get("_name_or_path")
    guessed = config_name if isinstance(config_name, str) and is_hub_name(config_name) else ""
    return replace(found, base_model=base_model or found.base_model or guessed)


def _license_text(out: Path) -> str:
    for name in _LICENSES:
        path = out / name
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                return file.read(_HEAD_BYTES).decode("utf-8", "replace")
    return ""


def _plots(paths: Sequence[Path]) -> tuple[str, ...]:
    names = tuple(picture_name(path) for path in paths)
    for name in names:
        if names.count(name) > 1:
            raise OutputError(f"{name}: two pictures of this name; they would lie in one directory")
    return names
