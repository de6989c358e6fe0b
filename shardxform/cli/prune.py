"""`shardxform prune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from shardxform.cli import options
from shardxform.cli.inputs import load_manifest, open_named
from shardxform.cli.outputs import execute
from shardxform.cli.tuning import on_ray, open_tuner, read_tuning, refuse_nothing_pruned
from shardxform.execution.runner import RunOptions
from shardxform.formats.scheme import GGUF
from shardxform.plan.prune import plan_prune

__all__ = ["prune_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File(options.GgufFlags):
    format: Literal["safetensors", "gguf"] = options.option(
        "What OUT is: shards of safetensors, as SRC, or a file for llama.cpp.", default="safetensors", first=True
    )


@options.command("prune")
@options.source_argument
@options.out_argument
def prune_command(
    source: options.Source,
    out: Path,
    pruned: options.PruneFlags,
    viewed: options.ViewFlags,
    file: _File,
    asked: options.HealRequest,
    jobs: options.JobFlags,
    transfer: options.TransferFlags,
    cluster: options.RayFlags,
    family: options.FamilyFlags,
    output: options.WriteFlags,
) -> None:
    """Write OUT, a copy of SRC with only the routed experts that the manifest keeps.

    Expert tensors and router rows are sliced, per-expert tensors renumbered, the expert count in config.json is
    rewritten; everything else is copied byte for byte. With --heal, the values of what is left are tuned too; names,
    shapes and types are the same. Interrupted, the same command goes on where it stopped.
    """
    family.load()
    if pruned.manifest is None and not viewed.text_only and viewed.mtp != "drop":
        raise click.UsageError("nothing to do: give --manifest, --text-only or --mtp drop")
    refuse_nothing_pruned(asked.healing, asked.text, prunes=pruned.manifest is not None, ways="--manifest")
    ray = on_ray(cluster, asked.computation.device, jobs=jobs.jobs, healing=asked.healing)
    checkpoint = open_named(source, transfer, out.parent)
    kept = load_manifest(pruned, checkpoint)
    tuning = read_tuning(asked, checkpoint)
    view = viewed.view(output, file.read(gguf=file.format == GGUF))
    plan = plan_prune(checkpoint, kept, view, tuning.recipe if tuning else None)
    if tuning is None:
        execute(plan, out, output, RunOptions(jobs=jobs.count), ray)
        return
    with open_tuner(tuning, checkpoint, plan) as tuner:
        execute(plan, out, output, RunOptions(jobs=jobs.count, tuner=tuner), told=tuning.windows.notes)
