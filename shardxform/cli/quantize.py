"""`shardxform quantize`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardxform.cli import options
from shardxform.cli.inputs import load_manifest, open_named, refuse_nothing_pruned
from shardxform.cli.outputs import execute
from shardxform.cli.tuning import block_tuning, on_ray, open_tuner, read_tuning, tunes
from shardxform.execution.runner import RunOptions
from shardxform.formats.scheme import GGUF
from shardxform.plan.quantize import plan_quantize

__all__ = ["quantize_command"]


@options.command("quantize")
@options.source_argument
@options.out_argument
def quantize_command(
    source: options.Source,
    out: Path,
    pruned: options.PruneFlags,
    viewed: options.ViewFlags,
    stored: options.SchemeFlags,
    file: options.GgufFlags,
    asked: options.TuneRequest,
    jobs: options.JobFlags,
    transfer: options.TransferFlags,
    cluster: options.RayFlags,
    family: options.FamilyFlags,
    output: options.WriteFlags,
) -> None:
    """Write OUT, SRC with its weights rounded to 4 or 8 bits; pruned by --manifest, and healed, in the same pass.

    Routed experts, shared experts and attention are quantized; routers, norms, embeddings, the output head, vision and
    MTP layers stay as they are. OUT loads in transformers, vLLM and SGLang; with --format gguf in llama.cpp.
    """
    family.load()
    rounding, device = asked.rounding, asked.computation.device
    refuse_nothing_pruned(asked.healing, asked.text, prunes=pruned.manifest is not None, ways="--manifest")
    ray = on_ray(cluster, device, jobs=jobs.jobs, healing=asked.healing, rounding=rounding)
    checkpoint = open_named(source, transfer, out.parent)
    tuning = read_tuning(asked, checkpoint, here=ray is None)
    kept = load_manifest(pruned, checkpoint)
    view = viewed.view(output, file.read(gguf=stored.format == GGUF))
    plan = plan_quantize(checkpoint, stored.read(tuned=tunes(rounding)), kept, view, tuning.recipe if tuning else None)
    settings = RunOptions(jobs=jobs.count)
    if tuning is None:
        execute(plan, out, output, replace(settings, device=device), ray)
        return
    settings, told = replace(settings, parts=rounding.join), tuning.windows.notes
    if ray:
        execute(plan, out, output, settings, replace(ray, tuning=block_tuning(plan, out, tuning)), told)
        return
    with open_tuner(tuning, checkpoint, plan, rounding.blocks) as tuner:
        execute(plan, out, output, replace(settings, tuner=tuner, blocks=rounding.blocks), told=told)
