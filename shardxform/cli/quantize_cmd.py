"""`shardxform quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shardxform.checkpoint import Checkpoint
from shardxform.cli.options import (
    expert_names_option,
    g_idx_option,
    manifest_option,
    out_argument,
    run_options,
    source_argument,
    view_options,
)
from shardxform.cli.planned import execute, load_manifest
from shardxform.cli.tune_options import heal_options, open_tuner, read_tuning, tune_options
from shardxform.prune import ViewOptions
from shardxform.quantize.grid import Grid, ScaleGrid
from shardxform.quantize.planner import plan_quantize
from shardxform.scheme import FORMATS, PRESETS, ExpertNames, Format, Scheme
from shardxform.view import MtpMode

__all__ = ["command"]


@click.command("quantize")
@source_argument
@out_argument
@manifest_option
@click.option(
    "--scheme", type=click.Choice(list(PRESETS)), default="W4A16", show_default=True, help="Bits of the weights."
)
@click.option(
    "--group-size",
    type=click.Choice(["128", "64", "32", "-1"]),
    default="128",
    show_default=True,
    help="Input columns that share a scale; -1 for one scale per row.",
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "auto-round"]),
    default="rtn",
    show_default=True,
    help="rtn: round to nearest, without data. auto-round: tune the rounding of each block on calibration data, "
    "--data or --preset.",
)
@click.option(
    "--search/--no-search",
    default=None,
    help="Search each group's scale for the least squared weight error; helps at 4 bits, not at 8.  [default: with "
    "auto-round, as its start]",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(FORMATS)),
    default="auto-round",
    show_default=True,
    help="How clients find the weights.",
)
@click.option(
    "--scale-grid",
    type=click.Choice(["fp16", "bf16"]),
    default="bf16",
    show_default=True,
    help="bf16: scales exact in bfloat16 and float16, so that every client computes the same; fp16: auto-round's.",
)
@expert_names_option
@g_idx_option
@click.option(
    "--keep-16bit", metavar="PATTERN", multiple=True, help="Leave modules that match as they are; repeatable."
)
@click.option(
    "--quantize",
    "quantize_",
    metavar="PATTERN",
    multiple=True,
    help="Quantize modules that match although they would stay as they are; repeatable.",
)
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
@run_options
def command(
    source: Path,
    out: Path,
    manifest: Path | None,
    scheme: str,
    group_size: str,
    method: str,
    search: bool | None,
    format_: Format,
    scale_grid: ScaleGrid,
    expert_names: ExpertNames,
    g_idx: bool,
    keep_16bit: tuple[str, ...],
    quantize_: tuple[str, ...],
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
    checkpoint = Checkpoint.open(source)
    tuning = read_tuning(method, source, device, run)
    searches = method == "auto-round" if search is None else search
    grid = Grid(bits=PRESETS[scheme], group_size=int(group_size), scale_grid=scale_grid, search=searches)
    chosen = Scheme(
        grid=grid,
        format=format_,
        expert_names=expert_names,
        g_idx=g_idx,
        keep_16bit=keep_16bit,
        quantize=quantize_,
    )
    options = ViewOptions(text_only=text_only, mtp=mtp, max_shard_bytes=max_shard_size)
    kept = load_manifest(manifest, checkpoint)
    plan = plan_quantize(checkpoint, chosen, kept, options, tuning.recipe if tuning else None)
    if tuning is None or run["dry_run"]:
        execute(plan, out, device=device, **run)
        return
    with open_tuner(tuning, checkpoint, kept, options, plan) as tuner:
        execute(plan, out, tuner=tuner, blocks=tuning.blocks, parts=tuning.parts, **run)
