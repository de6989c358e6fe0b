"""Healing and tuned rounding as a command line asks for them, here or on a Ray cluster.

The options become the recipe of the plan, with its text read, and what carries the plan's steps out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardxform.ask.recipe import BATCH_SIZE, ITERS, Recipe, split_windows
from shardxform.cli import options
from shardxform.cli.console import count, gb
from shardxform.cli.inputs import load_text, make_precision, require
from shardxform.errors import PlanError, SchemeError
from shardxform.model.layout import layout_of

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.checkpoint.table import Checkpoint
    from shardxform.cluster.pool import BlockTuning
    from shardxform.cluster.session import Needs
    from shardxform.execution.runner import StepPool, StepTuner
    from shardxform.forward.weights import Precision
    from shardxform.plan.plan import Plan

__all__ = [
    "OnRay",
    "RayTasks",
    "Tuning",
    "block_tuning",
    "on_ray",
    "open_pool",
    "open_tuner",
    "ray_place",
    "ray_tasks",
    "read_tuning",
    "tunes",
]


# -- what to tune -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What was asked for, with its data read.

    Attributes:
        windows: calibration data.
        recipe: what the plan records.
        precision: device and type of the computation.

    """

    windows: Windows
    recipe: Recipe
    precision: Precision


def tunes(rounding: options.BatchFlags) -> bool:
    """Whether rounding is to be tuned."""
    return isinstance(rounding, options.RoundingFlags) and rounding.method == "auto-round"


def read_tuning(asked: options.HealRequest, source: Checkpoint, *, here: bool = True) -> Tuning | None:
    """Read the text and make the recipe; None when neither healing nor tuning is asked for.

    `here` says whether this machine is to compute, and must have the device.

    Raises:
        SchemeError: options that need another one.

    """
    rounding = asked.rounding if isinstance(asked.rounding, options.RoundingFlags) else options.RoundingFlags()
    heal = asked.healing.read(asked.rounding.batch_size)
    _refuse_idle(asked)
    if not tunes(asked.rounding) and heal is None:
        return None
    if rounding.blocks is not None and rounding.inputs != "fp":
        raise SchemeError("--blocks needs --inputs fp: else a block is tuned on what the blocks before it put out")
    windows = load_text(asked.text, source)
    samples, seed = int(windows.ids_NT.shape[0]), asked.text.read().seed
    if heal and heal.extra:
        from shardxform.calibration.windows import with_extra

        windows = with_extra(windows, heal.extra, split_windows(samples, seed)[0], source.root, seed)
    if heal and heal.merge:
        require("scipy")
    precision = make_precision(asked.computation, tunes=True, here=here)
    recipe = Recipe(
        windows=windows.fingerprint,
        data=windows.provenance,
        samples=samples,
        seqlen=int(windows.ids_NT.shape[1]),
        iters=(rounding.iters or ITERS) if tunes(asked.rounding) else 0,
        lr=rounding.lr,
        minmax_lr=rounding.minmax_lr,
        batch_size=asked.rounding.batch_size or BATCH_SIZE,
        seed=seed,
        inputs=rounding.inputs or "quantized",
        device=precision.device.type,
        dtype=str(precision.dtype).removeprefix("torch."),
        heal=heal,
    )
    return Tuning(windows=windows, recipe=recipe, precision=precision)


def _refuse_idle(asked: options.HealRequest) -> None:
    """Refuse options that need another one.

    Raises:
        SchemeError: names both.

    """
    rounding, healing, refuse = asked.rounding, asked.healing, options.refuse_idle
    rounds, wanted = isinstance(rounding, options.RoundingFlags), "--heal or --merge, neither of which is given"
    if tunes(rounding):
        return
    if rounds:
        wanted = "--method auto-round, but the method is rtn"
        refuse(rounding, "iters", "lr", "minmax_lr", "inputs", "blocks", "join", wanted=wanted)
    if not healing.asked and not healing.none:
        refuse(rounding, "batch_size", wanted=wanted)
        refuse(asked.computation, "dtype", wanted=wanted)
        refuse(asked.text, wanted=wanted)
        if not rounds:  # rounding has a device too
            refuse(asked.computation, "device", wanted=wanted)


@contextlib.contextmanager
def open_tuner(tuning: Tuning, source: Checkpoint, plan: Plan, blocks: range | None = None) -> Iterator[StepTuner]:
    """Make the tuner of a plan.

    Raises:
        SchemeError: `blocks` that the plan does not tune.

    """
    import torch

    from shardxform.tuning.session import Tuner, TunerOptions

    layers = _layers(plan)
    if blocks is not None and (not layers or blocks[-1] > layers[-1]):
        raise SchemeError(f"--blocks: there is no block {blocks[-1]} to tune; the last one is {layers[-1]}")
    settings = TunerOptions(precision=tuning.precision, threads=torch.get_num_threads())
    original = source if tuning.recipe.heal else None
    with Tuner(plan.view, tuning.windows, layers, settings, original) as tuner:
        yield tuner


def _layers(plan: Plan) -> list[int]:
    """Decoder blocks that a plan tunes."""
    from shardxform.plan.steps import TuneBlock

    return [step.layer for step in plan.steps if isinstance(step, TuneBlock)]


# -- on a cluster -----------------------------------------------------------------------------------------------------


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


def on_ray(
    cluster: options.RayFlags,
    device: str,
    *,
    jobs: int | None = None,
    healing: options.HealFlags | None = None,
    rounding: options.RoundingFlags | None = None,
) -> OnRay | None:
    """Say where steps are to be done; None without --ray.

    Raises:
        PlanError: an option that would do nothing with it, or something else; says what to do.

    """
    if not cluster.ray:
        return None
    if jobs is not None:
        raise PlanError("--jobs is for threads of this process; with --ray the cluster's CPUs decide")
    if healing and healing.asked:
        what = "--merge" if healing.heal is None else "--heal"
        raise PlanError(f"{what}: a block is changed by what the one before puts out; run it without --ray")
    if rounding and rounding.method == "auto-round" and rounding.inputs != "fp":
        raise PlanError("--ray needs --inputs fp: else a block is tuned on what the blocks before it put out")
    if rounding and rounding.blocks is not None:
        raise PlanError("--blocks is for machines that know nothing of each other; --ray tunes all blocks")
    if device not in ("cpu", "cuda"):
        raise PlanError(f"--device {device}: with --ray expected cpu or cuda; which one of a machine's is up to Ray")
    return OnRay(address=cluster.ray, device=device)


@contextlib.contextmanager
def open_pool(ray: OnRay | None) -> Iterator[StepPool | None]:
    """Where the steps are done; None for threads of this process. Ray starts when the run wants it."""
    if ray is None:
        yield None
        return
    from shardxform.cluster.pool import RayPool

    with RayPool(ray.address, ray.device, ray.tuning) as pool:
        yield pool


def block_tuning(plan: Plan, out: Path, tuning: Tuning) -> BlockTuning:
    """What blocks are tuned with on a cluster."""
    from shardxform.cluster.pool import BlockTuning
    from shardxform.cluster.worker import StepPlace

    view, device = plan.view, str(tuning.precision.device)
    return BlockTuning(
        place=StepPlace.of(plan, out, device),
        view=replace(view, root=Path(os.path.abspath(view.root))),
        windows=tuning.windows,
        hidden=int(layout_of(view.config, view.tensors).text["hidden_size"]),
        layers=tuple(_layers(plan)),
        device=device,
        dtype=tuning.recipe.dtype,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RayTasks:
    """What would be run on a cluster; sizes in bytes.

    Attributes:
        address: of the cluster.
        tasks: how many.
        largest: what the largest of them is promised.
        states_bytes: disk that hidden states take; None where nothing is tuned.

    """

    address: str
    tasks: int
    largest: Needs
    states_bytes: int | None

    @property
    def line(self) -> str:
        """The same for people."""
        each = f"{count(self.largest.cpus, 'CPU')}{', 1 GPU' if self.largest.gpus else ''}"
        states = "" if self.states_bytes is None else f"; {gb(self.states_bytes)} of hidden states in OUT"
        where = ray_place(self.address)
        return f"{count(self.tasks, 'task')} of {each} and up to {gb(self.largest.memory)}, on {where}{states}"

    def to_dict(self) -> dict[str, object]:
        """Plain data for `--json`."""
        return {
            "address": self.address,
            "tasks": self.tasks,
            "task_memory_bytes": self.largest.memory,
            "task_cpus": self.largest.cpus,
            "task_gpus": self.largest.gpus,
            **({} if self.states_bytes is None else {"states_bytes": self.states_bytes}),
        }


def ray_tasks(plan: Plan, ray: OnRay) -> RayTasks:
    """What would be run on a cluster, without asking it."""
    from shardxform.cluster.pool import largest_of, refuse_remote

    refuse_remote(plan.origin, plan.remote)
    states = ray.tuning.work_bytes if ray.tuning else None
    largest = largest_of(plan, ray.device)
    return RayTasks(address=ray.address, tasks=len(plan.steps), largest=largest, states_bytes=states)


def ray_place(address: str) -> str:
    """What people call a cluster."""
    return "this machine" if address == "local" else address
