"""`shardxform score`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardxform.base.progress import peak_rss_bytes
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import options
from shardxform.cli.console import count, gb, pasteable, print_json, progress, rows, say, short
from shardxform.cli.inputs import load_text, make_precision, open_named, refuse_no_data, refuse_unwritable
from shardxform.cli.tuning import OnRay, on_ray, ray_place
from shardxform.errors import OutputError

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.experts import Saliency
    from shardxform.experts.scoring import ScoreOptions

__all__ = ["score_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output(options.DryFlags):
    channels: bool = options.option(
        "Also say what each channel of every expert gives to its output, for `select --width`; the file grows with "
        "their number.",
        default=False,
    )
    out: Path = options.option(
        "Saliency file to write, such as saliency.safetensors.",
        "--out",
        "-o",
        metavar="FILE",
        required=True,
        first=True,
    )


@options.command("score")
@options.source_argument
def score_command(
    source: options.Source,
    text: options.TextFlags,
    computation: options.ComputeFlags,
    place: options.WorkFlags,
    transfer: options.TransferFlags,
    cluster: options.RayFlags,
    family: options.FamilyFlags,
    output: _Output,
) -> None:
    """Run SRC over calibration data, block by block, and write what every routed expert did.

    Counts and sums are stored, so that `select` makes any criterion of them, REAP first, and `saliency add` joins runs.
    Hidden states lie in FILE.work meanwhile; interrupted, the same command goes on after the last finished block.
    """
    family.load()
    refuse_no_data(text)
    refuse_unwritable(output.out)
    ray = on_ray(cluster, computation.device)
    if ray and output.channels:
        raise click.UsageError("--channels is not scored on a cluster: leave out --ray")
    checkpoint = open_named(source, transfer, output.out.parent)
    work = place.work or output.out.with_name(output.out.name + ".work")
    _refuse_overlap(output.out, work)
    precision = make_precision(computation, here=ray is None)
    from shardxform.experts.scoring import ScoreOptions
    from shardxform.forward.work import refuse_inside

    for path in (output.out, work):
        refuse_inside(path, [checkpoint.root])
    windows = load_text(text, checkpoint)
    settings = ScoreOptions(precision=precision, work=work, channels=output.channels)
    existing = _existing(output.out, checkpoint, windows, settings)
    if output.dry_run:
        _show(_facts(checkpoint, windows, settings, ray), output.out, work, output.as_json)
        return
    run, remove = _ways(ray)
    if existing is None:
        with progress("score", output.quiet) as settings.on_progress:
            existing = run(checkpoint, windows, settings)
        existing.save(output.out)
        outcome = "complete and durable"
    else:
        outcome = "already complete, made from the same inputs; nothing written"
    remove(checkpoint, windows, settings)
    _report(existing, windows, output.out, outcome, output.as_json)


def _ways(ray: OnRay | None) -> tuple[Callable[..., Saliency], Callable[..., None]]:
    """How to score, and how to remove what that left: here, or on a cluster."""
    from shardxform.experts.scoring import remove_work, score

    if ray is None:
        return score, remove_work
    from shardxform.cluster.scoring import remove_split, score_split

    return partial(score_split, address=ray.address), remove_split


def _refuse_overlap(output: Path, work: Path) -> None:
    """Refuse a result that would lie in the work directory, or in the way of it."""
    file, folder = (Path(os.path.realpath(path)) for path in (output, work))
    if file == folder or file in folder.parents or folder in file.parents:
        raise OutputError(f"{output}: is in the way of the work directory {work}; name another with --work")


def _existing(output: Path, checkpoint: Checkpoint, windows: Windows, settings: ScoreOptions) -> Saliency | None:
    """What an earlier run of the same command wrote; refuses any other file."""
    from shardxform.experts import Saliency
    from shardxform.experts.scoring import difference_of_runs

    if not os.path.lexists(output):
        return None
    found = Saliency.load(output)
    if where := difference_of_runs(found, checkpoint, windows, settings):
        raise OutputError(f"{output}: holds a saliency of another run: {where}; name a file that does not exist yet")
    return found


def _facts(checkpoint: Checkpoint, windows: Windows, settings: ScoreOptions, ray: OnRay | None) -> dict[str, Any]:
    """What would be run, and what it takes; sizes in bytes."""
    from shardxform.forward.passes import estimate

    needs = estimate({"scored": checkpoint}, windows, settings.precision, settings.work)
    told = {"data": dict(windows.provenance), "notes": list(windows.notes), "windows": len(windows.ids_NT)}
    facts = {"source": checkpoint.where, **told, **needs}
    if ray:
        from shardxform.cluster.pool import refuse_remote

        refuse_remote(checkpoint.where, checkpoint.remote)
        memory, gpus = needs["peak_memory_bytes"], int(settings.precision.device.type != "cpu")
        facts["ray"] = {"address": ray.address, "task_memory_bytes": memory, "task_cpus": 1, "task_gpus": gpus}
    return facts


def _show(facts: dict[str, Any], output: Path, work: Path, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(output), **facts})
        return
    say(f"score {facts['source']} -> {output}  (dry run: nothing is written)")
    ray = facts.get("ray")
    rows(
        [
            ("data", f"{count(facts['windows'], 'window')}, {short(facts['tokens'])} tokens"),
            ("blocks", f"{facts['blocks']}, in {facts['dtype']} on {facts['device']}"),
            ("reads", f"up to {gb(facts['read_bytes'])}, once{' for each task' if ray else ''}"),
            ("memory", f"about {gb(facts['peak_memory_bytes'])}{' a task' if ray else ''}"),
            *([("ray", f"as many tasks of 1 CPU as run at once, on {ray_place(ray['address'])}")] if ray else []),
            ("work", f"{gb(facts['work_bytes'])} of {gb(facts['free_disk_bytes'])} free in {work}"),
        ]
    )


def _report(saliency: Saliency, windows: Windows, output: Path, outcome: str, as_json: bool) -> None:
    layers = [*saliency.layers.values(), *saliency.mtp_layers.values()]
    unreached = [int(stats.unreached.sum()) for stats in layers]
    if as_json:
        print_json(
            {
                "output": str(output),
                "model": dict(saliency.model),
                "tokens": saliency.tokens,
                "layers": len(saliency.layers),
                "mtp_layers": len(saliency.mtp_layers),
                "never_reached": unreached,
                "runs": [dict(run) for run in saliency.runs],
                "notes": list(windows.notes),
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
        return
    say(f"{output}: {outcome}")
    half = saliency.num_experts // 2
    scored = count(len(saliency.layers), "layer")
    mtp = f" and {count(len(saliency.mtp_layers), 'MTP layer')}" if saliency.mtp_layers else ""
    rows(
        [
            ("scored", f"{scored}{mtp} of {saliency.num_experts} experts, {saliency.tokens:,} tokens"),
            ("never reached", count(sum(unreached), "expert") if any(unreached) else "no expert"),
            ("memory", f"{gb(peak_rss_bytes())} peak"),
            (
                "go on",
                pasteable("shardxform", "select", output, "--keep", half, "-o", "keep.json"),
            ),
        ]
    )
