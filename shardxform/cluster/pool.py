"""The steps of a plan as tasks of a Ray cluster: a pool for `runner.run`, which keeps the only journal.

At most two steps a slot are handed over; Ray places them by the memory and the CPUs that each declares. Steps are not
tied to machines: every byte of the source is read once, so no machine is nearer to it than another.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from shardxform.base import computing
from shardxform.base.digests import Chunks
from shardxform.base.file_system import FileSystem
from shardxform.calibration.options import Windows
from shardxform.checkpoint.table import Checkpoint
from shardxform.cluster.session import Needs, Session
from shardxform.cluster.worker import (
    Outcome,
    StepPlace,
    do_step,
    ignore,
    opened_targets,
    refuse_other_source,
    refuse_other_version,
    reporting,
    with_digests,
)
from shardxform.errors import ExecutionError, PlanError
from shardxform.execution.output import Output
from shardxform.execution.steps import Facts
from shardxform.plan.plan import Copy, Plan, Remake, Step, step_tokens

if TYPE_CHECKING:
    from shardxform.forward.weights import Precision
    from shardxform.plan.steps import TuneBlock
    from shardxform.tuning.session import Tuner

__all__ = ["BlockTuning", "RayPool", "do_block", "make_states", "needs_of", "precision_of", "refuse_remote"]

# -- blocks ------------------------------------------------------------------------------------------------------------
# What workers do to tune blocks side by side: the states around each made once, by a chain of tasks; then the block.
#
# States are files in the work directory of the output, one for each block that is entered. A task that makes them
# comes after the one that made those before, and a block is tuned after both that it reads: Ray keeps that order. A
# file that is whole is not made again, so that a chain that broke goes on from where it was.

_WIDTHS: Final = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTuning:
    """What all blocks of a plan are tuned with.

    Attributes:
        place: where that is.
        view: what is written; its root is absolute.
        windows: calibration data.
        hidden: channels of a hidden state.
        layers: decoder blocks that have a step.
        device, dtype: of the computation, as torch names them.

    """

    place: StepPlace
    view: Checkpoint
    windows: Windows
    hidden: int
    layers: tuple[int, ...]
    device: str
    dtype: str

    @property
    def state_bytes(self) -> int:
        """Disk that the states that enter one block take."""
        count, length = self.windows.ids_NT.shape
        return int(count * length) * self.hidden * _WIDTHS[self.dtype]

    @property
    def work_bytes(self) -> int:
        """Disk that those between all blocks take, from the embeddings to what leaves the last that is tuned."""
        return (max(self.layers) + 2) * self.state_bytes

    def has_states(self, number: int) -> bool:
        """Whether the states that enter block `number` are on disk."""
        from shardxform.tuning.session import states_file

        path = states_file(self.place.states, number)
        return path.is_file() and path.stat().st_size == self.state_bytes


@reporting
def make_states(wanted: Mapping[str, str], tuning: bytes, number: int, before: Outcome[None] | None) -> None:
    """Make the states that enter block `number`.

    Args:
        wanted: see `refuse_other_version`.
        tuning: a pickled `BlockTuning`.
        number: of the block.
        before: what came of making the states that enter the block before; None where they are there.

    Raises:
        ExecutionError: another version, plan or source; activations that are not finite.

    """
    refuse_other_version(wanted)
    _refuse_failed(before)
    given: BlockTuning = pickle.loads(tuning)  # noqa: S301 - the driver's own
    planned = given.place.record().inputs["source"]["shards"]
    refuse_other_source(given.place.source, planned, planned)
    with _tuner(given) as tuner:
        FileSystem().mkdir(given.place.states)
        tuner.make_states(number, given.place.states)


@reporting
def do_block(
    wanted: Mapping[str, str],
    tuning: bytes,
    step: bytes,
    entering: Outcome[None] | None,
    leaving: Outcome[None] | None,
) -> Facts:
    """Tune a block and make its bytes durable; raises like `make_states`, whose results it comes after."""
    refuse_other_version(wanted)
    _refuse_failed(entering, leaving)
    given: BlockTuning = pickle.loads(tuning)  # noqa: S301 - the driver's own
    (todo, chunks), fs = pickle.loads(step), FileSystem()  # noqa: S301
    with opened_targets(given.place, todo, fs) as targets, _tuner(given) as tuner:
        facts = tuner.tune(todo, given.place.states, targets.target, fs, ignore, ignore)
    return with_digests(facts, given.place, chunks, fs)


def _refuse_failed(*outcomes: Outcome[None] | None) -> None:
    """Fail as what came before failed."""
    for outcome in outcomes:
        if outcome and outcome[1]:
            raise outcome[1]


@contextlib.contextmanager
def _tuner(given: BlockTuning) -> Iterator[Tuner]:
    import torch

    from shardxform.tuning.session import Tuner, TunerOptions

    options = TunerOptions(
        precision=precision_of(given.device, given.dtype), threads=torch.get_num_threads(), stored=True
    )
    with Tuner(given.view, given.windows, given.layers, options) as tuner:
        yield tuner


def precision_of(device: str, dtype: str) -> Precision:
    """Device and type of a computation on this machine.

    Raises:
        ExecutionError: there is no such device here.

    """
    import torch
    from transformers.utils import logging

    from shardxform.forward.weights import Precision

    vars(logging)["disable_progress_bar"]()
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as e:
        raise ExecutionError(f"worker on {socket.gethostname()}: `device` {device}: {str(e).splitlines()[0]}") from e
    return Precision(torch.device(device), getattr(torch, dtype))


# -- pool --------------------------------------------------------------------------------------------------------------

_WORKER_BYTES: Final = 240 << 20  # a worker's process: interpreter, ray, numpy, compiled kernels; measured 238 MB


def refuse_remote(origin: str, remote: object) -> None:
    """Refuse a source on the hub: what is fetched of it lies on one machine.

    Raises:
        PlanError: names the source.

    """
    if remote:
        raise PlanError(f"`ray`: {origin} is on the hub; expected a folder that all machines of the cluster share")


def needs_of(step: Step, device: str = "cpu") -> Needs:
    """What a step is promised: its memory, a CPU, and a GPU where that computes."""
    process = 0 if step_tokens(step) else _WORKER_BYTES  # the memory of a tuned block is all there is of it
    computes = device != "cpu" and not isinstance(step, (Copy, Remake))
    return Needs(memory=step.peak_bytes + process, gpus=int(computes))


class RayPool:
    """A `StepPool` on a cluster; use as a context manager."""

    def __init__(self, address: str, device: str = "cpu", tuning: BlockTuning | None = None) -> None:
        self._session = Session(address)
        self._device, self._tuning = device, tuning
        self._wanted = computing.of_rounding()
        self._place = b""
        self._chunks: Chunks | None = None
        self._largest = Needs(memory=0)
        self._tuned_with: Any = None
        self._states: dict[int, Any] = {}

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.__exit__()

    @property
    def work_bytes(self) -> int:
        """Disk that the states between blocks take."""
        return self._tuning.work_bytes if self._tuning else 0

    def begin(self, output: Output) -> None:
        """Connect, and refuse what no machine of the cluster can do."""
        refuse_remote(output.plan.origin, output.plan.remote)
        self._session.open()
        self._chunks = output.plan.chunks
        self._place = pickle.dumps(StepPlace.of(output.plan, output.root, self._device))
        self._largest = largest_of(output.plan, self._device)
        self._session.refuse_too_large(self._largest)
        if self._tuning:
            self._wanted = computing.shared(self._tuning.device)
            self._tuned_with = self._session.put(pickle.dumps(self._tuning))

    @property
    def ahead(self) -> int:
        """Two steps a slot: one that runs, one that follows at once."""
        return 2 * max(1, self._session.slots(self._largest))

    def submit(self, step: Step) -> Future[Facts]:
        """Have a step done by some worker."""
        needs = needs_of(step, self._device)
        if step_tokens(step):
            return self._session.future(self._submit_block(cast("TuneBlock", step), needs))
        return self._session.future(self._session.submit(do_step, needs, self._wanted, self._place, self._packed(step)))

    def stop(self) -> None:
        """Cancel what is not done."""
        self._session.stop()

    def _submit_block(self, step: TuneBlock, needs: Needs) -> Any:  # noqa: ANN401
        from shardxform.cluster.pool import do_block

        if self._tuning is None:
            raise ExecutionError("the plan tunes blocks, but the pool has nothing to tune them with")
        states = (self._made(number, needs) for number in (step.layer, step.layer + 1))
        return self._session.submit(do_block, needs, self._wanted, self._tuned_with, self._packed(step), *states)

    def _packed(self, step: Step) -> bytes:
        """A step as it is handed over, with the chunks that it writes."""
        assert self._chunks is not None
        return pickle.dumps((step, self._chunks.of(step.writes)))

    def _made(self, number: int, needs: Needs) -> Any:  # noqa: ANN401
        """What the states that enter block `number` come of: a task, after the one of the block before, or None."""
        from shardxform.cluster.pool import make_states

        assert self._tuning is not None
        if number not in self._states and self._tuning.has_states(number):
            self._states[number] = None
        if number not in self._states:
            before = self._made(number - 1, needs) if number else None
            arguments = (self._wanted, self._tuned_with, number, before)
            self._states[number] = self._session.submit(make_states, needs, *arguments)
        return self._states[number]


def largest_of(plan: Plan, device: str) -> Needs:
    """What the step that takes most is promised."""
    needs = [needs_of(step, device) for step in plan.steps]
    return Needs(memory=max(each.memory for each in needs), gpus=max(each.gpus for each in needs))
