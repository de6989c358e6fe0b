"""`shardxform convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from shardxform.cli.options import expert_names_option, g_idx_option, out_argument, run_options, shard_size_option
from shardxform.cli.planned import execute
from shardxform.cli.sources import Source, connections_option, open_given, source_argument
from shardxform.formats.scheme import FORMATS, ExpertNames, Format
from shardxform.plan.convert import FLOATS, ConvertOptions, Float, Target, plan_convert

__all__ = ["command"]


_ALIASES: Final = {"bfloat16": "bf16", "float16": "fp16", "f16": "fp16"}


class _Target(click.Choice[str]):
    """A format; 16-bit types by any of their usual names."""

    def __init__(self) -> None:
        super().__init__([*FORMATS, *FLOATS])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ANN401
        return super().convert(_ALIASES.get(value, value), param, ctx)


@click.command("convert")
@source_argument
@out_argument
@click.option(
    "--to",
    "format_",
    type=_Target(),
    required=True,
    help="Format of OUT; bf16 (bfloat16) and fp16 (float16) dequantize into the release's own layout, for llama.cpp"
    " and MLX.",
)
@expert_names_option
@g_idx_option
@shard_size_option
@connections_option
@run_options
def command(
    source: Source,
    out: Path,
    format_: Format | Float,
    expert_names: ExpertNames,
    g_idx: bool,
    max_shard_size: int,
    **run: Any,  # noqa: ANN401
) -> None:
    """Write OUT, the quantized SRC in another format or expert spelling, without changing a weight.

    Integers and scales are kept, only their arrangement and quantization_config change; tensors that are not quantized
    are copied byte for byte. Experts that SRC names experts.gate_up_proj.{id} become loadable. With --to bf16 or
    fp16 the weights are dequantized: fp16 holds every value of 4 bits whose scale is exact in bfloat16, as scales of
    quantize are, and bf16 rounds; families with gated delta-net layers run in bf16 alone.
    """
    (checkpoint,) = open_given([source], run, out.parent)
    target = Target(format=format_, expert_names=expert_names, g_idx=g_idx)
    execute(plan_convert(checkpoint, target, ConvertOptions(max_shard_bytes=max_shard_size)), out, **run)
