"""`shardxform convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardxform.cli import options
from shardxform.cli.inputs import open_source
from shardxform.cli.outputs import execute
from shardxform.execution.options import RunOptions
from shardxform.plan.convert import ConvertOptions, Target, plan_convert

__all__ = ["convert_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target(options.SpellingFlags):
    to: Literal["auto-round", "gptq", "compressed-tensors", "bf16"] = options.option(
        "Format of OUT; bf16 dequantizes into the release's own layout, for llama.cpp and MLX.",
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
    jobs: options.JobFlags,
    hub: options.HubFlags,
    output: options.WriteFlags,
) -> None:
    """Write OUT, the quantized SRC in another format or expert spelling, without changing a weight.

    Integers and scales are kept, only their arrangement and quantization_config change; tensors that are not quantized
    are copied byte for byte. Experts that SRC names experts.gate_up_proj.{id} become loadable. With --to bf16 the
    weights are dequantized.
    """
    checkpoint = open_source(source, hub, out.parent)
    wanted = Target(format=target.to, expert_names=target.expert_names, g_idx=target.g_idx)
    plan = plan_convert(checkpoint, wanted, ConvertOptions(max_shard_bytes=output.max_shard_size))
    execute(plan, out, output, RunOptions(jobs=jobs.count))
