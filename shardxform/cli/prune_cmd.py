"""`shardxform prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shardxform.cli.options import any_source_option, manifest_option, out_argument, run_options, view_options
from shardxform.cli.planned import execute, load_manifest
from shardxform.cli.ray_options import on_ray, ray_option
from shardxform.cli.sources import Source, open_given, source_argument, transfer_options
from shardxform.cli.tune_options import heal_options, open_tuner, read_tuning, refuse_unpruned
from shardxform.plan.prune import ViewOptions, plan_prune
from shardxform.plan.view import MtpMode

__all__ = ["command"]


@click.command("prune")
@source_argument
@out_argument
@manifest_option
@any_source_option
@click.option(
    "--device", default="cpu", show_default=True, help="Where to heal: cpu, or a torch device such as cuda:0."
)
@heal_options
@view_options
@transfer_options
@ray_option
@run_options
def command(
    source: Source,
    out: Path,
    manifest: Path | None,
    any_source: bool,
    text_only: bool,
    mtp: MtpMode,
    max_shard_size: int,
    device: str,
    **run: Any,  # noqa: ANN401
) -> None:
    """Write OUT, a copy of SRC with only the routed experts that the manifest keeps.

    Expert tensors and router rows are sliced, per-expert tensors renumbered, the expert count in config.json is
    rewritten; everything else is copied byte for byte. With --heal, the values of what is left are tuned too; names,
    shapes and types are the same. Interrupted, the same command goes on where it stopped.
    """
    if manifest is None and not text_only and mtp != "drop":
        raise click.UsageError("nothing to do: give --manifest, --text-only or --mtp drop")
    refuse_unpruned(run, manifest, "--manifest")
    ray = on_ray(run, device)
    (checkpoint,) = open_given([source], run, out.parent)
    options = ViewOptions(text_only=text_only, mtp=mtp, max_shard_bytes=max_shard_size)
    kept = load_manifest(manifest, checkpoint, any_source=any_source)
    tuning = read_tuning(None, checkpoint, device, run)
    plan = plan_prune(checkpoint, kept, options, tuning.recipe if tuning else None)
    if tuning is None:
        execute(plan, out, ray=ray, **run)
        return
    with open_tuner(tuning, checkpoint, kept, options, plan) as tuner:
        execute(plan, out, tuner=tuner, told=tuning.windows.notes, **run)
