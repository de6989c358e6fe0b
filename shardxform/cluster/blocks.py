"""What workers do to tune blocks side by side: the states around each made once, by a chain of tasks; then the block.

States are files in the work directory of the output, one for each block that is entered. A task that makes them comes
after the one that made those before, and a block is tuned after both that it reads: Ray keeps that order. A file that
is whole is not made again, so that a chain that broke goes on from where it was.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shardxform.base.file_system import FileSystem
from shardxform.calibration.options import Windows
from shardxform.checkpoint.table import Checkpoint
from shardxform.cluster.worker import (
    Outcome,
    StepPlace,
    ignore,
    opened_targets,
    refuse_other_source,
    refuse_other_version,
    reporting,
    with_digests,
)
from shardxform.errors import ExecutionError
from shardxform.execution.steps import Facts

if TYPE_CHECKING:
    from shardxform.forward.weights import Precision
    from shardxform.tuning.session import Tuner

__all__ = ["BlockTuning", "do_block", "make_states", "precision_of"]

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
        from shardxform.tuning.chains import states_file

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
