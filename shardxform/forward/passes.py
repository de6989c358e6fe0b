"""One or several models run over the same token windows in step, block by block, resumably.

Hidden states live in the work directory between blocks. A visitor sees what every expert and every block puts out and
gives facts of each block, which are recorded with it. The next block is asked of the disk while one computes. What a
pass will take is known from headers alone.
"""

# N: sequences, T: positions, B: sequences of a batch, H: hidden size.

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from shardxform.base import computing, interrupts
from shardxform.base.constants import BATCH_TOKENS
from shardxform.base.file_system import FileSystem
from shardxform.base.progress import OnProgress, Progress
from shardxform.base.strict_json import dumps
from shardxform.calibration import Windows
from shardxform.checkpoint.identity import identify
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ExecutionError, Interrupted
from shardxform.forward.skeleton import Block, Skeleton
from shardxform.forward.weights import Observer, Precision, Weights
from shardxform.forward.work import HiddenFile, WorkDir
from shardxform.model.families import family_origin

__all__ = [
    "BATCH_TOKENS",
    "Batch",
    "Pass",
    "Visitor",
    "batches",
    "estimate",
    "fingerprint",
    "pass_inputs",
    "run_pass",
    "tokens_of_pass",
]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences `start`..`stop - 1` of the windows.

    Attributes:
        ids_BT: token ids.

    """

    start: int
    stop: int
    ids_BT: torch.Tensor

    @property
    def length(self) -> int:
        """Positions of every sequence."""
        return self.ids_BT.shape[1]


class Visitor(Protocol):
    """What looks on while blocks are run."""

    def observer(self, chain: str) -> Observer | None:
        """Who sees the outputs of the experts of this chain."""
        ...

    def begin(self, layer: int) -> None:
        """Forget the block before: `layer` begins."""
        ...

    def after(self, hidden: Mapping[str, torch.Tensor]) -> None:
        """A batch went through the block of every chain; `hidden` is what left it, [B, T, H]."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What the block gave, as plain JSON."""
        ...


@dataclass(slots=True)
class Pass:
    """A forward pass over all blocks.

    Attributes:
        windows: the tokens.
        chains: the models by name; all have as many blocks and the same hidden size.
        work: where hidden states and facts are kept; entered by the caller.
        on_progress: called after every batch.
        extra_tokens: tokens that the caller will process after the blocks, for the progress.

    """

    windows: Windows
    chains: Mapping[str, Skeleton]
    work: WorkDir
    on_progress: OnProgress | None = None
    extra_tokens: int = 0
    _done: int = field(default=0, init=False)
    _resumed: int = field(default=0, init=False)

    @property
    def num_blocks(self) -> int:
        """Decoder blocks of every chain."""
        return next(iter(self.chains.values())).num_blocks

    @property
    def block_tokens(self) -> int:
        """Tokens that go through one block of all chains."""
        return tokens_of_pass(self.windows) * len(self.chains)

    def hidden(self, chain: str, number: int) -> HiddenFile:
        """Hidden states of a chain that enter block `number`, or leave the last one."""
        skeleton = self.chains[chain]
        shape = (*self.windows.ids_NT.shape, skeleton.hidden_size)
        return self.work.hidden(chain, number, shape, skeleton.weights.precision.dtype)

    def progressed(self, tokens: int, *, resumed: bool = False) -> None:
        """Count tokens as done; inside of `interrupts.deferred` a place to stop."""
        interrupts.check()
        self._done += tokens
        self._resumed += tokens if resumed else 0
        if self.on_progress:
            total = self.block_tokens * self.num_blocks + self.extra_tokens
            self.on_progress(Progress(self._done, total, self._resumed, "tokens"))


def run_pass(job: Pass, visitor: Visitor) -> list[Mapping[str, Any]]:
    """Run every block of every chain over all windows, or go on where an earlier run stopped.

    The hidden states that leave the last block stay in the work directory.

    Returns:
        the visitor's facts of every block.

    Raises:
        Interrupted: KeyboardInterrupt, or a signal, see `interrupts`; every finished block is durable.
        OutputError: the disk is too small for the hidden states.
        ExecutionError: the model gives no finite numbers.

    """
    job.work.refuse_too_little_space(2 * sum(job.hidden(chain, 0).nbytes for chain in job.chains))
    done = 0
    try:
        with (
            interrupts.deferred(),
            torch.no_grad(),
            ThreadPoolExecutor(1, thread_name_prefix="ahead") as ahead,
        ):
            _embed(job)
            for layer in range(job.num_blocks):
                if _name(layer) in job.work.steps:
                    job.progressed(job.block_tokens, resumed=True)
                    _remove_inputs(job, layer)  # a crash may have left them
                else:
                    ahead.submit(_read_ahead, job, layer + 1)
                    _run_block(job, layer, visitor)
                done = layer + 1
    except KeyboardInterrupt as e:
        raise Interrupted(
            f"stopped: {done} of {job.num_blocks} blocks are safe in {job.work.root};"
            " run the same command again to go on"
        ) from e
    return [job.work.steps[_name(layer)] for layer in range(job.num_blocks)]


def batches(windows: Windows) -> Iterator[Batch]:
    """Cut the windows into batches of whole sequences, each as long as its longest."""
    count, longest = windows.ids_NT.shape
    start = 0
    while start < count:
        length = windows.lengths[start] if windows.lengths else longest
        stop = min(start + max(1, BATCH_TOKENS // length), count)
        yield Batch(start, stop, torch.from_numpy(windows.ids_NT[start:stop, :length]).long())
        start = stop


def tokens_of_pass(windows: Windows) -> int:
    """Tokens that a pass puts through every block."""
    if not windows.lengths:
        return windows.ids_NT.size
    return sum(batch.ids_BT.numel() for batch in batches(windows))


def pass_inputs(
    purpose: str, checkpoints: Mapping[str, Checkpoint], windows: Windows, precision: Precision
) -> dict[str, Any]:
    """What decides the numbers of a pass, by name: sources with their values, tokens, type, and what computes.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    sources = {
        name: {
            "source": identify(checkpoint).to_dict(),
            "tensors": hashlib.sha256(repr(list(checkpoint.tensors.values())).encode()).hexdigest(),
        }
        for name, checkpoint in checkpoints.items()
    }
    family = {key: value for each in checkpoints.values() for key, value in family_origin(each.config).items()}
    return {
        "purpose": purpose,
        "sources": sources,
        **family,
        "windows": windows.fingerprint,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "device": precision.device.type,
        computing.KEY: computing.of_model(str(precision.device)),
    }


def fingerprint(inputs: Mapping[str, object]) -> str:
    """SHA-256 of what decides the numbers of a pass but for what computes: the same on every machine."""
    return hashlib.sha256(dumps(computing.without(inputs)).encode()).hexdigest()


def _name(layer: int) -> str:
    return f"block {layer}"


def _embed(job: Pass) -> None:
    """The hidden states that enter the first block."""
    if "embeddings" in job.work.steps:
        return
    for name, skeleton in job.chains.items():
        with job.hidden(name, 0).writing() as out:
            for batch in batches(job.windows):
                interrupts.check()
                out.put(batch.start, skeleton.embed(batch.ids_BT))
    job.work.record("embeddings", {})


def _read_ahead(job: Pass, layer: int) -> None:
    """Ask the disk for the next block, unless so few tokens pass that many of its experts will not be reached."""
    for skeleton in job.chains.values():
        tokens = tokens_of_pass(job.windows)
        if layer < job.num_blocks and tokens * skeleton.layout.top_k >= 8 * skeleton.layout.num_experts:
            skeleton.weights.will_need(skeleton.prefix(layer))


def _run_block(job: Pass, layer: int, visitor: Visitor) -> None:
    visitor.begin(layer)
    with contextlib.ExitStack() as stack:
        blocks: dict[str, Block] = {}
        for name, skeleton in job.chains.items():
            blocks[name] = stack.enter_context(skeleton.block(layer, visitor.observer(name)))
        readers = {name: stack.enter_context(job.hidden(name, layer).reading()) for name in blocks}
        writers = {name: stack.enter_context(job.hidden(name, layer + 1).writing()) for name in blocks}
        for batch in batches(job.windows):
            hidden: dict[str, torch.Tensor] = {}
            for name, block in blocks.items():
                device = job.chains[name].weights.precision.device
                hidden[name] = block(readers[name].rows(batch.start, batch.stop, batch.length).to(device))
                _refuse_non_finite(hidden[name], batch, f"{job.chains[name].weights.checkpoint.where}: block {layer}")
                writers[name].put(batch.start, hidden[name])
            visitor.after(hidden)
            job.progressed(batch.ids_BT.numel() * len(blocks))
    job.work.record(_name(layer), visitor.facts())
    _remove_inputs(job, layer)


def _refuse_non_finite(hidden_BTH: torch.Tensor, batch: Batch, where: str) -> None:
    """Refuse NaN and infinity, which would spoil all that is computed from them."""
    if math.isfinite(float(hidden_BTH.sum(dtype=torch.float32))):  # most often, and at the speed of memory
        return
    bad = (~hidden_BTH.isfinite().all(-1)).nonzero()
    if len(bad):
        row, position = bad[0].tolist()
        raise ExecutionError(
            f"{where}: what leaves it is not finite at position {position} of window {batch.start + row}:"
            f" the model overflows in {str(hidden_BTH.dtype).removeprefix('torch.')}"
        )


def _remove_inputs(job: Pass, layer: int) -> None:
    for name in job.chains:
        job.hidden(name, layer).remove()


# -- what a pass will take ---------------------------------------------------------------------------------------------


_LIBRARIES: Final = 450_000_000  # python, torch, transformers and a tokenizer, resident
_LIVE_STATES: Final = 90  # states that one block holds at its peak: activations, and what reading leaves behind


def estimate(
    checkpoints: Mapping[str, Checkpoint], windows: Windows, precision: Precision, work: Path | None = None
) -> dict[str, Any]:
    """Predict memory, disk and reading of a pass over `windows`; sizes in bytes, free ones where `work` will be.

    Raises:
        FamilyError, SchemeError, CheckpointError: see `Skeleton`.

    """
    blocks = heads = states = read = live = 0
    layers = 0
    for checkpoint in checkpoints.values():
        with Weights(checkpoint, precision) as weights:
            skeleton = Skeleton(weights)
            sizes = Counter[tuple[str, int]]()
            for name, place in weights.layout.places.items():
                if place.scope in ("block", "mtp") and place.layer is not None:
                    sizes[place.scope, place.layer] += _stored_bytes(weights, name)
            blocks += max(sizes.values(), default=0)
            heads += skeleton.head_ref.nbytes
            read += sizes.total()
            layers = skeleton.num_blocks
            state = skeleton.hidden_size * precision.dtype.itemsize
            states += 2 * windows.ids_NT.size * state
            live = max(live, _LIVE_STATES * max(BATCH_TOKENS, windows.ids_NT.shape[1]) * state)
    return {
        "tokens": tokens_of_pass(windows),
        "blocks": layers,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "device": str(precision.device),
        "read_bytes": read,
        "peak_memory_bytes": _LIBRARIES + max(blocks, heads) + live,
        "work_bytes": states,
        "free_disk_bytes": FileSystem().free_bytes(Path.cwd() / (work or "")),
    }


def _stored_bytes(weights: Weights, name: str) -> int:
    """Size at rest; a quantized weight is shown as if in 16 bits, and is at most that."""
    return weights.ref(name).nbytes if weights.has(name) else 0
