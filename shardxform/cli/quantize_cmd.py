"""`shardxform quantize`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from shardxform.cli.options import (
    any_source_option,
    manifest_option,
    out_argument,
    read_scheme,
    run_options,
    scheme_options,
    view_options,
)
from shardxform.cli.planned import execute, load_manifest
from shardxform.cli.ray_options import block_tuning, on_ray, ray_option
from shardxform.cli.sources import Source, open_given, source_argument, transfer_options
from shardxform.cli.tune_options import heal_options, open_tuner, read_tuning, refuse_unpruned, tune_options
from shardxform.plan.prune import ViewOptions
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import MtpMode, pruned_view

__all__ = ["command"]


@click.command("quantize")
@source_argument
@out_argument
@manifest_option
@any_source_option
@click.option(
    "--method",
    type=click.Choice(["rtn", "auto-round"]),
    default="rtn",
    show_default=True,
    help="rtn: round to nearest, without data. auto-round: tune the rounding of each block on calibration data, "
    "--data or --preset.",
)
@scheme_options
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where to round or tune: cpu, or a torch device such as cuda:0. Rounding gives the same bits everywhere; "
    "--search runs on the CPU only.",
)
@tune_options
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
    method: str,
    text_only: bool,
    mtp: MtpMode,
    max_shard_size: int,
    device: str,
    **run: Any,  # noqa: ANN401
) -> None:
    """Write OUT, SRC with its weights rounded to 4 or 8 bits; pruned by --manifest, and healed, in the same pass.

    Routed experts, shared experts and attention are quantized; routers, norms, embeddings, the output head, vision and
    MTP layers stay as they are. OUT loads in transformers, vLLM and SGLang.
    """
    refuse_unpruned(run, manifest, "--manifest")
    ray = on_ray(run, device, method)
    (checkpoint,) = open_given([source], run, out.parent)
    tuning = read_tuning(method, checkpoint, device, run, here=ray is None)
    chosen = read_scheme(run, tuned=method == "auto-round")
    options = ViewOptions(text_only=text_only, mtp=mtp, max_shard_bytes=max_shard_size)
    kept = load_manifest(manifest, checkpoint, any_source=any_source)
    plan = plan_quantize(checkpoint, chosen, kept, options, tuning.recipe if tuning else None)
    if ray and tuning:
        view = pruned_view(checkpoint, kept, text_only=text_only, mtp=mtp).checkpoint
        ray = replace(ray, tuning=block_tuning(plan, out, view, tuning))
        execute(plan, out, ray=ray, parts=tuning.parts, told=tuning.windows.notes, **run)
        return
    if tuning is None:
        execute(plan, out, device=device, ray=ray, **run)
        return
    with open_tuner(tuning, checkpoint, kept, options, plan) as tuner:
        told = tuning.windows.notes
        execute(plan, out, tuner=tuner, blocks=tuning.blocks, parts=tuning.parts, told=told, **run)
