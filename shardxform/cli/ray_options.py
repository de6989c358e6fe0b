"""`--ray`: the option, what does not go with it, and what it comes to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from shardxform.cli.console import count, gb
from shardxform.cluster.session import LOCAL, check_address
from shardxform.errors import PlanError, ShardxformError
from shardxform.model.layout import layout_of

if TYPE_CHECKING:
    from shardxform.checkpoint.table import Checkpoint
    from shardxform.cli.tune_options import Tuning
    from shardxform.cluster.blocks import BlockTuning
    from shardxform.execution.options import StepPool
    from shardxform.plan.plan import Plan

__all__ = ["OnRay", "block_tuning", "on_ray", "open_pool", "ray_facts", "ray_line", "ray_option", "ray_place"]


class _Address(click.ParamType[str]):
    """What `--ray` may be followed by; anything else was meant to be an argument."""

    name = "address"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return check_address(str(value))
        except ShardxformError as e:
            self.fail(str(e).removeprefix("--ray: "), param, ctx)


ray_option: Final = click.option(
    "--ray",
    metavar="[HOST:PORT|auto]",
    is_flag=False,
    flag_value=LOCAL,
    type=_Address(),
    help="Do the steps on a Ray cluster: at HOST:PORT; auto, the one that this machine belongs to; by itself, one of "
    "this machine alone. All machines share the file system of SRC and OUT. The bytes are the same.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnRay:
    """Where a plan's steps are to be done.

    Attributes:
        address: of the cluster.
        device: where weights are rounded or tuned.
        tuning: what blocks are tuned with.

    """

    address: str
    device: str
    tuning: BlockTuning | None = None


def on_ray(given: dict[str, Any], device: str, method: str | None = None) -> OnRay | None:
    """Take `--ray` out of `given`; None where it is not there.

    Raises:
        PlanError: an option that would do nothing with it, or something else; says what to do.

    """
    address = given.pop("ray")
    if not address:
        return None
    context = click.get_current_context(silent=True)
    if context and context.get_parameter_source("jobs") == ParameterSource.COMMANDLINE:
        raise PlanError("--jobs is for threads of this process; with --ray the cluster's CPUs decide")
    if given.get("heal") is not None:
        raise PlanError("--heal: a healed block is tuned on what the one before puts out; run it without --ray")
    if method == "auto-round" and given["inputs"] != "fp":
        raise PlanError("--ray needs --inputs fp: else a block is tuned on what the blocks before it put out")
    if given.get("blocks") is not None:
        raise PlanError("--blocks is for machines that know nothing of each other; --ray tunes all blocks")
    if device not in ("cpu", "cuda"):
        raise PlanError(f"--device {device}: with --ray expected cpu or cuda; which one of a machine's is up to Ray")
    return OnRay(address=address, device=device)


@contextlib.contextmanager
def open_pool(ray: OnRay | None) -> Iterator[StepPool | None]:
    """Where the steps are done; None for threads of this process. Ray starts when the run wants it."""
    if ray is None:
        yield None
        return
    from shardxform.cluster.pool import RayPool

    with RayPool(ray.address, ray.device, ray.tuning) as pool:
        yield pool


def block_tuning(plan: Plan, out: Path, view: Checkpoint, tuning: Tuning) -> BlockTuning:
    """What blocks are tuned with on a cluster."""
    from shardxform.cluster.blocks import BlockTuning
    from shardxform.cluster.worker import StepPlace
    from shardxform.plan.steps import TuneBlock

    device = str(tuning.precision.device)
    text = layout_of(view.config, view.tensors).text
    return BlockTuning(
        place=StepPlace.of(plan, out, device),
        view=replace(view, root=Path(os.path.abspath(view.root))),
        windows=tuning.windows,
        hidden=int(text["hidden_size"]),
        layers=tuple(step.layer for step in plan.steps if isinstance(step, TuneBlock)),
        device=device,
        dtype=tuning.recipe.dtype,
    )


def ray_facts(plan: Plan, ray: OnRay) -> dict[str, Any]:
    """What would be run on a cluster, without asking it; memory and disk in bytes."""
    from shardxform.cluster.pool import largest_of, refuse_remote

    refuse_remote(plan.origin, plan.remote)
    largest = largest_of(plan, ray.device)
    return {
        "address": ray.address,
        "tasks": len(plan.steps),
        "task_memory_bytes": largest.memory,
        "task_cpus": largest.cpus,
        "task_gpus": largest.gpus,
        **({"states_bytes": ray.tuning.work_bytes} if ray.tuning else {}),
    }


def ray_line(facts: Mapping[str, Any]) -> str:
    """The same for people."""
    each = f"{count(facts['task_cpus'], 'CPU')}{', 1 GPU' if facts['task_gpus'] else ''}"
    states = f"; {gb(facts['states_bytes'])} of hidden states in OUT" if "states_bytes" in facts else ""
    return (
        f"{count(facts['tasks'], 'task')} of {each} and up to {gb(facts['task_memory_bytes'])}, on"
        f" {ray_place(facts['address'])}{states}"
    )


def ray_place(address: str) -> str:
    """What people call a cluster."""
    return "this machine" if address == LOCAL else address
