"""What a run is asked for and what it tells: values, and what it may be handed: a tuner, and a pool for its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shardxform.base.file_system import FileSystem
from shardxform.base.progress import Progress
from shardxform.execution.copying import OpenTarget
from shardxform.execution.output import Output
from shardxform.plan.plan import Step

__all__ = ["Report", "RunOptions", "StepPool", "StepTuner"]


class StepTuner(Protocol):
    """What tunes blocks; see `tuning.session.Tuner`."""

    @property
    def work_bytes(self) -> int:
        """Disk that it needs beside the shards."""
        ...

    def can_start(self, step: Any, work: Path) -> bool:  # noqa: ANN401
        """Whether the states that `step` needs are there."""
        ...

    def tune(
        self,
        step: Any,  # noqa: ANN401
        work: Path,
        target: OpenTarget,
        fs: FileSystem,
        on_work: Callable[[int], None],
        stopped: Callable[[], None],
    ) -> dict[str, Any]:
        """Tune a block and write its parts."""
        ...


class StepPool(Protocol):
    """Where steps are done when that is not on threads of this process; see `cluster.pool.RayPool`."""

    @property
    def work_bytes(self) -> int:
        """Disk that it needs beside the shards."""
        ...

    def begin(self, output: Output) -> None:
        """Get ready for the steps of an output, or refuse: nothing is written yet."""
        ...

    @property
    def ahead(self) -> int:
        """Steps that it wants at once."""
        ...

    def submit(self, step: Step) -> Future[Mapping[str, Any]]:
        """Have a step done: a future of its facts, which comes true when its bytes are durable."""
        ...

    def stop(self) -> None:
        """Give up what was submitted; every future comes true soon, or fails."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Settings that change speed, safety checks and how much is done now, never a byte of the output.

    Attributes:
        jobs: steps in flight at once.
        device: where weights are rounded: `cpu`, or a torch device; the bits are the same.
        force: start over an output of shardxform's own that was made from other inputs.
        tuner: carries out the steps that tune a block, which are done one after the other, last.
        blocks: decoder blocks to tune now; None for all. Others may be tuned elsewhere.
        pool: where steps are done, those that tune included; `jobs`, `device` and `tuner` are then not looked at.
        parts: unfinished outputs of the same plan, whose steps are taken over before anything else is done.
        on_progress: called from the loop after every chunk.

    """

    jobs: int = 2
    device: str = "cpu"
    force: bool = False
    tuner: StepTuner | None = None
    blocks: range | None = None
    pool: StepPool | None = None
    parts: tuple[Path, ...] = ()
    on_progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did.

    Attributes:
        already_done: the output stood there complete, and nothing was written.
        left: steps that this run was not asked for and nobody has done yet; the output is complete when there are none.
        made_by_others: what else computed an output that was there than would compute it now; empty where nothing did.
        facts: what the steps found worth recording, such as modules whose weights are all zero; of an output that was
            there, what its record says.
        measured: by blocks, their time and memory in whichever run did them; nothing where all was there.

    """

    out: Path
    already_done: bool
    written_bytes: int
    resumed_bytes: int
    seconds: float
    peak_rss_bytes: int
    left: int = 0
    made_by_others: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    measured: tuple[Mapping[str, Any], ...] = ()
