"""`shardxform prune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.core import ParameterSource

from shardxform.checkpoint.table import GGUF_SUFFIX
from shardxform.cli import options
from shardxform.cli.inputs import (
    is_gguf,
    load_gguf_manifest,
    load_manifest,
    open_gguf_named,
    open_named,
    refuse_nothing_pruned,
)
from shardxform.cli.outputs import execute
from shardxform.execution.runner import RunOptions
from shardxform.formats.scheme import FORMATS, GGUF
from shardxform.plan.plan import Plan
from shardxform.plan.prune import plan_prune

if TYPE_CHECKING:
    from shardxform.checkpoint.table import Checkpoint
    from shardxform.cli.tuning import OnRay, Tuning

__all__ = ["prune_command"]


class _Containers(click.Choice[str]):
    """What OUT may be; of formats of integers, which others write, it says who does."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in FORMATS:
            also = "; in 16 bits mlx-lm takes what prune writes as it is" if value == "mlx" else ""
            self.fail(
                f"prune rounds no weights; `shardxform quantize --format {value}` prunes, heals and rounds in one"
                f" pass{also}",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File(options.GgufTypeFlags):
    format: Literal["safetensors", "gguf"] = options.option(
        "What OUT is: shards of safetensors, as SRC, or a file for llama.cpp.",
        default="safetensors",
        first=True,
        type=_Containers(["safetensors", GGUF]),
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
    asked: options.HealOnlyRequest,
    jobs: options.JobFlags,
    transfer: options.TransferFlags,
    cluster: options.RayFlags,
    family: options.FamilyFlags,
    output: options.WriteFlags,
) -> None:
    """Write OUT, a copy of SRC with only the routed experts that the manifest keeps.

    Expert tensors and router rows are sliced, per-expert tensors renumbered, the expert count in config.json is
    rewritten; everything else is copied byte for byte. With --heal, the values of what is left are tuned too; names,
    shapes and types are the same, unless --heal-encoding wants quantized weights in 16 bits. Interrupted, the same
    command goes on where it stopped.

    SRC may be a model in GGUF too, of any architecture and any type of blocks: a file, or the first of several.
    """
    if is_gguf(source):
        for group in (viewed, asked.rounding, asked.healing, asked.text, asked.computation, cluster, family):
            options.refuse_idle(group, wanted=f"safetensors, but {source} is GGUF")
        execute(_plan_gguf(source, out, pruned, file, transfer, output), out, output, RunOptions(jobs=jobs.count))
        return
    family.load()
    if pruned.manifest is None and not viewed.text_only and viewed.mtp != "drop":
        raise click.UsageError("nothing to do: give --manifest, --text-only or --mtp drop")
    refuse_nothing_pruned(asked.healing, asked.text, prunes=pruned.manifest is not None, ways="--manifest")
    ray = _on_ray(cluster, asked, jobs) if cluster.ray else None
    checkpoint = open_named(source, transfer, out.parent)
    kept = load_manifest(pruned, checkpoint)
    tuning = _tuning(asked, checkpoint)
    view = viewed.view(output, file.read(gguf=file.format == GGUF))
    plan = plan_prune(checkpoint, kept, view, tuning.recipe if tuning else None)
    if tuning is None:
        execute(plan, out, output, RunOptions(jobs=jobs.count), ray)
        return
    from shardxform.cli.tuning import open_tuner

    with open_tuner(tuning, checkpoint, plan) as tuner:
        execute(plan, out, output, RunOptions(jobs=jobs.count, tuner=tuner), told=tuning.windows.notes)


def _tuning(asked: options.HealOnlyRequest, checkpoint: Checkpoint) -> Tuning | None:
    """What is healed; most prunes only copy, and load nothing of it."""
    groups = (asked.rounding, asked.healing, asked.text, asked.computation)
    if not any(spelling for group in groups for spelling in options.given(group)):
        return None
    from shardxform.cli.tuning import read_tuning

    return read_tuning(asked, checkpoint)


def _on_ray(cluster: options.RayFlags, asked: options.HealOnlyRequest, jobs: options.JobFlags) -> OnRay | None:
    from shardxform.cli.tuning import on_ray

    return on_ray(cluster, asked.computation.device, jobs=jobs.jobs, healing=asked.healing)


def _plan_gguf(
    source: options.Source,
    out: Path,
    pruned: options.PruneFlags,
    file: _File,
    transfer: options.TransferFlags,
    output: options.WriteFlags,
) -> Plan:
    """Plan the pruning of a model in GGUF: into as many files as it has, unless a size was asked for.

    Raises:
        CheckpointError, FamilyError, ManifestError, PlanError: see `plan_prune_gguf`.

    """
    from shardxform.plan.slabs import plan_prune_gguf
    from shardxform.verification.gguf_names import refuse_unsound_source

    options.refuse_idle(file, "pre_tokenizer", "gguf_type", wanted=f"safetensors, but {source} is GGUF")
    asked = click.get_current_context().get_parameter_source("format") == ParameterSource.COMMANDLINE
    if asked and file.format != GGUF:
        raise click.UsageError(f"--format {file.format}: {source} is GGUF, and stays it")
    if pruned.manifest is None:
        raise click.UsageError("nothing to do: give --manifest")
    if out.suffix == GGUF_SUFFIX:
        raise click.UsageError(f"OUT is the folder that files are written into: name it {out.with_suffix('')}")
    model = open_gguf_named(source, transfer, out.parent)
    assert model is not None
    plan = plan_prune_gguf(model, load_gguf_manifest(pruned, model), output.max_shard_size)
    refuse_unsound_source(model)
    return plan
