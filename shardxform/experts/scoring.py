"""Scoring: one forward pass over calibration data that says what every routed expert does.

REAP (Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", 2025) weighs the norm of an
expert's output by the router's weight, over the tokens routed to it. Its sums, those of its relatives, and counts are
kept apart in a `Saliency`, of which every criterion is made and which add up over data sets and machines.
"""

# E: experts, n: tokens of one expert, H: hidden size, B: sequences, T: positions.

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shardxform import __version__
from shardxform.base import computing, interrupts
from shardxform.base.progress import OnProgress
from shardxform.calibration import Windows
from shardxform.checkpoint.identity import names_of
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ExecutionError, FamilyError, Interrupted, OutputError
from shardxform.execution.output import difference
from shardxform.experts import ExpertStats, Saliency, difference_of_models
from shardxform.experts.weighing import model_facts
from shardxform.forward.passes import Pass, batches, fingerprint, pass_inputs, run_pass
from shardxform.forward.runtime import on_device
from shardxform.forward.skeleton import Skeleton, mtp_layer, mtp_numbers
from shardxform.forward.weights import Observer, Precision, Routed, Weights
from shardxform.forward.work import HiddenFile, WorkDir, refuse_inside

__all__ = [
    "ScoreOptions",
    "Scorer",
    "difference_of_runs",
    "remove_work",
    "run_facts",
    "score",
    "score_inputs",
]

_CHAIN: Final = "scored"
_COMPARED: Final = ("windows", "dtype", "device", "family")  # of runs that are finished
_STATS: Final = ("count", "reap", "ean", "gate", "peak", "square", "energy")
_ADDED: Final = ("reap", "ean", "gate", "square", "energy")

Store = Callable[[int, NDArray[np.float64]], None]
"""Takes a layer and the sums of its channels, [E, I]."""


@dataclass(slots=True, kw_only=True)
class ScoreOptions:
    """How to score.

    Attributes:
        precision: device and dtype of the computation.
        work: directory for hidden states; removed by the caller when its result is safe.
        channels: also say what each channel of every expert gives to its output, so that experts can be narrowed.
        on_progress: called after every batch.

    """

    precision: Precision
    work: Path
    channels: bool = False
    on_progress: OnProgress | None = None


def score(source: Checkpoint, windows: Windows, options: ScoreOptions) -> Saliency:
    """Run `source` over `windows` and gather the statistics of every MoE layer, MTP layers included.

    Raises:
        FamilyError: the family has no experts, or transformers does not run it.
        CheckpointError: a tensor is missing or has the wrong shape.
        OutputError: the work directory is foreign, in the source, in use, or on too small a disk.
        ExecutionError: the model gives no finite numbers, or the disk failed.
        Interrupted: every finished block is durable; the same call goes on.

    """
    refuse_inside(options.work, [source.root])
    inputs = score_inputs(source, windows, options)
    with on_device(options.precision.device), Weights(source, options.precision) as weights:
        skeleton = Skeleton(weights)
        layout = skeleton.layout
        if not layout.moe_layers:
            raise FamilyError(f"{source.where}: no layer has experts; there is nothing to score")
        skeleton.refuse_longer(windows)
        numbers = mtp_numbers(skeleton)
        weights.check(numbers)
        with WorkDir(options.work, inputs) as work:
            extra = windows.ids_NT.size * len(numbers)
            job = Pass(windows, {_CHAIN: skeleton}, work, options.on_progress, extra)
            channels = _Channels(work, layout.num_experts, wanted=options.channels)
            facts = run_pass(job, Scorer(layout.num_experts, store=channels.store("block")))
            mtp = _score_mtp(job, skeleton, numbers, channels.store("mtp"))
            found = {layer: _stats(facts[layer], channels.read("block", layer)) for layer in layout.moe_layers}
            of_mtp = {at: _stats(each, channels.read("mtp", at)) for at, each in enumerate(mtp)}
    return Saliency(
        model=model_facts(source, layout),
        layers=found,
        mtp_layers=of_mtp,
        tokens=windows.ids_NT.size,
        runs=(run_facts(windows, inputs),),
    )


def run_facts(windows: Windows, inputs: Mapping[str, object]) -> dict[str, Any]:
    """What a `Saliency` says of a run over `windows` with these inputs."""
    computed = {key: inputs[key] for key in (*_COMPARED, computing.KEY) if key in inputs}
    made = {"tool": f"shardxform {__version__}", **windows.provenance}
    return {**made, **computed, "fingerprint": fingerprint(inputs)}


def score_inputs(source: Checkpoint, windows: Windows, options: ScoreOptions) -> dict[str, Any]:
    """What decides the numbers of a scoring run, by name.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    purpose = "score channels" if options.channels else "score"
    return pass_inputs(purpose, {_CHAIN: source}, windows, options.precision)


def difference_of_runs(found: Saliency, source: Checkpoint, windows: Windows, options: ScoreOptions) -> str:
    """Say in what a finished scoring differs from the run that is asked for; empty where it is that run's.

    What computed it does not count: it is finished.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    inputs = score_inputs(source, windows, options)
    if [run.get("fingerprint") for run in found.runs] == [fingerprint(inputs)]:
        return ""
    if len(found.runs) != 1:
        return f"it adds up {len(found.runs)} runs"
    if where := difference_of_models(found.model, model_facts(source), names_of(source.shards)):
        return where
    now = {key: inputs[key] for key in _COMPARED if key in inputs}
    before = {key: found.runs[0][key] for key in _COMPARED if key in found.runs[0]}
    return difference(before, now) or "of an earlier version"


def remove_work(source: Checkpoint, windows: Windows, options: ScoreOptions) -> None:
    """Remove what this run, or one that was killed when it had its result, left; what is of others stays."""
    if options.work.is_dir():
        inputs = score_inputs(source, windows, options)
        with contextlib.suppress(OutputError), WorkDir(options.work, inputs) as work:
            work.remove()


class Scorer:
    """A visitor that adds up what experts put out.

    `kind` is what its layers are called in messages; `store` takes the sums of every channel of a layer, [E, I], where
    these are wanted.
    """

    def __init__(self, num_experts: int, kind: str = "block", store: Store | None = None) -> None:
        self._num_experts = num_experts
        self._kind = kind
        self._store = store
        self.begin(0)

    def begin(self, layer: int) -> None:
        """Start from zero."""
        self._layer = layer
        self._sums = {name: np.zeros(self._num_experts, np.float64) for name in _STATS}
        self._channels = np.zeros((0, 0), np.float64)

    def after(self, hidden: Mapping[str, torch.Tensor]) -> None:
        """Blocks as a whole do not matter here."""

    def observer(self, chain: str) -> Observer:  # noqa: ARG002
        """Add up what every expert puts out."""
        return self._add

    def _add(self, seen: Routed) -> None:
        expert, value_nH = seen.expert, seen.value_nH.float()
        norm_n = value_nH.norm(dim=-1).double()
        gate_n = seen.weight_n.double()
        peak = torch.linalg.vector_norm(value_nH, ord=torch.inf).double()
        square_nI = seen.inner_nI.float().square()
        energy = square_nI.sum(dim=-1).double().sum()
        if self._store is not None:
            self._add_channels(expert, square_nI, gate_n, seen.down_HI)
        sums = (norm_n @ gate_n, norm_n.sum(), gate_n.sum(), norm_n @ norm_n, energy)
        *added, largest = torch.stack((*sums, peak)).tolist()
        self._sums["count"][expert] += len(gate_n)
        for name, value in zip(_ADDED, added, strict=True):
            self._sums[name][expert] += value
        self._sums["peak"][expert] = max(self._sums["peak"][expert], largest)

    def _add_channels(self, expert: int, square_nI: torch.Tensor, gate_n: torch.Tensor, down_HI: torch.Tensor) -> None:
        """Add what each channel gives: (g a)^2 times the squared norm of its column of the down projection."""
        given_I = (gate_n.square()[None] @ square_nI.double())[0] * down_HI.float().square().sum(dim=0).double()
        if not self._channels.size:
            self._channels = np.zeros((self._num_experts, len(given_I)), np.float64)
        self._channels[expert] += given_I.cpu().numpy()

    def facts(self) -> dict[str, list[float]]:
        """The sums, one number an expert; those of channels are stored.

        Raises:
            ExecutionError: names an expert whose sums are not finite.

        """
        for name, values in self._sums.items():
            if len(bad := np.flatnonzero(~np.isfinite(values))):
                raise ExecutionError(f"{self._kind} {self._layer}: '{name}' of expert {bad[0]} is {values[bad[0]]}")
        if self._store is not None and self._channels.size:
            self._store(self._layer, self._channels)
        return {name: values.tolist() for name, values in self._sums.items()}


def _score_mtp(job: Pass, skeleton: Skeleton, numbers: range, store: Store | None = None) -> list[Mapping[str, Any]]:
    """Statistics of the MTP layers, which take what leaves the last block."""
    scorer = Scorer(skeleton.layout.num_experts, "MTP layer", store)
    try:
        with interrupts.deferred():
            for layer in numbers:
                done = f"mtp {layer}" in job.work.steps
                if not done:
                    _run_mtp(job, skeleton, layer, scorer, more=layer + 1 in numbers)
                job.progressed(job.block_tokens, resumed=done)
    except KeyboardInterrupt as e:
        raise Interrupted(
            f"stopped: all {job.num_blocks} blocks are safe in {job.work.root}; run the same command again to go on"
        ) from e
    return [job.work.steps[f"mtp {layer}"] for layer in numbers]


@torch.no_grad()
def _run_mtp(job: Pass, skeleton: Skeleton, layer: int, scorer: Scorer, *, more: bool) -> None:
    """Score one MTP layer on what left the last block, normed, or the MTP layer before; keep what a next one takes."""
    scorer.begin(layer)
    entering, leaving = (job.hidden(_CHAIN, skeleton.num_blocks + layer + k) for k in (0, 1))
    device = skeleton.weights.precision.device
    with contextlib.ExitStack() as stack:
        norm = stack.enter_context(skeleton.final_norm()) if layer == 0 else None
        run = stack.enter_context(mtp_layer(skeleton, layer, scorer.observer(_CHAIN)))
        reader = stack.enter_context(entering.reading())
        writer = stack.enter_context(leaving.writing()) if more else None
        for batch in batches(job.windows):
            interrupts.check()
            hidden_BTH = reader.rows(batch.start, batch.stop).to(device)
            length = hidden_BTH.shape[1] - layer
            hidden_BTH = norm(hidden_BTH).to(hidden_BTH.dtype) if norm else hidden_BTH[:, :length]
            out_BTH = run(batch.ids_BT[:, layer:], hidden_BTH)
            if writer:
                writer.put(batch.start, nn.functional.pad(out_BTH, (0, 0, 0, layer + 1)))
    job.work.record(f"mtp {layer}", scorer.facts())


def _stats(facts: Mapping[str, Sequence[float]], channels_EI: NDArray[np.float32] | None = None) -> ExpertStats:
    arrays = {f"{name}_E": np.array(facts[name], np.float64) for name in _STATS if name != "count"}
    return ExpertStats(count_E=np.array(facts["count"], np.int64), **arrays, channels_EI=channels_EI)


class _Channels:
    """What each channel gave, kept in the work directory beside the hidden states until the run is done."""

    def __init__(self, work: WorkDir, experts: int, *, wanted: bool) -> None:
        self._work = work
        self._experts = experts
        self._wanted = wanted

    def store(self, kind: str) -> Store | None:
        """Take the sums of a layer; durable before the layer is. None where they are not wanted."""
        if not self._wanted:
            return None

        def put(layer: int, channels_EI: NDArray[np.float64]) -> None:
            with self._file(kind, layer, channels_EI.shape[1]).writing() as out:
                out.put(0, torch.from_numpy(channels_EI.astype(np.float32))[..., None])

        return put

    def read(self, kind: str, layer: int) -> NDArray[np.float32] | None:
        """Give the sums of a layer, float32 [E, I]; None where they are not wanted.

        Raises:
            ExecutionError: they are gone.

        """
        if not self._wanted:
            return None
        file = self._file(kind, layer, 1)
        size = file.path.stat().st_size if file.path.is_file() else 0
        with self._file(kind, layer, max(1, size // (4 * self._experts))).reading() as reader:
            found: NDArray[np.float32] = reader.rows(0, self._experts)[..., 0].numpy()
        return found

    def _file(self, kind: str, layer: int, channels: int) -> HiddenFile:
        shape = (self._experts, channels, 1)
        return self._work.hidden(f"channels{'mtp' if kind == 'mtp' else ''}", layer, shape, torch.float32)
