"""Executing `TuneBlock` steps: the two chains of hidden states, one block tuned, its parts written.

    WORK/original-0003.hidden   hidden states that enter block 3 in the 16-bit model
    WORK/tuned-0003.hidden      the same in the model whose blocks so far are tuned

A step reads the states that enter its block, writes those that leave it, and is journaled when these and its parts are
durable; the states it read are removed when the next step begins. So a step that is done again starts from the same
bytes. With inputs `fp` there is one chain, and a block needs no other to be tuned.
"""

# N: windows, B: windows of a batch, T: positions, H: hidden size.

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from shardxform.calibration import Windows
from shardxform.checkpoint import Checkpoint
from shardxform.copying import OpenTarget
from shardxform.errors import ExecutionError
from shardxform.forward.experts import experts_module
from shardxform.forward.passes import Batch, batches
from shardxform.forward.skeleton import Block, Skeleton
from shardxform.forward.weights import Precision, Weights
from shardxform.forward.work import HiddenFile, HiddenReader
from shardxform.fsio import FileSystem
from shardxform.progress import peak_rss_bytes
from shardxform.quantize.execute import part_of, write_part
from shardxform.quantize.planner import RoundItem, TuneBlock
from shardxform.tuning.block import TunedBlock, install
from shardxform.tuning.stacked import packed
from shardxform.tuning.tune import BlockResult, NonFiniteLoss, Samples, TuneOptions, tune_block
from shardxform.tuning.workers import Workers

__all__ = ["Tuner", "TunerOptions"]

_ORIGINAL: Final = "original"
_TUNED: Final = "tuned"


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerOptions:
    """Settings of a tuner that change no byte on one kind of device.

    Attributes:
        precision: of the computation; its device's kind and its dtype are in the recipe.
        threads: for the tuned modules.

    """

    precision: Precision
    threads: int


class Tuner:
    """Tunes the blocks of one view, in order; close it, or use it as a context manager."""

    def __init__(self, view: Checkpoint, windows: Windows, layers: Sequence[int], options: TunerOptions) -> None:
        """Make the model; no tensor is read yet.

        Args:
            view: what is quantized: the source, or its pruned view.
            windows: calibration data.
            layers: decoder blocks that have a step.
            options: device and threads.

        """
        self._windows = windows
        self._layers = frozenset(layers)
        self._precision = options.precision
        self._weights = Weights(view, options.precision)
        self._skeleton = Skeleton(self._weights)
        self._workers = Workers(options.threads)

    def close(self) -> None:
        """End the threads and close the source."""
        self._workers.close()
        self._weights.close()

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def work_bytes(self) -> int:
        """Disk that hidden states take: two generations of two chains."""
        count, length = self._windows.ids_NT.shape
        nbytes: int = 4 * count * length * self._skeleton.hidden_size * self._precision.dtype.itemsize
        return nbytes

    def can_start(self, step: TuneBlock, work: Path) -> bool:
        """Whether the states that `step` needs are there, or can be made without tuning a block again."""
        if step.recipe.inputs == "fp":
            return True
        at = _latest(self._file(work, FileSystem()), (_ORIGINAL, _TUNED), step.layer)
        return not self._layers.intersection(range(max(at, 0), step.layer))

    def tune(
        self,
        step: TuneBlock,
        work: Path,
        target: OpenTarget,
        fs: FileSystem,
        on_work: Callable[[int], None],
        stopped: Callable[[], None],
    ) -> dict[str, Any]:
        """Tune a block and write its parts.

        Args:
            step: what to do.
            work: directory of the hidden states.
            target: opens an output shard.
            fs: effects.
            on_work: called with tokens that went through the block.
            stopped: raises when the run is to stop.

        Returns:
            facts for the record: one entry under `blocks`, and what was not tuned.

        Raises:
            ExecutionError: weights or activations that are not finite.

        """
        run = _BlockRun(self, step, self._file(work, fs), on_work, stopped)
        with _deterministic(self._precision.device):
            return run.execute(target, fs)

    def _file(self, work: Path, fs: FileSystem) -> Callable[[str, int], HiddenFile]:
        shape = (*self._windows.ids_NT.shape, self._skeleton.hidden_size)
        dtype = self._precision.dtype
        return lambda chain, number: HiddenFile(work / f"{chain}-{number:04d}.hidden", shape, dtype, fs)


class _BlockRun:
    """One step being done."""

    def __init__(
        self,
        tuner: Tuner,
        step: TuneBlock,
        file: Callable[[str, int], HiddenFile],
        on_work: Callable[[int], None],
        stopped: Callable[[], None],
    ) -> None:
        self._tuner, self._step, self._file, self._on_work, self._stopped = tuner, step, file, on_work, stopped
        self._skeleton = tuner._skeleton
        self._windows = tuner._windows
        self._device = tuner._precision.device
        self._two_chains = step.recipe.inputs == "quantized"

    def execute(self, target: OpenTarget, fs: FileSystem) -> dict[str, Any]:
        began = time.monotonic()
        layer = self._step.layer
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        with torch.no_grad():
            self._advance(layer)
            with self._skeleton.block(layer) as block:
                self._forward(block, _ORIGINAL, layer, count=True)
        local = self._local_names()
        with self._skeleton.tunable(layer, local) as block:
            tuned = install(block.module, local, self._step.scheme.grid, self._tuner._workers)
            result = self._tune(tuned, block)
            self._write(tuned, target, fs)
            if self._two_chains:
                with torch.no_grad():
                    self._forward(block, _TUNED, layer, count=True)
        return self._facts(result, time.monotonic() - began)

    # -- chains -------------------------------------------------------------------------------------------------

    def _advance(self, layer: int) -> None:
        """Have the states that enter `layer` on disk, and remove older ones."""
        chains = (_ORIGINAL, _TUNED) if self._two_chains else (_ORIGINAL,)
        at = _latest(self._file, chains, layer)
        if at < 0:
            at = 0
            for chain in chains:
                with self._file(chain, 0).writing() as out:
                    for batch in batches(self._windows):
                        out.put(batch.start, self._skeleton.embed(batch.ids_BT))
        for number in range(at, layer):  # blocks without a weight to tune, or tuned elsewhere
            with self._skeleton.block(number) as block:
                for chain in chains:
                    self._forward(block, chain, number, count=False)
        for number in range(layer):
            for chain in chains:
                self._file(chain, number).remove()

    def _forward(self, block: Block, chain: str, layer: int, *, count: bool) -> None:
        """Run a block over all windows of a chain."""
        with self._file(chain, layer).reading() as reader, self._file(chain, layer + 1).writing() as out:
            for batch in batches(self._windows):
                self._stopped()
                mask = batch.mask()
                entering_BTH = reader.rows(batch.start, batch.stop).to(self._device)
                leaving_BTH = block(entering_BTH, None if mask is None else mask.to(self._device))
                self._refuse_non_finite(leaving_BTH, batch, chain, layer)
                out.put(batch.start, leaving_BTH)
                self._on_work(batch.ids_BT.numel() if count else 0)

    def _refuse_non_finite(self, hidden_BTH: torch.Tensor, batch: Batch, chain: str, layer: int) -> None:
        if bool(torch.isfinite(hidden_BTH[batch.valid_BT.to(hidden_BTH.device)]).all()):
            return
        model = "the 16-bit model" if chain == _ORIGINAL else "the quantized model, also when rounded to nearest,"
        raise ExecutionError(
            f"block {layer}: {model} puts out NaN or infinity for windows {batch.start}..{batch.stop - 1};"
            " expected finite hidden states"
        )

    # -- tuning -------------------------------------------------------------------------------------------------

    def _tune(self, tuned: TunedBlock, block: Block) -> BlockResult | None:
        """Tune the block; None when its loss is not finite and it was left rounded to nearest."""
        recipe, layer = self._step.recipe, self._step.layer
        inputs = _TUNED if self._two_chains else _ORIGINAL
        lengths_N = self._windows.lengths_N.astype(np.int64)
        length = self._windows.ids_NT.shape[1]

        def forward(hidden_BTH: torch.Tensor, rows_B: NDArray[np.int64]) -> torch.Tensor:
            self._stopped()
            if torch.is_grad_enabled():
                self._on_work(len(rows_B) * length)
            lengths_B = torch.from_numpy(lengths_N[rows_B])
            valid_BT = torch.arange(length) < lengths_B[:, None]
            mask = None if bool(valid_BT.all()) else valid_BT.long().to(self._device)
            return block(hidden_BTH.to(self._device), mask)

        with self._file(inputs, layer).reading() as entering, self._file(_ORIGINAL, layer + 1).reading() as leaving:
            samples = Samples(
                block=layer,
                hidden_NTH=cast("NDArray[Any]", _Rows(entering)),
                target_NTH=cast("NDArray[Any]", _Rows(leaving)),
                length_N=lengths_N,
            )
            options = TuneOptions(
                seed=recipe.seed, iters=recipe.iters, batch_size=recipe.batch_size, dtype=self._tuner._precision.dtype
            )
            try:
                return tune_block(tuned, forward, samples, options)
            except NonFiniteLoss:
                return None

    def _local_names(self) -> list[str]:
        """Modules of the block that are tuned, in order: linear ones, and the routed experts as a whole."""
        prefix = self._skeleton.prefix(self._step.layer)
        experts = self._experts_name()
        names: dict[str, None] = {}
        for item in self._step.items:
            local = item.module.removeprefix(prefix)
            names[experts if experts and local.startswith(f"{experts}.") else local] = None
        return list(names)

    def _experts_name(self) -> str:
        module = self._skeleton.module(self._step.layer)
        experts = experts_module(module)
        return next((name for name, each in module.named_modules() if each is experts), "") if experts else ""

    # -- results ------------------------------------------------------------------------------------------------

    def _write(self, tuned: TunedBlock, target: OpenTarget, fs: FileSystem) -> None:
        """Pack and write every module, one at a time."""
        prefix, scheme = self._skeleton.prefix(self._step.layer), self._step.scheme
        items: dict[str, RoundItem] = {item.module: item for item in self._step.items}
        for stored in tuned.stored():
            item = items.pop(prefix + stored.module)
            out = packed(stored.codes, scheme.grid, scheme.layout)
            for role, extent in item.parts:
                write_part(part_of(role, item, scheme, out), extent, target, fs)
        if items:
            raise ExecutionError(f"internal: {next(iter(items))} was not tuned")

    def _facts(self, result: BlockResult | None, seconds: float) -> dict[str, Any]:
        facts: dict[str, Any] = {"layer": self._step.layer, "seconds": round(seconds, 3)}
        facts["peak_rss_bytes"] = peak_rss_bytes()
        if self._device.type == "cuda":
            facts["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self._device)
        if result is None:
            return {"blocks": [{**facts, "rounded_to_nearest": "loss not finite"}], "blocks_not_tuned": 1}
        facts |= {
            "rtn_error": result.start_loss,
            "tuned_error": result.loss,
            "kept_iteration": result.iteration,
            "experts_never_reached": [expert for experts in result.unreached.values() for expert in experts],
        }
        return {"blocks": [facts]}


class _Rows:
    """Hidden states on disk, indexed like an array by window numbers: a batch is in memory, never all of them."""

    def __init__(self, reader: HiddenReader) -> None:
        self._reader = reader
        self.shape = reader.shape

    def __getitem__(self, rows_B: NDArray[np.int64]) -> NDArray[Any]:
        rows = torch.cat([self._reader.rows(int(row), int(row) + 1) for row in rows_B])
        return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Have a GPU add in a fixed order: attention's backward pass does not, unless it is told to."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _latest(file: Callable[[str, int], HiddenFile], chains: Sequence[str], layer: int) -> int:
    """The last block up to `layer` whose entering states are on disk in every chain; -1 when there is none."""
    for number in range(layer, -1, -1):
        if all(file(chain, number).is_whole() for chain in chains):
            return number
    return -1
