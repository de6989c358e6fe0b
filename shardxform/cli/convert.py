"""`shardxform convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from shardxform.cli import options
from shardxform.cli.inputs import open_named
from shardxform.cli.outputs import execute
from shardxform.execution.runner import RunOptions
from shardxform.formats.scheme import FORMATS, GGUF, Format
from shardxform.formats.stored import HALF_DTYPES, Float
from shardxform.plan.convert import ConvertOptions, Target, plan_convert

__all__ = ["convert_command"]


_ALIASES: Final = {"bfloat16": "bf16", "float16": "fp16", "f16": "fp16"}


class _Format(click.Choice[str]):
    """A format; 16-bit types by any of their usual names."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(_ALIASES.get(str(value), value), param, ctx)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target(options.SpellingFlags):
    to: Format | Float = options.option(
        "Format of OUT; gguf is for llama.cpp; bf16 (bfloat16) and fp16 (float16) dequantize into the release's own "
        "layout, for MLX.",
        type=_Format([*FORMATS, GGUF, *HALF_DTYPES]),
        required=True,
        first=True,
    )


@options.command("convert")
@options.source_argument
@options.out_argument
def convert_command(
    source: options.Source,
    out: Path,
    target: _Target,
    file: options.GgufTypeFlags,
    jobs: options.JobFlags,
    hub: options.HubFlags,
    family: options.FamilyFlags,
    output: options.WriteFlags,
) -> None:
    """Write OUT, the quantized SRC in another format or expert spelling, without changing a weight; or any SRC as GGUF.

    Integers and scales are kept, only their arrangement and quantization_config change; tensors that are not quantized
    are copied byte for byte. Experts that SRC names experts.gate_up_proj.{id} become loadable. With --to bf16 or
    fp16 the weights are dequantized: fp16 holds every value of 4 bits whose scale is exact in bfloat16, as scales of
    quantize are, and bf16 rounds; families with gated delta-net layers run in bf16 alone.
    """
    family.load()
    checkpoint = open_named(source, hub, out.parent)
    wanted = Target(format=target.to, expert_names=target.expert_names, g_idx=target.g_idx)
    gguf = file.read(gguf=target.to == GGUF)
    settings = ConvertOptions(max_shard_bytes=output.shard_bytes(gguf=gguf is not None), gguf=gguf)
    plan = plan_convert(checkpoint, wanted, settings)
    execute(plan, out, output, RunOptions(jobs=jobs.count))
