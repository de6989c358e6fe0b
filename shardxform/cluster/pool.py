"""The steps of a plan as tasks of a Ray cluster: a pool for `runner.run`, which keeps the only journal.

At most two steps a slot are handed over; Ray places them by the memory and the CPUs that each declares. Steps are not
tied to machines: every byte of the source is read once, so no machine is nearer to it than another.
"""

from __future__ import annotations

import pickle
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, cast

from shardxform.base import computing
from shardxform.base.digests import Chunks
from shardxform.cluster.session import Needs, Session
from shardxform.cluster.worker import StepPlace, do_step
from shardxform.errors import ExecutionError, PlanError
from shardxform.execution.output import Output
from shardxform.execution.steps import Facts
from shardxform.plan.plan import Copy, Plan, Step, tokens_of

if TYPE_CHECKING:
    from shardxform.cluster.blocks import BlockTuning
    from shardxform.plan.steps import TuneBlock

__all__ = ["RayPool", "needs_of", "refuse_remote"]

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
    process = 0 if tokens_of(step) else _WORKER_BYTES  # the memory of a tuned block is all there is of it
    return Needs(memory=step.peak_bytes + process, gpus=0 if device == "cpu" or isinstance(step, Copy) else 1)


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
        if tokens_of(step):
            return self._session.future(self._submit_block(cast("TuneBlock", step), needs))
        return self._session.future(self._session.submit(do_step, needs, self._wanted, self._place, self._packed(step)))

    def stop(self) -> None:
        """Cancel what is not done."""
        self._session.stop()

    def _submit_block(self, step: TuneBlock, needs: Needs) -> Any:  # noqa: ANN401
        from shardxform.cluster.blocks import do_block

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
        from shardxform.cluster.blocks import make_states

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
