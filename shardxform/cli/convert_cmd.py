"""`shardxform convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from shardxform.cli.options import expert_names_option, g_idx_option, out_argument, run_options, shard_size_option
from shardxform.cli.planned import execute
from shardxform.cli.sources import Source, connections_option, open_given, source_argument
from shardxform.formats.scheme import FORMATS, ExpertNames, Format
from shardxform.plan.convert import ConvertOptions, Target, plan_convert

__all__ = ["command"]


@click.command("convert")
@source_argument
@out_argument
@click.option(
    "--to",
    "format_",
    type=click.Choice([*FORMATS, "bf16"]),
    required=True,
    help="Format of OUT; bf16 dequantizes into the release's own layout, for llama.cpp and MLX.",
)
@expert_names_option
@g_idx_option
@shard_size_option
@connections_option
@run_options
def command(
    source: Source,
    out: Path,
    format_: Format | Literal["bf16"],
    expert_names: ExpertNames,
    g_idx: bool,
    max_shard_size: int,
    **run: Any,  # noqa: ANN401
) -> None:
    """Write OUT, the quantized SRC in another format or expert spelling, without changing a weight.

    Integers and scales are kept, only their arrangement and quantization_config change; tensors that are not quantized
    are copied byte for byte. Experts that SRC names experts.gate_up_proj.{id} become loadable. With --to bf16 the
    weights are dequantized.
    """
    (checkpoint,) = open_given([source], run, out.parent)
    target = Target(format=format_, expert_names=expert_names, g_idx=g_idx)
    execute(plan_convert(checkpoint, target, ConvertOptions(max_shard_bytes=max_shard_size)), out, **run)
