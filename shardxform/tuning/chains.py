"""The two chains of hidden states that blocks are healed and tuned by, on disk between blocks.

    WORK/original-0003.hidden   hidden states that enter block 3 in the 16-bit model, before pruning when it is healed
    WORK/tuned-0003.hidden      the same in the model whose blocks so far are done

A step reads the states that enter its block, writes those that leave it, and is journaled when these and its parts are
durable; the states it read are removed when the next step begins. So a step that is done again starts from the same
bytes. With inputs `fp` there is one chain, and a block needs no other to be done: when its states are made beforehand
and stored, blocks are done side by side.
"""

# N: windows, B: windows of a batch, T: positions, H: hidden size.

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from shardxform.base.file_system import FileSystem
from shardxform.errors import ExecutionError
from shardxform.forward.passes import Batch, batches
from shardxform.forward.skeleton import Block, Skeleton
from shardxform.forward.work import HiddenFile, HiddenReader
from shardxform.tuning.samples import Forward, Samples

if TYPE_CHECKING:
    from shardxform.calibration import Windows

__all__ = ["ORIGINAL", "TUNED", "Chains", "states_file"]

ORIGINAL: Final = "original"
TUNED: Final = "tuned"


def states_file(work: Path, number: int, chain: str = ORIGINAL) -> Path:
    """Where the states lie that enter block `number`."""
    return work / f"{chain}-{number:04d}.hidden"


class Chains:
    """The hidden states of a run in one directory.

    Attributes:
        inputs: the chain that a block is tuned on.
        stored: whether the states around every block are made beforehand, by `make`, and stay.

    """

    def __init__(
        self,
        skeletons: Mapping[str, Skeleton],
        windows: Windows,
        work: Path,
        fs: FileSystem,
        *,
        stored: bool = False,
    ) -> None:
        """Name them; `skeletons` are the models of the chains, `ORIGINAL` alone or both."""
        self._skeletons, self._windows, self._work, self._fs = skeletons, windows, work, fs
        self._precision = skeletons[ORIGINAL].weights.precision
        self.inputs = TUNED if TUNED in skeletons else ORIGINAL
        self.stored = stored
        self._mark = f".{secrets.token_hex(4)}" if stored else ""

    def latest(self, layer: int) -> int:
        """The last block up to `layer` whose entering states are on disk in every chain; -1 when there is none."""
        for number in range(layer, -1, -1):
            if all(self._file(chain, number).is_whole() for chain in self._skeletons):
                return number
        return -1

    @torch.no_grad()
    def advance(self, layer: int, stopped: Callable[[], None]) -> None:
        """Have the states that enter `layer` on disk, and remove older ones."""
        at = self.latest(layer)
        if at < 0:
            at = 0
            for chain in self._skeletons:
                self._embed(chain)
        for number in range(at, layer):  # blocks without a weight to tune, or tuned elsewhere
            for chain, skeleton in self._skeletons.items():
                with skeleton.block(number) as block:
                    for _ in self.through(block, chain, number):
                        stopped()
        for number in range(layer):
            for chain in self._skeletons:
                self._file(chain, number).remove()

    @torch.no_grad()
    def make(self, number: int) -> None:
        """Have the 16-bit states that enter block `number` on disk, from those that enter the block before."""
        if self._file(ORIGINAL, number).is_whole():
            return
        if number == 0:
            self._embed(ORIGINAL)
            return
        with self._skeletons[ORIGINAL].block(number - 1) as block:
            for _ in self.through(block, ORIGINAL, number - 1):
                pass

    def through(self, block: Block, chain: str, layer: int) -> Iterator[int]:
        """Run a block over all windows of a chain; yields the tokens of every batch before it is run.

        Raises:
            ExecutionError: what leaves it is not finite.

        """
        device = self._precision.device
        with self._file(chain, layer).reading() as reader, self._file(chain, layer + 1).writing() as out:
            for batch in batches(self._windows):
                yield batch.ids_BT.numel()
                entering_BTH = reader.rows(batch.start, batch.stop).to(device)
                with torch.no_grad():
                    leaving_BTH = block(entering_BTH)
                _refuse_non_finite(leaving_BTH, batch, chain, layer)
                out.put(batch.start, leaving_BTH)

    @contextlib.contextmanager
    def samples(self, layer: int) -> Iterator[Samples]:
        """What a block is tuned on: the states that enter it, and those that leave it in the original."""
        with self._file(self.inputs, layer).reading() as entering, self._file(ORIGINAL, layer + 1).reading() as leaving:
            yield Samples(
                block=layer,
                hidden_NTH=cast("NDArray[Any]", _Rows(entering)),
                target_NTH=cast("NDArray[Any]", _Rows(leaving)),
            )

    def forward(self, block: Block, on_work: Callable[[int], None], stopped: Callable[[], None]) -> Forward:
        """Make a function that runs a block on some windows; counts tokens when it is to learn."""
        device = self._precision.device

        def run(hidden_BTH: torch.Tensor) -> torch.Tensor:
            stopped()
            if torch.is_grad_enabled():
                on_work(hidden_BTH.shape[0] * hidden_BTH.shape[1])
            return block(hidden_BTH.to(device))

        return run

    def _embed(self, chain: str) -> None:
        with self._file(chain, 0).writing() as out:
            for batch in batches(self._windows):
                out.put(batch.start, self._skeletons[chain].embed(batch.ids_BT))

    def _file(self, chain: str, number: int) -> HiddenFile:
        shape = (*self._windows.ids_NT.shape, self._skeletons[ORIGINAL].hidden_size)
        return HiddenFile(states_file(self._work, number, chain), shape, self._precision.dtype, self._fs, self._mark)


class _Rows:
    """Hidden states on disk, indexed like an array by window numbers: a batch is in memory, never all of them."""

    def __init__(self, reader: HiddenReader) -> None:
        self._reader = reader
        self.shape = reader.shape

    def __getitem__(self, rows_B: NDArray[np.int64]) -> NDArray[Any]:
        rows = torch.cat([self._reader.rows(int(row), int(row) + 1) for row in rows_B])
        return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def _refuse_non_finite(hidden_BTH: torch.Tensor, batch: Batch, chain: str, layer: int) -> None:
    if bool(torch.isfinite(hidden_BTH).all()):
        return
    model = "the 16-bit model" if chain == ORIGINAL else "the model as it will be written"
    raise ExecutionError(
        f"block {layer}: {model} puts out NaN or infinity for windows {batch.start}..{batch.stop - 1};"
        " expected finite hidden states"
    )
