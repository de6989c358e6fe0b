"""Executing `TuneBlock` steps: one block healed, tuned, or both, and its parts written.

The original block says what the block should put out; see `chains`. Healing moves the 16-bit weights of a pruned block,
then their rounding is tuned against the same reference, so that what is written answers for the original.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from shardxform.ask.recipe import Heal
from shardxform.base.constants import MERGED_SHARES, STORED_TOKENS
from shardxform.base.file_system import FileSystem, OpenTarget
from shardxform.base.progress import peak_rss_bytes
from shardxform.base.tensors import TensorRef
from shardxform.calibration import Windows
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ExecutionError
from shardxform.execution.journal import MEASURED
from shardxform.execution.transcoding import Zeros, write_item, write_part
from shardxform.formats.encoding import Opener, Read, Writing
from shardxform.formats.rounding import quantize_into
from shardxform.forward.passes import Batch, batches
from shardxform.forward.runtime import fixed_order, give_back, on_device
from shardxform.forward.skeleton import Block, Skeleton
from shardxform.forward.weights import Precision, Weights
from shardxform.forward.work import HiddenFile, HiddenReader
from shardxform.plan.steps import HEALED_FILE, TranscodeItem, TuneBlock
from shardxform.tuning.block import BlockResult, TunedBlock, TuneOptions, install, tune_block
from shardxform.tuning.heal import HealResult
from shardxform.tuning.healer import BlockHealer
from shardxform.tuning.linear_attention import frugal_linear_attention
from shardxform.tuning.samples import Forward, NonFiniteLoss, Samples, choose_judges, rows_as_float
from shardxform.tuning.schedule import BlockPace, Schedule
from shardxform.tuning.stacked import rows_of
from shardxform.tuning.workers import Workers

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.tuning.merging import MergedExperts

__all__ = ["ORIGINAL", "TUNED", "Chains", "Tuner", "TunerOptions", "states_file"]

# N: windows, B: windows of a batch, T: positions, H: hidden size.


# -- chains ------------------------------------------------------------------------------------------------------------
# The two chains of hidden states that blocks are healed and tuned by, on disk between blocks.
#
#     WORK/original-0003.hidden   hidden states that enter block 3 in the 16-bit model, before pruning when it is healed
#     WORK/tuned-0003.hidden      the same in the model whose blocks so far are done
#
# A step reads the states that enter its block, writes those that leave it, and is journaled when these and its parts
# are durable; the states it read are removed when the next step begins. So a step that is done again starts from the
# same bytes. With inputs `fp` there is one chain, and a block needs no other to be done: when its states are made
# beforehand and stored, blocks are done side by side.

ORIGINAL: Final = "original"
TUNED: Final = "tuned"


def states_file(work: Path, number: int, chain: str = ORIGINAL) -> Path:
    """Where the states lie that enter block `number`."""
    return work / f"{chain}-{number:04d}.hidden"


class Chains:
    """The hidden states of a run in one directory.

    Attributes:
        inputs: the chain that a block is tuned on.
        work: where they are.
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
        extra: int = 0,
    ) -> None:
        """Name them; `skeletons` are the models of the chains, `ORIGINAL` alone or both.

        The last `extra` windows are not of the text.
        """
        self._extra = extra
        self._skeletons, self._windows, self.work, self._fs = skeletons, windows, work, fs
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
                extra=self._extra,
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
        return HiddenFile(states_file(self.work, number, chain), shape, self._precision.dtype, self._fs, self._mark)


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


# -- session -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerOptions:
    """Settings of a tuner that change no byte on one kind of device.

    Attributes:
        precision: of the computation; its device's kind and its dtype are in the recipe.
        threads: for the tuned modules.
        stored: whether the states around every block are made beforehand, by `Tuner.make_states`, so that blocks can
            be tuned side by side; for inputs `fp`.

    """

    precision: Precision
    threads: int
    stored: bool = False


class Tuner:
    """Heals and tunes the blocks of one view, in order; close it, or use it as a context manager."""

    def __init__(
        self,
        view: Checkpoint,
        windows: Windows,
        layers: Sequence[int],
        options: TunerOptions,
        original: Checkpoint | None = None,
    ) -> None:
        """Make the models; no tensor is read yet.

        Args:
            view: what is written: the source, or its pruned view.
            windows: calibration data.
            layers: decoder blocks that have a step.
            options: device and threads.
            original: what a block should put out: the source before pruning to heal, the view itself if None.

        """
        self._windows = windows
        self._layers = frozenset(layers)
        self._precision = options.precision
        self._stored = options.stored
        with contextlib.ExitStack() as stack:
            self._skeleton = Skeleton(stack.enter_context(Weights(view, options.precision)))
            self._skeleton.refuse_longer(windows)
            self._original = self._skeleton
            if original is not None:
                self._original = Skeleton(stack.enter_context(Weights(original, options.precision)))
            self._workers = stack.enter_context(Workers(options.threads))
            self._open = stack.pop_all()

    @property
    def healed(self) -> tuple[int, ...]:
        """Decoder blocks that are healed where any are: those with a step that have experts."""
        return tuple(layer for layer in self._skeleton.layout.moe_layers if layer in self._layers)

    def close(self) -> None:
        """End the threads and close the source."""
        self._open.close()

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
        """Whether the states that `step` needs are there, or can be made without doing a block again."""
        if step.recipe.inputs == "fp":
            return True
        at = self._chains(step, work, FileSystem()).latest(step.layer)
        return not self._layers.intersection(range(max(at, 0), step.layer))

    def make_states(self, number: int, work: Path) -> None:
        """Have the states that enter block `number` in `work`, from those that enter the block before."""
        with on_device(self._precision.device):
            Chains({ORIGINAL: self._original}, self._windows, work, FileSystem(), stored=True).make(number)

    def tune(
        self,
        step: TuneBlock,
        work: Path,
        target: OpenTarget,
        fs: FileSystem,
        on_work: Callable[[int], None],
        stopped: Callable[[], None],
    ) -> dict[str, Any]:
        """Heal or tune a block and write its parts.

        Args:
            step: what to do.
            work: directory of the hidden states.
            target: opens an output shard.
            fs: effects.
            on_work: called with tokens that went through the block.
            stopped: raises when the run is to stop.

        Returns:
            facts for the record: one entry under `blocks`, and what was not tuned; under `measured`, time and memory.

        Raises:
            ExecutionError: weights or activations that are not finite.

        """
        run = _BlockRun(self, step, self._chains(step, work, fs), on_work, stopped)
        with on_device(self._precision.device):
            return run.execute(target, fs)

    def _chains(self, step: TuneBlock, work: Path, fs: FileSystem) -> Chains:
        tuned = {TUNED: self._skeleton} if step.recipe.inputs == "quantized" else {}
        models, extra = {ORIGINAL: self._original, **tuned}, step.recipe.extra
        return Chains(models, self._windows, work, fs, stored=self._stored, extra=extra)


class _BlockRun:
    """One step being done."""

    def __init__(
        self,
        tuner: Tuner,
        step: TuneBlock,
        chains: Chains,
        on_work: Callable[[int], None],
        stopped: Callable[[], None],
    ) -> None:
        self._tuner, self._step, self._chains, self._on_work, self._stopped = tuner, step, chains, on_work, stopped
        self._skeleton = tuner._skeleton
        self._device = tuner._precision.device
        self._healed: HealResult | None = None
        self._schedule: Schedule | None = None
        self._heal_iters = 0
        self._counted = 1.0  # of the tokens of a step of healing
        self._passing = 0.0  # seconds of the last pass through a chain
        self._tuned: BlockResult | None = None
        self._zeros = Zeros()

    def execute(self, target: OpenTarget, fs: FileSystem) -> dict[str, Any]:
        self._fs, self._began = fs, time.monotonic()
        layer = self._step.layer
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        heals = self._step.recipe.heal is not None and layer in self._tuner.healed
        merged = self._begin(merges=heals and bool(self._step.keep))
        names = self._local_names()
        at_rest, workers = () if heals else names, self._tuner._workers
        with (
            self._skeleton.tunable(layer, at_rest) as block,
            fixed_order(self._device),
            frugal_linear_attention(block.module, workers),
        ):
            if heals:
                self._heal(block, names, target, fs, merged)
            healed_at = time.monotonic()
            if names:
                self._round(block, names, target, fs)
            rounding = time.monotonic() - healed_at
            if self._chains.inputs == TUNED:
                self._forward(block, TUNED)
        seconds = time.monotonic() - self._began
        if self._schedule:
            self._schedule.finish(layer, seconds - rounding)
        return self._facts(seconds)

    def _begin(self, *, merges: bool) -> MergedExperts | None:
        """Have the states around the original block on disk; merge its experts while it is loaded, if at all."""
        layer, merged = self._step.layer, None
        if not self._chains.stored:
            self._chains.advance(layer, self._stopped)
        if merges or not self._chains.stored:
            with self._tuner._original.block(layer) as block:
                if not self._chains.stored:
                    self._forward(block, ORIGINAL)
                merged = self._merge(block) if merges else None
        return merged

    def _forward(self, block: Block, chain: str) -> None:
        """Run the block over all windows of a chain."""
        began = time.monotonic()
        for tokens in self._chains.through(block, chain, self._step.layer):
            self._stopped()
            self._on_work(tokens)
        self._passing = time.monotonic() - began

    # -- healing ------------------------------------------------------------------------------------------------

    def _decide(self, heal: Heal, measure: Callable[[Heal], BlockPace]) -> Heal:
        """How this block is healed: by so many steps as all, as a schedule has for it, or as there is time for."""
        layer, layers = self._step.layer, self._tuner.healed
        decided = heal
        if heal.schedule:
            decided = replace(heal, iters=heal.schedule[layers.index(layer)], schedule=())
        elif heal.seconds:
            self._counted = 0.0
            self._schedule = Schedule(layers, self._chains.work, self._fs)
            decided = self._schedule.decide(layer, heal, self._taken, lambda: measure(heal))
        self._heal_iters, self._counted = decided.iters, heal.iters / max(decided.iters, 1)  # merging takes no step
        return decided

    def _taken(self) -> float:
        """Seconds so far, and of the pass after healing, taken to be as long as the one before."""
        return time.monotonic() - self._began + self._passing

    def _on_step(self, tokens: int) -> None:
        """Count tokens of healing, as those of the steps that the plan takes there to be."""
        self._on_work(round(tokens * self._counted))

    def _merge(self, block: Block) -> MergedExperts:
        """Merge pruned experts into those that stay, by what enters the block where those before it are done.

        Lets go of the experts of `block`, the original's: they are read one at a time.
        """
        from shardxform.tuning.merging import Merger, Running  # SciPy, which nothing else needs

        tuner, layer, keep = self._tuner, self._step.layer, self._step.keep
        of_all, told = self._step.merging_tokens, 0

        def on_work(share: float) -> None:
            nonlocal told
            self._on_work(round(share * of_all) - told)
            told = round(share * of_all)

        at_once = self._step.size.merged_at_once
        running = Running(workers=tuner._workers, at_once=at_once, on_work=on_work, stopped=self._stopped)
        merger = Merger(tuner._original, self._skeleton, layer, keep, running)
        with self._chains.samples(layer) as samples:
            learned_N = choose_judges(samples, self._step.recipe.seed).learned_N
            entering = (rows_as_float(samples.hidden_NTH, learned_N[at : at + 1]) for at in range(len(learned_N)))
            dtype = tuner._precision.dtype
            return merger.merge(block, (each.to(self._device, dtype) for each in entering), self._chains.work, self._fs)

    def _heal(
        self, block: Block, names: Sequence[str], target: OpenTarget, fs: FileSystem, merged: MergedExperts | None
    ) -> None:
        """Heal the block, and write what stays as wide as it is."""
        layer, recipe = self._step.layer, self._step.recipe
        assert recipe.heal is not None
        forward = self._chains.forward(block, self._on_step, self._stopped)
        healer = BlockHealer(self._skeleton, block, layer, forward, self._tuner._workers, self._step.kept)
        with self._chains.samples(layer) as samples:
            if merged:
                tried = self._step.judged_tokens // (1 + len(MERGED_SHARES))
                healer.begin_merged(merged, samples, recipe.heal, recipe.seed, lambda: self._on_work(tried))
            heal = self._decide(recipe.heal, lambda heal: healer.pace(samples, heal, recipe.seed))
            self._healed = healer.heal(samples, heal, recipe.seed)
        for item in self._step.kept:
            for (_, extent), part in zip(item.parts, healer.parts(item), strict=True):
                if part.nbytes != extent.length:  # the rest would be a hole that reads as zeros
                    raise ExecutionError(f"internal: {item.tensor.name}: {part.nbytes} bytes for {extent.length}")
                write_part(part, extent, target, fs)
        opener = Opener(_reading(healer))
        for moved in self._step.moved:
            writing = Writing(f"tensor '{moved.module}'", moved.shape, quantize_into, self._stopped)
            write_item(moved, (source.open(opener) for source in moved.sources), writing, target, fs)
            self._zeros.add(moved.module, writing.groups, writing.zero_groups)
        healer.make_ready(names)
        if merged:
            merged.remove()

    # -- rounding -----------------------------------------------------------------------------------------------

    def _round(self, block: Block, names: Sequence[str], target: OpenTarget, fs: FileSystem) -> None:
        """Tune the rounding of the block, or round to nearest, and write what is packed."""
        grid = self._step.grid
        assert grid is not None
        recompute = self._step.recipe.batch_tokens > STORED_TOKENS
        tuned = install(block.module, names, grid, self._tuner._workers, recompute=recompute)
        give_back()
        if self._step.recipe.iters:
            self._tuned = self._tune(tuned, block)
        else:
            tuned.restart()
            tuned.settle()
        give_back()
        self._write(tuned, target, fs)

    def _tune(self, tuned: TunedBlock, block: Block) -> BlockResult | None:
        """Tune the block; None when its loss is not finite and it was left rounded to nearest."""
        recipe = self._step.recipe
        forward = self._chains.forward(block, self._on_work, self._stopped)
        options = TuneOptions(
            seed=recipe.seed,
            iters=recipe.iters,
            lr=recipe.lr,
            minmax_lr=recipe.minmax_lr,
            batch_size=recipe.batch_size,
            dtype=self._tuner._precision.dtype,
        )
        with self._chains.samples(self._step.layer) as samples:
            try:
                return tune_block(tuned, forward, samples, options)
            except NonFiniteLoss:
                return None

    def _local_names(self) -> list[str]:
        """Modules of the block that are packed, in order: linear ones, and the routed experts as a whole."""
        prefix = self._skeleton.prefix(self._step.layer)
        experts = self._skeleton.experts_name(self._step.layer)
        names: dict[str, None] = {}
        for item in self._step.items:
            local = self._skeleton.module_name(item.module.removeprefix(prefix))
            names[experts if experts and local.startswith(f"{experts}.") else local] = None
        return list(names)

    # -- results ------------------------------------------------------------------------------------------------

    def _write(self, tuned: TunedBlock, target: OpenTarget, fs: FileSystem) -> None:
        """Pack and write every module, one at a time."""
        prefix = self._skeleton.prefix(self._step.layer)
        items: dict[str, list[TranscodeItem]] = {}  # several where rows of a module are tensors of their own
        for item in self._step.items:
            items.setdefault(item.module, []).append(item)
        for stored in tuned.stored(self._skeleton.layout.family.experts.projections):
            rows = rows_of(stored.codes, tuned.grid, stored.module)
            module = prefix + self._skeleton.stored_name(stored.module, prefix)
            self._zeros.add(module, stored.codes.scale_OG.size, stored.codes.zero_groups)
            for item in items.pop(module):
                (source,) = item.sources
                writing = Writing(item.module, item.shape, quantize_into, self._stopped)
                write_item(item, [source.of(rows)], writing, target, fs)
        if items:
            raise ExecutionError(f"internal: {next(iter(items))} was not tuned")

    def _facts(self, seconds: float) -> dict[str, Any]:
        facts: dict[str, Any] = {"layer": self._step.layer}
        told = {"blocks": [facts], MEASURED: [self._measured(seconds)], **self._zeros.facts()}
        if self._healed is not None:
            healed = _heal_facts(self._healed, self._heal_iters, merges=bool(self._step.keep))
            facts |= {"healed": healed, "judged_on": asdict(self._healed.judged)}
        if not (self._step.items and self._step.recipe.iters):
            return told
        if self._tuned is None:
            facts["rounded_to_nearest"] = "loss not finite"
            return {**told, "blocks_not_tuned": 1}
        facts |= {
            "rtn_error": self._tuned.start_loss,
            "tuned_error": self._tuned.loss,
            "ratio_standard_error": _number(self._tuned.ratio_error),
            "judged_on": asdict(self._tuned.judged),
            "kept_iteration": self._tuned.iteration,
            "experts_never_reached": [e for experts in self._tuned.unreached.values() for e in experts],
        }
        return told

    def _measured(self, seconds: float) -> dict[str, Any]:
        """What a clock and the machine say of the step."""
        found = {"layer": self._step.layer, "seconds": round(seconds, 3), "peak_rss_bytes": peak_rss_bytes()}
        if self._device.type == "cuda":
            found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self._device)
        return found


def _reading(healer: BlockHealer) -> Read:
    """Make a function that reads tensors after healing; keeps the last one, of which the next are often other rows."""
    last: dict[str, NDArray[np.uint8]] = {}

    def read(ref: TensorRef, into: NDArray[Any]) -> None:
        data, done = into.reshape(-1).view(np.uint8), 0
        for piece in ref.ranges:
            name = piece.file.removeprefix(HEALED_FILE)
            if name not in last:
                last.clear()  # before the next one is made: stacks of experts are a gigabyte
                last[name] = healer.values_of(name)
            data[done : done + piece.length] = last[name][piece.offset : piece.end]
            done += piece.length

    return read


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _heal_facts(result: HealResult, iters: int, *, merges: bool) -> dict[str, Any]:
    tried = [{"what": what, "lr": lr, "error": error} for what, lr, error in result.tried]
    return {
        "pruned_error": result.start_loss,
        "healed_error": result.loss,
        "ratio_standard_error": _number(result.ratio_error),
        "what": result.what,
        "lr": result.lr,
        "iters": iters,
        "tried": tried,
        "diverged": result.diverged,
        **({"merged": result.merged, "merged_error": _number(result.merged_loss)} if merges else {}),
    }
