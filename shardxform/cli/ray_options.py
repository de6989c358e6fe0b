"""`--ray`: the option, what does not go with it, and what it comes to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from shardxform.cli.console import count, gb
from shardxform.cluster.session import LOCAL, check_address
from shardxform.errors import PlanError, ShardxformError

if TYPE_CHECKING:
    from shardxform.plan import Plan
    from shardxform.run_options import StepPool

__all__ = ["open_pool", "ray_facts", "ray_line", "ray_option", "refuse_beside_ray"]


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


def refuse_beside_ray(given: Mapping[str, Any], device: str = "cpu") -> None:
    """Refuse options that would do nothing, or something else, with `--ray`.

    Raises:
        PlanError: names the option and says what to do.

    """
    if not given.get("ray"):
        return
    context = click.get_current_context(silent=True)
    if context and context.get_parameter_source("jobs") == ParameterSource.COMMANDLINE:
        raise PlanError("--jobs is for threads of this process; with --ray the cluster's CPUs decide")
    if given.get("heal") is not None:
        raise PlanError("--heal: a healed block is tuned on what the one before puts out; run it without --ray")
    if given.get("blocks") is not None:
        raise PlanError("--blocks is for machines that know nothing of each other; --ray tunes all blocks")
    if device not in ("cpu", "cuda"):
        raise PlanError(f"--device {device}: with --ray expected cpu or cuda; which one of a machine's is up to Ray")


@contextlib.contextmanager
def open_pool(address: str | None, device: str) -> Iterator[StepPool | None]:
    """Where the steps are done; None for threads of this process. Ray starts when the run wants it."""
    if address is None:
        yield None
        return
    from shardxform.cluster.pool import RayPool

    with RayPool(address, device) as pool:
        yield pool


def ray_facts(plan: Plan, address: str, device: str) -> dict[str, Any]:
    """What would be run on a cluster, without asking it; memory in bytes."""
    from shardxform.cluster.pool import needs_of, refuse_remote

    refuse_remote(plan)
    needs = [needs_of(step, device) for step in plan.steps]
    largest = max(needs, key=lambda each: each.memory)
    return {
        "address": address,
        "tasks": len(needs),
        "task_memory_bytes": largest.memory,
        "task_cpus": largest.cpus,
        "task_gpus": largest.gpus,
    }


def ray_line(facts: Mapping[str, Any]) -> str:
    """The same for people."""
    where = "this machine" if facts["address"] == LOCAL else facts["address"]
    each = f"{count(facts['task_cpus'], 'CPU')}{', 1 GPU' if facts['task_gpus'] else ''}"
    return f"{count(facts['tasks'], 'task')} of {each} and up to {gb(facts['task_memory_bytes'])}, on {where}"
