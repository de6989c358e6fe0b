"""The steps of a plan as tasks of a Ray cluster: a pool for `runner.run`, which keeps the only journal.

At most two steps a slot are handed over; Ray places them by the memory and the CPUs that each declares. Steps are not
tied to machines: every byte of the source is read once, so no machine is nearer to it than another.
"""

from __future__ import annotations

import os
import pickle
from concurrent.futures import Future
from pathlib import Path
from typing import Final

from shardxform.cluster.session import Needs, Session
from shardxform.cluster.worker import Place, do_step, versions
from shardxform.errors import PlanError
from shardxform.execution import Facts
from shardxform.output import Output
from shardxform.plan import Plan, Step

__all__ = ["RayPool", "needs_of", "refuse_remote"]

_WORKER_BYTES: Final = 160 << 20  # a worker's process: interpreter, ray, numpy, compiled kernels


def refuse_remote(plan: Plan) -> None:
    """Refuse a source on the hub: what is fetched of it lies on one machine.

    Raises:
        PlanError: names the source.

    """
    if plan.remote:
        raise PlanError(
            f"--ray: {plan.origin} is on the hub; expected a folder on a file system that all machines share"
        )


def needs_of(step: Step, device: str = "cpu") -> Needs:
    """What a step is promised: its memory beside the process's own, a CPU, and a GPU where that computes."""
    return Needs(memory=step.peak_bytes + _WORKER_BYTES, gpus=0 if device == "cpu" else 1)


class RayPool:
    """A `StepPool` on a cluster; use as a context manager."""

    def __init__(self, address: str, device: str = "cpu") -> None:
        self._session = Session(address)
        self._device = device
        self._wanted = versions()
        self._place: bytes = b""
        self._largest = Needs(memory=0)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.__exit__()

    @property
    def work_bytes(self) -> int:
        """Nothing lies beside the shards."""
        return 0

    def begin(self, output: Output) -> None:
        """Connect, and refuse what no machine of the cluster can do."""
        refuse_remote(output.plan)
        self._session.open()
        place = Place(
            fingerprint=output.plan.fingerprint,
            source=Path(os.path.abspath(output.plan.source)),
            out=Path(os.path.abspath(output.root)),
            device=self._device,
        )
        self._place = pickle.dumps(place)
        self._largest = max((needs_of(step, self._device) for step in output.plan.steps), key=lambda n: n.memory)
        self._session.refuse_too_large(self._largest)

    @property
    def ahead(self) -> int:
        """Two steps a slot: one that runs, one that follows at once."""
        return 2 * max(1, self._session.slots(self._largest))

    def submit(self, step: Step) -> Future[Facts]:
        """Have a step done by some worker."""
        needs = needs_of(step, self._device)
        return self._session.future(self._session.submit(do_step, needs, self._wanted, self._place, pickle.dumps(step)))

    def stop(self) -> None:
        """Cancel what is not done."""
        self._session.stop()
