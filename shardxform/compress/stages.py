"""The stages: each a call of the library, its results put into the folder.

A stage is carried out as often as it takes: killed at any instant it goes on where the library goes on. Which stages
are to be done, and in which order, is the driver's business.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shardxform.ask.manifest import Manifest, manifest_text
from shardxform.base.progress import OnProgress
from shardxform.base.strict_json import JsonError, parse_object, pretty
from shardxform.checkpoint.table import Checkpoint
from shardxform.compress.folder import EVALUATION, KEEP, SALIENCY, work_of
from shardxform.compress.job import Job, choice_of
from shardxform.compress.prepared import following, plan_for
from shardxform.compress.request import CARD, EVALUATE, QUANTIZE, SCORE, SELECT, VERIFY
from shardxform.compress.showing import make_card, remove_card
from shardxform.errors import ExecutionError, ResumeError
from shardxform.execution.output import is_of, state_of
from shardxform.execution.runner import Report, RunOptions, run
from shardxform.model.layout import layout_of
from shardxform.plan.plan import Plan

if TYPE_CHECKING:
    from shardxform.execution.options import StepTuner

__all__ = ["MAKERS", "clean", "is_complete", "start"]

_Result = TypeVar("_Result")


# -- score, select ----------------------------------------------------------------------------------------------------


def _score(job: Job, on_progress: OnProgress | None) -> None:
    from shardxform.experts.scoring import ScoreOptions, score

    request = job.request
    assert request.score_windows is not None
    assert request.precision is not None
    work, windows = work_of(job.folder.root, SCORE), request.score_windows
    options = ScoreOptions(precision=request.precision, work=work, on_progress=on_progress)
    saliency = _going_on(job, work, lambda: score(request.source, windows, options))
    job.folder.put(SCORE, {SALIENCY: saliency.to_bytes()}, {"tokens": saliency.tokens})
    clean(job)


def clean(job: Job) -> None:
    """Remove the hidden states of scoring, whose result is safe; a kill may have left them."""
    from shardxform.experts.scoring import ScoreOptions, remove_work

    request, work = job.request, work_of(job.folder.root, SCORE)
    if request.score_windows is not None and request.precision is not None and work.is_dir():
        remove_work(request.source, request.score_windows, ScoreOptions(precision=request.precision, work=work))


def _select(job: Job, _on_progress: OnProgress | None) -> None:
    choice = choice_of(job)
    assert job.request.pruning is not None
    data = manifest_text(choice.manifest(job.request.pruning.ratio)).encode()
    layers = [*choice.layers.values(), *choice.mtp_layers.values()]
    shares = [layer.saliency_kept for layer in layers if layer.saliency_kept is not None]
    facts = {
        "criterion": choice.criterion,
        "experts": choice.saliency.num_experts,
        "kept": choice.num_kept,
        "saliency_kept": math.fsum(shares) / len(shares) if shares else None,
        "never_reached_kept": sum(layer.unreached_kept for layer in layers),
        "never_reached_pruned": sum(layer.unreached_pruned for layer in layers),
    }
    job.folder.put(SELECT, {KEEP: data}, facts)


# -- quantize ---------------------------------------------------------------------------------------------------------


def _quantize(job: Job, on_progress: OnProgress | None) -> Report:
    plan = _plan(job)
    try:
        report = _run(job, plan, on_progress, force=False)
    except ResumeError:
        if not job.settings.force:
            raise
        remove_card(job)
        job.folder.begin(QUANTIZE, job.prepared.inputs[QUANTIZE], following(QUANTIZE))
        report = _run(job, plan, on_progress, force=True)
    job.folder.put(QUANTIZE, {}, {"plan": plan.fingerprint})
    return report


def _run(job: Job, plan: Plan, on_progress: OnProgress | None, *, force: bool) -> Report:
    settings = job.settings
    device = "cpu" if job.request.recipe else settings.device
    with _tuner(job, plan, needed=force or not is_complete(job)) as tuner:
        options = RunOptions(jobs=settings.jobs, device=device, force=force, tuner=tuner, on_progress=on_progress)
        return run(plan, job.request.out, options)


def _plan(job: Job) -> Plan:
    """The plan, with the experts that were chosen."""
    return plan_for(job.request, _manifest(job))


def is_complete(job: Job) -> bool:
    """Whether the output is there, of this plan; the run looks at its files."""
    plan = _plan(job)
    state = state_of(job.request.out, plan)
    return state.name == "finished" and is_of(state, plan)


def _manifest(job: Job) -> Manifest | None:
    if job.request.pruning is None:
        return None
    job.folder.read(SELECT, KEEP)
    source = job.request.source
    return Manifest.load(job.folder.root / KEEP, layout_of(source.config, source.tensors, source.where))


@contextlib.contextmanager
def _tuner(job: Job, plan: Plan, *, needed: bool) -> Iterator[StepTuner | None]:
    """What tunes the blocks of the plan; None where nothing is left to tune."""
    request = job.request
    windows, precision = request.tune_windows, request.tuned_in
    if windows is None or precision is None or not needed:
        yield None
        return
    import torch

    from shardxform.plan.steps import TuneBlock
    from shardxform.tuning.session import Tuner, TunerOptions

    layers = [step.layer for step in plan.steps if isinstance(step, TuneBlock)]
    options = TunerOptions(precision=precision, threads=torch.get_num_threads())
    original = request.source if request.recipe and request.recipe.heal else None
    with Tuner(plan.view, windows, layers, options, original) as tuner:
        yield tuner


# -- verify, evaluate -------------------------------------------------------------------------------------------------


def _verify(job: Job, on_progress: OnProgress | None) -> None:
    from shardxform.verification import verify

    out, source, full = job.request.out, job.request.source, job.settings.full_verify
    report = verify(out, source=source, quick=not full, written=True, jobs=job.settings.jobs, on_progress=on_progress)
    if not report.sound:
        first, more = report.problems[0], len(report.problems) - 1
        others = f" and {more} more problem{'s' * (more > 1)}" if more else ""
        raise ExecutionError(
            f"{out}: not sound: {first.where}: {first.message}{others}; see"
            f" `shardxform verify {out}`, with `source` {source.where}"
        )
    facts: dict[str, Any] = {"full": full, "tensors": report.tensors, "experts": report.experts}
    facts |= {
        "warnings": len(report.warnings),
        "bytes_scanned": report.bytes_scanned,
        "tensors_digested": report.tensors_digested,
        "bytes_compared": report.bytes_compared,
    }
    facts |= {"values_compared": report.values_compared, "values_left": dict(report.values_left)}
    job.folder.put(VERIFY, {}, facts)


def _evaluate(job: Job, on_progress: OnProgress | None) -> None:
    from shardxform.evaluation.evaluate import EvaluateOptions, evaluate, evaluation_facts, identified

    request = job.request
    assert request.eval_windows is not None
    assert request.precision is not None
    work, windows = work_of(job.folder.root, EVALUATE), request.eval_windows
    options = EvaluateOptions(precision=request.precision, work=work, on_progress=on_progress)
    tested = Checkpoint.open(request.out)
    found = _going_on(job, work, lambda: evaluate(tested, windows, options, request.source))
    facts = identified(evaluation_facts(found, windows), tested, request.source)
    job.folder.put(EVALUATE, {EVALUATION: pretty(facts).encode()})


# -- what stages share ------------------------------------------------------------------------------------------------


def _going_on(job: Job, work: Path, call: Callable[[], _Result]) -> _Result:
    """Go on with the hidden states in `work`; start over where they are of other inputs, when that is asked for."""
    try:
        return call()
    except ResumeError as e:
        if not job.settings.force:
            raise ResumeError(f"{str(e).partition('; remove it')[0]}; start over with `force`") from e
        _discard(work)
        return call()


def _discard(work: Path) -> None:
    """Remove a work directory of ours, whatever it was for; a file that is not ours is refused."""
    from shardxform.forward.work import WorkDir

    try:
        bound = parse_object((work / "progress.json").read_bytes()).get("inputs")
    except FileNotFoundError:
        bound = None
    except (OSError, JsonError) as e:
        raise ResumeError(f"{work}: damaged; remove it and run the same command again") from e
    with WorkDir(work, bound if isinstance(bound, dict) else {}) as found:
        found.remove()


def start(job: Job, stage: str) -> None:
    """Have a stage begun in the record, unless it is under way."""
    entry = job.folder.entries.get(stage)
    if entry is None or entry.done or not job.folder.is_as(stage, job.prepared.inputs[stage]):
        job.folder.begin(stage, job.prepared.inputs[stage], following(stage))


Maker = Callable[[Job, "OnProgress | None"], Any]

MAKERS: Final[Mapping[str, Maker]] = {
    SCORE: _score,
    SELECT: _select,
    QUANTIZE: _quantize,
    VERIFY: _verify,
    EVALUATE: _evaluate,
    CARD: make_card,
}
