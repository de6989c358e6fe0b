"""Evaluating: what a checkpoint predicts on held-out text, and how far it is from another.

Perplexity is taken over all positions of a window but its first. Against a reference: the Kullback-Leibler divergence
of the next-token distributions, KL(reference || checkpoint), the share of positions where both choose the same token,
and for every block how far its output is from the reference's, each on its own chain. Sums are in float64. Where the
windows keep sources of text apart, all but the blocks' errors are also given for each. Figures have standard errors,
those of comparisons from differences window by window: see `standard_errors`.
"""

# B: sequences, T: positions, N: positions of a piece, H: hidden size, V: vocabulary.

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from shardxform.base import interrupts
from shardxform.base.progress import OnProgress
from shardxform.base.standard_errors import Sampling, mean, standard_error
from shardxform.calibration import Windows
from shardxform.checkpoint.identity import identify
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ExecutionError, Interrupted, PlanError
from shardxform.evaluation.routing import Load, kept_ids, load_of
from shardxform.forward.passes import Batch, Pass, batches, pass_inputs, run_pass
from shardxform.forward.runtime import on_device
from shardxform.forward.skeleton import OutputHead, Skeleton
from shardxform.forward.weights import Observer, Precision, Routed, Weights
from shardxform.forward.work import HiddenReader, WorkDir, refuse_inside

__all__ = ["Comparison", "EvaluateOptions", "Evaluation", "evaluate", "evaluation_facts", "identified"]

_TESTED: Final = "tested"
_REFERENCE: Final = "reference"
_PIECE_LOGITS: Final = 1 << 24  # logits that are held at once, per model and copy
_LARGEST: Final = 700.0  # loss whose exponential is a number


@dataclass(slots=True, kw_only=True)
class EvaluateOptions:
    """How to evaluate.

    Attributes:
        precision: device and dtype of the computation.
        against_dtype: that of the reference's, if it is another. A checkpoint in bfloat16 held against itself in
            float32 shows what bfloat16 alone does to the figures: the floor below which they say nothing of weights.
        work: directory for hidden states; removed when the evaluation ends.
        on_progress: called after every batch.

    """

    precision: Precision
    work: Path
    against_dtype: torch.dtype | None = None
    on_progress: OnProgress | None = None

    @property
    def against(self) -> Precision:
        """Device and dtype of the reference's computation."""
        return replace(self.precision, dtype=self.against_dtype or self.precision.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A checkpoint against its reference.

    Attributes:
        perplexity: of the reference.
        kl: mean divergence over all positions, in nats.
        top1: share of positions where both choose the same token.
        perplexity_error, kl_error, top1_error: their standard errors; NaN for a single window.
        ratio_error: standard error of `Evaluation.ratio`, from the windows' differences in loss.
        dtype: that the reference was computed in.
        block_errors: per decoder block, ||output - reference's|| / ||reference's|| over all positions; infinite when
            the reference puts out zeros and the checkpoint does not. Empty for a single source of text.
        loads: per MoE layer, how the router's choices changed; empty where it is not known which experts are which.

    """

    perplexity: float
    kl: float
    kl_error: float
    top1: float
    block_errors: tuple[float, ...]
    perplexity_error: float = math.nan
    ratio_error: float = math.nan
    top1_error: float = math.nan
    dtype: str = ""
    loads: Mapping[int, Load] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What came of it.

    Attributes:
        perplexity: of the checkpoint.
        perplexity_error: its standard error; NaN for a single window.
        windows, tokens: how much text that is of.
        against: the reference, where there is one.
        dtype: that the checkpoint was computed in.
        sources: the same figures for the windows of every source of text, where these were kept apart.

    """

    perplexity: float
    windows: int
    tokens: int
    against: Comparison | None
    perplexity_error: float = math.nan
    dtype: str = ""
    sources: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Perplexity over that of the reference; NaN without one, or where neither is finite."""
        return self.perplexity / self.against.perplexity if self.against else math.nan


def evaluate(
    checkpoint: Checkpoint,
    windows: Windows,
    options: EvaluateOptions,
    against: Checkpoint | None = None,
    keep: Mapping[int, Sequence[int]] | None = None,
) -> Evaluation:
    """Run a checkpoint, a view or a quantized checkpoint, and its reference if one is given, over held-out windows.

    Args:
        checkpoint: what is measured.
        windows: held-out text.
        options: how.
        against: the reference.
        keep: layer -> experts of the reference that the checkpoint has, empty for all; None for what records say.

    Raises:
        FamilyError, SchemeError, CheckpointError: one of them cannot be run.
        PlanError: the two are not models of the same shape.
        OutputError: the work directory is foreign, in a checkpoint, in use, or on too small a disk.
        ExecutionError: a model gives no finite numbers, or the disk failed.
        Interrupted: every finished block is durable; the same call goes on.

    """
    sources = {_TESTED: checkpoint} | ({_REFERENCE: against} if against else {})
    refuse_inside(options.work, [each.root for each in sources.values()])
    precisions = {_TESTED: options.precision, _REFERENCE: options.against}
    purpose = "evaluate" + ("" if options.against == options.precision else f" against {_name(options.against)}")
    inputs = pass_inputs(purpose, sources, windows, options.precision)
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_device(options.precision.device))
        chains = {
            name: Skeleton(stack.enter_context(Weights(each, precisions[name]))) for name, each in sources.items()
        }
        _refuse_other_shapes(chains)
        for skeleton in chains.values():
            skeleton.refuse_longer(windows)
            skeleton.weights.check()
        work = stack.enter_context(WorkDir(options.work, inputs))
        head_tokens = windows.ids_NT.size * len(chains)
        job = Pass(windows, chains, work, options.on_progress, head_tokens)
        blocks = run_pass(job, _Differences({name: chain.layout.num_experts for name, chain in chains.items()}))
        heads = _run_heads(job)
        work.remove()
    found = _evaluation(windows, blocks, heads)
    loads = dict(_loads(blocks, keep if keep is not None else kept_ids(checkpoint, against))) if against else {}
    compared = found.against and replace(found.against, dtype=_name(options.against), loads=loads)
    return replace(found, dtype=_name(options.precision), against=compared)


def _loads(blocks: Sequence[Mapping[str, Any]], keep: Mapping[int, Sequence[int]] | None) -> Iterator[tuple[int, Load]]:
    if keep is None:
        return
    for layer, facts in enumerate(blocks):
        counts = facts["routed"]
        if counts and (load := load_of(counts[_TESTED], counts[_REFERENCE], layer, keep)):
            yield layer, load


def _name(precision: Precision) -> str:
    return str(precision.dtype).removeprefix("torch.")


def _refuse_other_shapes(chains: Mapping[str, Skeleton]) -> None:
    if _REFERENCE not in chains:
        return
    tested, reference = chains[_TESTED], chains[_REFERENCE]
    for what in ("num_blocks", "hidden_size", "vocab_size"):
        found, wanted = getattr(tested, what), getattr(reference, what)
        if found != wanted:
            raise PlanError(
                f"{tested.weights.checkpoint.where}: {what} is {found}, but {wanted} in the reference"
                f" {reference.weights.checkpoint.where}; expected models of the same shape"
            )


class _Differences:
    """A visitor that adds up how far the outputs of each block are from the reference's, and counts routed tokens."""

    def __init__(self, num_experts: Mapping[str, int]) -> None:
        self._num_experts = num_experts
        self.begin(0)

    def begin(self, layer: int) -> None:  # noqa: ARG002
        self._error = self._norm = 0.0
        self._routed = {name: [0] * count for name, count in self._num_experts.items()}

    def after(self, hidden: Mapping[str, torch.Tensor]) -> None:
        if _REFERENCE not in hidden:
            return
        reference_NH = hidden[_REFERENCE].flatten(0, 1).float()
        error_NH = hidden[_TESTED].flatten(0, 1).float() - reference_NH
        self._error += float(error_NH.square().sum(-1).double().sum())
        self._norm += float(reference_NH.square().sum(-1).double().sum())

    def observer(self, chain: str) -> Observer | None:
        if _REFERENCE not in self._num_experts:
            return None
        routed = self._routed[chain]

        def count(seen: Routed) -> None:
            routed[seen.expert] += len(seen.weight_n)

        return count

    def facts(self) -> dict[str, Any]:
        routed = self._routed if any(map(any, self._routed.values())) else {}
        return {"error": self._error, "norm": self._norm, "routed": routed}


# -- heads ------------------------------------------------------------------------------------------------------------


def _run_heads(job: Pass) -> list[Mapping[str, Any]]:
    """What the output heads make of the hidden states that left the last blocks, batch by batch."""
    steps = [f"head {batch.start}" for batch in batches(job.windows)]
    undone = [name for name in steps if name not in job.work.steps]
    try:
        with interrupts.deferred(), torch.no_grad(), contextlib.ExitStack() as stack:
            heads = dict(_heads(job, stack)) if undone else {}
            readers = {name: stack.enter_context(job.hidden(name, job.num_blocks).reading()) for name in heads}
            for name, batch in zip(steps, batches(job.windows), strict=True):
                if name in undone:
                    job.work.record(name, _measure(batch, heads, readers))
                job.progressed(batch.ids_BT.numel() * len(job.chains), resumed=name not in undone)
    except KeyboardInterrupt as e:
        raise Interrupted(
            f"stopped: all {job.num_blocks} blocks are safe in {job.work.root}; run the same command again to go on"
        ) from e
    return [job.work.steps[name] for name in steps]


def _heads(job: Pass, stack: contextlib.ExitStack) -> Iterator[tuple[str, OutputHead]]:
    """Load the head of every chain; one that is the same bytes of the same file is loaded once."""
    loaded: dict[object, torch.Tensor] = {}
    for name, skeleton in job.chains.items():
        place = (skeleton.weights.checkpoint.root, skeleton.head_ref.ranges)
        head = stack.enter_context(skeleton.head(loaded.get(place)))
        loaded[place] = head.weight
        yield name, head


def _measure(batch: Batch, heads: Mapping[str, OutputHead], readers: Mapping[str, HiddenReader]) -> dict[str, Any]:
    """Sums over one batch, per sequence: losses of each chain, divergence, agreement."""
    hidden = {name: reader.rows(batch.start, batch.stop) for name, reader in readers.items()}
    facts: dict[str, list[float]] = {}
    for row in range(batch.stop - batch.start):
        ids_T, length = batch.ids_BT[row], batch.ids_BT.shape[1]
        sums: dict[str, float] = {}
        for piece in _pieces(length, heads[_TESTED]):
            interrupts.check()
            logits = {name: head.logits(hidden[name][row, piece]) for name, head in heads.items()}
            for key, value in _sums(logits, ids_T[piece.start + 1 : piece.stop + 1]):
                if not math.isfinite(value):
                    raise ExecutionError(f"output head: '{key}' is {value} in window {batch.start + row}")
                sums[key] = sums.get(key, 0.0) + value
        for key, value in {**sums, "positions": length}.items():
            facts.setdefault(key, []).append(value)
    return facts


def _pieces(length: int, head: OutputHead) -> Iterator[slice]:
    size = max(1, _PIECE_LOGITS // len(head.weight))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _sums(logits: Mapping[str, torch.Tensor], targets_N: torch.Tensor) -> Iterator[tuple[str, float]]:
    """Sums over the positions of a piece; the window's last position predicts nothing that is known."""
    logp = {name: values.float().log_softmax(-1) for name, values in logits.items()}
    for name, logp_NV in logp.items():
        known_NV = logp_NV[: len(targets_N)]
        found_N = known_NV.gather(-1, targets_N.to(known_NV.device)[:, None])
        yield f"loss {name}", -float(found_N.double().sum())
    if _REFERENCE in logp:
        reference_NV, tested_NV = logp[_REFERENCE], logp[_TESTED]
        divergence_N = (reference_NV.exp() * (reference_NV - tested_NV)).sum(-1)
        yield "kl", float(divergence_N.double().sum())
        yield "agree", float((reference_NV.argmax(-1) == tested_NV.argmax(-1)).sum())


# -- results ----------------------------------------------------------------------------------------------------------


def _evaluation(
    windows: Windows, blocks: list[Mapping[str, Any]], heads: list[Mapping[str, list[float]]]
) -> Evaluation:
    columns: dict[str, list[float]] = {}
    for facts in heads:
        for key, values in facts.items():
            columns.setdefault(key, []).extend(values)
    errors = tuple(_relative(facts["error"], facts["norm"]) for facts in blocks)
    joined = bool(windows.provenance.get("pack", True))
    every = tuple(rows for _, rows in windows.rows) or (range(len(windows.ids_NT)),)
    figures = _Figures(columns, Sampling(every, joined))
    apart = {name: _Figures(_rows(columns, rows), Sampling((range(len(rows)),), joined)) for name, rows in windows.rows}
    return replace(figures.evaluation(errors), sources={name: each.evaluation(()) for name, each in apart.items()})


def _rows(columns: Mapping[str, list[float]], rows: range) -> Mapping[str, list[float]]:
    return {key: values[rows.start : rows.stop] for key, values in columns.items()}


@dataclass(frozen=True, slots=True)
class _Figures:
    """What sums over each of some windows come to."""

    columns: Mapping[str, list[float]]
    sampling: Sampling

    def evaluation(self, block_errors: tuple[float, ...]) -> Evaluation:
        """All figures; those of the blocks are known already."""
        perplexity, error = self._perplexity(self.columns[f"loss {_TESTED}"])
        return Evaluation(
            perplexity=perplexity,
            perplexity_error=error,
            windows=len(self._positions),
            tokens=int(math.fsum(self._positions)),
            against=self._comparison(block_errors) if "kl" in self.columns else None,
        )

    def _comparison(self, block_errors: tuple[float, ...]) -> Comparison:
        tested, reference = (self.columns[f"loss {name}"] for name in (_TESTED, _REFERENCE))
        perplexity, error = self._perplexity(reference)
        return Comparison(
            perplexity=perplexity,
            perplexity_error=error,
            ratio_error=self._perplexity([a - b for a, b in zip(tested, reference, strict=True)])[1],
            kl=mean(self.columns["kl"], self._positions),
            kl_error=self._error(self.columns["kl"], self._positions),
            top1=mean(self.columns["agree"], self._positions),
            top1_error=self._error(self.columns["agree"], self._positions),
            block_errors=block_errors,
        )

    @property
    def _positions(self) -> list[float]:
        return self.columns["positions"]

    def _perplexity(self, losses: list[float]) -> tuple[float, float]:
        """The exponential of a mean loss, and its standard error: its own size times that of the mean (delta method).

        Of differences of losses it is the ratio of two perplexities.
        """
        predicted = [positions - 1 for positions in self._positions]
        loss = mean(losses, predicted)
        found = math.exp(loss) if loss < _LARGEST else math.inf
        return found, found * self._error(losses, predicted)

    def _error(self, sums: list[float], counts: list[float]) -> float:
        return standard_error(sums, counts, self.sampling)


def _relative(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else math.inf if error else 0.0


def evaluation_facts(found: Evaluation, windows: Windows) -> dict[str, Any]:
    """An evaluation as plain data: the same for the same inputs; None for what is infinite or not known."""
    against = found.against
    facts = {**_measured(found), "dtype": found.dtype, "data": dict(windows.provenance), "against": None}
    if against:
        errors = [_number(error) for error in against.block_errors]
        facts["against"] = {**_compared(found, against), "dtype": against.dtype, "block_errors": errors}
        facts["against"]["routing"] = {str(layer): asdict(load) for layer, load in against.loads.items()}
    if found.sources:
        facts["sources"] = {
            name: {**_measured(each), "against": each.against and _compared(each, each.against)}
            for name, each in found.sources.items()
        }
    return facts


def identified(facts: Mapping[str, Any], tested: Checkpoint, reference: Checkpoint | None) -> dict[str, Any]:
    """Facts of an evaluation with what they are of, and against what: figures of other values are published by nobody.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    beside = {"against": {**facts["against"], "identity": identify(reference).described()}} if reference else {}
    return {"identity": identify(tested).described(), **facts, **beside}


def _measured(found: Evaluation) -> dict[str, Any]:
    return {
        "perplexity": _number(found.perplexity),
        "perplexity_standard_error": _number(found.perplexity_error),
        "windows": found.windows,
        "tokens": found.tokens,
    }


def _compared(found: Evaluation, against: Comparison) -> dict[str, Any]:
    return {
        "perplexity": _number(against.perplexity),
        "perplexity_standard_error": _number(against.perplexity_error),
        "perplexity_ratio": _number(found.ratio),
        "perplexity_ratio_standard_error": _number(against.ratio_error),
        "kl": against.kl,
        "kl_standard_error": _number(against.kl_error),
        "top1_agreement": against.top1,
        "top1_standard_error": _number(against.top1_error),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
