"""Evaluating: what a checkpoint predicts on held-out text, and how far it is from another.

Perplexity is taken over all positions of a window but its first. Against a reference: the Kullback-Leibler divergence
of the next-token distributions, KL(reference || checkpoint), the share of positions where both choose the same token,
and for every block how far its output is from the reference's, each on its own chain. Sums are in float64. Where the
windows keep sources of text apart, all but the blocks' errors are also given for each.
"""

# B: sequences, T: positions, N: positions of a piece, H: hidden size, V: vocabulary.

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from shardxform.calibration import Windows
from shardxform.checkpoint import Checkpoint
from shardxform.errors import ExecutionError, Interrupted, PlanError
from shardxform.forward.arithmetic import on_device
from shardxform.forward.experts import Observer
from shardxform.forward.passes import Batch, Pass, batches, fingerprint, run_pass, work_mark
from shardxform.forward.skeleton import Head, Skeleton
from shardxform.forward.weights import Precision, Weights
from shardxform.forward.work import HiddenReader, WorkDir, refuse_inside
from shardxform.progress import OnProgress

__all__ = ["Comparison", "EvaluateOptions", "Evaluation", "evaluate", "evaluation_facts"]

_TESTED: Final = "tested"
_REFERENCE: Final = "reference"
_PIECE_LOGITS: Final = 1 << 24  # logits that are held at once, per model and copy


@dataclass(slots=True, kw_only=True)
class EvaluateOptions:
    """How to evaluate.

    Attributes:
        precision: device and dtype of the computation.
        work: directory for hidden states; removed when the evaluation ends.
        on_progress: called after every batch.

    """

    precision: Precision
    work: Path
    on_progress: OnProgress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A checkpoint against its reference.

    Attributes:
        perplexity: of the reference.
        kl: mean divergence over all positions, in nats.
        kl_error: its standard error over the windows; NaN for a single one.
        top1: share of positions where both choose the same token.
        block_errors: per decoder block, ||output - reference's|| / ||reference's|| over all positions; infinite when
            the reference puts out zeros and the checkpoint does not. Empty for a single source of text.

    """

    perplexity: float
    kl: float
    kl_error: float
    top1: float
    block_errors: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What came of it.

    Attributes:
        perplexity: of the checkpoint.
        windows, tokens: how much text that is of.
        against: the reference, where there is one.
        sources: the same figures for the windows of every source of text, where these were kept apart.

    """

    perplexity: float
    windows: int
    tokens: int
    against: Comparison | None
    sources: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Perplexity over that of the reference; NaN without one, or where neither is finite."""
        return self.perplexity / self.against.perplexity if self.against else math.nan


def evaluate(
    checkpoint: Checkpoint, windows: Windows, options: EvaluateOptions, against: Checkpoint | None = None
) -> Evaluation:
    """Run a checkpoint, a view or a quantized checkpoint, and its reference if one is given, over held-out windows.

    Raises:
        FamilyError, SchemeError, CheckpointError: one of them cannot be run.
        PlanError: the two are not models of the same shape.
        OutputError: the work directory is foreign, in a checkpoint, in use, or on too small a disk.
        ExecutionError: a model gives no finite numbers, or the disk failed.
        Interrupted: every finished block is durable; the same call goes on.

    """
    sources = {_TESTED: checkpoint} | ({_REFERENCE: against} if against else {})
    refuse_inside(options.work, [each.root for each in sources.values()])
    mark = work_mark(fingerprint("evaluate", sources, windows, options.precision), sources)
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_device(options.precision.device))
        chains = {
            name: Skeleton(stack.enter_context(Weights(each, options.precision))) for name, each in sources.items()
        }
        _refuse_other_shapes(chains)
        for skeleton in chains.values():
            skeleton.weights.check()
        work = stack.enter_context(WorkDir(options.work, mark))
        head_tokens = int(windows.lengths_N.sum()) * len(chains)
        job = Pass(windows, chains, work, options.on_progress, head_tokens)
        blocks = run_pass(job, _Differences())
        heads = _run_heads(job)
        work.remove()
    return _evaluation(windows, blocks, heads)


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
    """A visitor that adds up how far the outputs of each block are from the reference's."""

    def __init__(self) -> None:
        self._valid_BT = torch.zeros(0, 0, dtype=torch.bool)
        self.begin(0)

    def begin(self, layer: int) -> None:  # noqa: ARG002
        self._error = self._norm = 0.0

    def before(self, batch: Batch) -> None:
        self._valid_BT = batch.valid_BT

    def after(self, batch: Batch, hidden: Mapping[str, torch.Tensor]) -> None:  # noqa: ARG002
        if _REFERENCE not in hidden:
            return
        here = self._valid_BT.to(hidden[_REFERENCE].device)
        reference_NH = hidden[_REFERENCE][here].float()
        error_NH = hidden[_TESTED][here].float() - reference_NH
        self._error += float(error_NH.square().sum(-1).double().sum())
        self._norm += float(reference_NH.square().sum(-1).double().sum())

    def observer(self, chain: str) -> Observer | None:  # noqa: ARG002
        return None

    def facts(self) -> dict[str, float]:
        return {"error": self._error, "norm": self._norm}


# -- heads ------------------------------------------------------------------------------------------------------------


def _run_heads(job: Pass) -> list[Mapping[str, Any]]:
    """What the output heads make of the hidden states that left the last blocks, batch by batch."""
    steps = [f"head {batch.start}" for batch in batches(job.windows)]
    undone = [name for name in steps if name not in job.work.steps]
    try:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            heads = dict(_heads(job, stack)) if undone else {}
            readers = {name: stack.enter_context(job.hidden(name, job.num_blocks).reading()) for name in heads}
            for name, batch in zip(steps, batches(job.windows), strict=True):
                if name in undone:
                    job.work.record(name, _measure(batch, heads, readers))
                job.progressed(int(batch.valid_BT.sum()) * len(job.chains), resumed=name not in undone)
    except KeyboardInterrupt as e:
        raise Interrupted(
            f"stopped: all {job.num_blocks} blocks are safe in {job.work.root}; run the same command again to go on"
        ) from e
    return [job.work.steps[name] for name in steps]


def _heads(job: Pass, stack: contextlib.ExitStack) -> Iterator[tuple[str, Head]]:
    """Load the head of every chain; one that is the same bytes of the same file is loaded once."""
    loaded: dict[object, torch.Tensor] = {}
    for name, skeleton in job.chains.items():
        place = (skeleton.weights.checkpoint.root, skeleton.head_ref.ranges)
        head = stack.enter_context(skeleton.head(loaded.get(place)))
        loaded[place] = head.weight
        yield name, head


def _measure(batch: Batch, heads: Mapping[str, Head], readers: Mapping[str, HiddenReader]) -> dict[str, Any]:
    """Sums over one batch, per sequence: losses of each chain, divergence, agreement."""
    hidden = {name: reader.rows(batch.start, batch.stop) for name, reader in readers.items()}
    facts: dict[str, list[float]] = {}
    for row in range(batch.stop - batch.start):
        length = int(batch.valid_BT[row].sum())
        ids_T = batch.ids_BT[row, :length]
        sums: dict[str, float] = {}
        for piece in _pieces(length, heads[_TESTED]):
            logits = {name: head.logits(hidden[name][row, piece]) for name, head in heads.items()}
            for key, value in _sums(logits, ids_T[piece.start + 1 : piece.stop + 1]):
                if not math.isfinite(value):
                    raise ExecutionError(f"output head: '{key}' is {value} in window {batch.start + row}")
                sums[key] = sums.get(key, 0.0) + value
        for key, value in {**sums, "positions": length}.items():
            facts.setdefault(key, []).append(value)
    return facts


def _pieces(length: int, head: Head) -> Iterator[slice]:
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


def _evaluation(windows: Windows, blocks: list[Mapping[str, Any]], heads: list[Mapping[str, Any]]) -> Evaluation:
    columns: dict[str, list[float]] = {}
    for facts in heads:
        for key, values in facts.items():
            columns.setdefault(key, []).extend(values)
    errors = tuple(_relative(facts["error"], facts["norm"]) for facts in blocks)
    return replace(
        _figures(columns, errors),
        sources={
            name: _figures({key: values[rows.start : rows.stop] for key, values in columns.items()}, ())
            for name, rows in windows.rows
        },
    )


def _figures(columns: Mapping[str, list[float]], block_errors: tuple[float, ...]) -> Evaluation:
    """What sums over each of some windows come to."""
    windows, tokens = len(columns["positions"]), sum(columns["positions"])
    predicted = tokens - windows
    comparison = None
    if "kl" in columns:
        comparison = Comparison(
            perplexity=_perplexity(columns[f"loss {_REFERENCE}"], predicted),
            kl=sum(columns["kl"]) / tokens,
            kl_error=_standard_error([kl / n for kl, n in zip(columns["kl"], columns["positions"], strict=True)]),
            top1=sum(columns["agree"]) / tokens,
            block_errors=block_errors,
        )
    return Evaluation(
        perplexity=_perplexity(columns[f"loss {_TESTED}"], predicted),
        windows=windows,
        tokens=int(tokens),
        against=comparison,
    )


def _relative(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else math.inf if error else 0.0


def _perplexity(losses: list[float], predicted: float) -> float:
    mean = math.fsum(losses) / predicted
    return math.exp(mean) if mean < 700 else math.inf


def _standard_error(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def evaluation_facts(found: Evaluation, windows: Windows) -> dict[str, Any]:
    """An evaluation as plain data: the same for the same inputs; None for what is infinite or not known."""
    against = found.against
    facts = {
        **_measured(found),
        "data": dict(windows.provenance),
        "against": against
        and {**_compared(against), "block_errors": [_number(error) for error in against.block_errors]},
    }
    if found.sources:
        facts["sources"] = {
            name: {**_measured(each), "against": each.against and _compared(each.against)}
            for name, each in found.sources.items()
        }
    return facts


def _measured(found: Evaluation) -> dict[str, Any]:
    return {"perplexity": _number(found.perplexity), "windows": found.windows, "tokens": found.tokens}


def _compared(against: Comparison) -> dict[str, Any]:
    return {
        "perplexity": _number(against.perplexity),
        "kl": against.kl,
        "kl_standard_error": _number(against.kl_error),
        "top1_agreement": against.top1,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
