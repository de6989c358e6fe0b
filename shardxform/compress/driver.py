"""Carrying out the stages in order, each unless it is done. The only loop, and the only place that knows the order."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from shardxform.ask.manifest import Manifest, manifest_text
from shardxform.base import interrupts
from shardxform.base.progress import OnProgress, Progress, peak_rss_bytes
from shardxform.base.strict_json import JsonError, parse_object, pretty
from shardxform.checkpoint.table import Checkpoint
from shardxform.compress.folder import (
    CARD,
    EVALUATE,
    EVALUATION,
    KEEP,
    PICTURES,
    QUANTIZE,
    SALIENCY,
    SCORE,
    SELECT,
    VERIFY,
    ResultsFolder,
    file_sha256,
    refuse_changed,
    work_of,
)
from shardxform.compress.request import CompressOptions, Prepared, Request, plan_for, weights_of
from shardxform.errors import ExecutionError, Interrupted, OutputError, ResumeError
from shardxform.execution.output import is_of, state_of
from shardxform.execution.runner import Report, RunOptions, run
from shardxform.formats.scheme import GGUF
from shardxform.model.layout import layout_of
from shardxform.plan.plan import Plan
from shardxform.runtimes import as_family

if TYPE_CHECKING:
    from shardxform.evaluation.evaluate import Comparison
    from shardxform.execution.runner import StepTuner
    from shardxform.experts import Choice

__all__ = ["Outcome", "Stages", "Watcher", "compress"]

# -- stages ------------------------------------------------------------------------------------------------------------
# The stages: each a call of the library, its results put into the folder.
#
# A stage is carried out as often as it takes: killed at any instant it goes on where the library goes on. In which
# order stages are done is the driver's business.

_README: Final = "README.md"

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The stages of one run."""

    prepared: Prepared
    options: CompressOptions
    folder: ResultsFolder

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self.prepared.request

    def is_done(self, stage: str) -> bool:
        """Whether a stage need not be made: its results are there, of these inputs, and as they are asked for."""
        if not self.folder.is_done(stage):
            return False
        if stage == QUANTIZE:
            return self._is_complete()
        if stage == VERIFY:  # a quick one does not stand for a full one
            return bool(self.folder.stages[VERIFY].facts.get("full")) >= self.options.full_verify
        return stage != CARD or self._is_card_current()

    def carry_out(self, stage: str, on_progress: OnProgress | None, *, done: bool) -> Report | None:
        """Make a stage unless it is done, and what may have been left of it; report where the output was written."""
        report: Report | None = None
        if not done:
            self._start(stage)
        if stage == QUANTIZE:  # the run itself looks at the files of an output that is there
            report = self._quantize(on_progress)
        elif not done:
            makers = {SCORE: self._score, SELECT: self._select, VERIFY: self._verify, EVALUATE: self._evaluate}
            makers.get(stage, self._write_card)(on_progress)
        if stage == SCORE:
            self._clean()
        self._draw(stage)
        return report

    def _start(self, stage: str) -> None:
        """Have a stage begun in the record, unless it is under way."""
        entry = self.folder.stages.get(stage)
        if entry is None or entry.done or not self.folder.is_as(stage, self.prepared.inputs[stage]):
            self.folder.begin(stage, self.prepared.inputs[stage])

    # -- score, select ----------------------------------------------------------------------------------------------

    def _score(self, on_progress: OnProgress | None) -> None:
        from shardxform.experts.scoring import ScoreOptions, score

        request = self.request
        assert request.score_windows is not None
        assert request.precision is not None
        work, windows = work_of(self.folder.root, SCORE), request.score_windows
        options = ScoreOptions(
            precision=request.precision, work=work, channels=request.narrows, on_progress=on_progress
        )
        saliency = self._going_on(work, lambda: score(request.source, windows, options))
        self.folder.put(SCORE, {SALIENCY: saliency.to_bytes()}, {"tokens": saliency.tokens})
        self._clean()

    def _clean(self) -> None:
        """Remove the hidden states of scoring, whose result is safe; a kill may have left them."""
        from shardxform.experts.scoring import ScoreOptions, remove_work

        request, work = self.request, work_of(self.folder.root, SCORE)
        if request.score_windows is not None and request.precision is not None and work.is_dir():
            options = ScoreOptions(precision=request.precision, work=work, channels=request.narrows)
            remove_work(request.source, request.score_windows, options)

    def _select(self, _on_progress: OnProgress | None) -> None:
        choice = self._choice()
        assert self.request.pruning is not None
        data = manifest_text(choice.manifest(self.request.pruning.ratio)).encode()
        layers = [*choice.layers.values(), *choice.mtp_layers.values()]
        shares = [layer.saliency_kept for layer in layers if layer.saliency_kept is not None]
        facts = {
            "criterion": choice.criterion,
            "experts": choice.saliency.num_experts,
            "kept": choice.num_kept,
            **({"channels": [choice.width.of, choice.width.channels]} if choice.width else {}),
            "saliency_kept": math.fsum(shares) / len(shares) if shares else None,
            "never_reached_kept": sum(layer.unreached_kept for layer in layers),
            "never_reached_pruned": sum(layer.unreached_pruned for layer in layers),
        }
        self.folder.put(SELECT, {KEEP: data}, facts)

    def _choice(self) -> Choice:
        """The experts that stay, by what was scored."""
        from shardxform.experts import Saliency, decide
        from shardxform.experts.choosing import with_width

        pruning = self.request.pruning
        assert pruning is not None
        self.folder.read(SCORE, SALIENCY)  # refuses what another wrote
        saliency = Saliency.load(self.folder.root / SALIENCY)
        choice = decide(saliency, pruning.kept(saliency.num_experts), pruning.criterion, pruning.protect)
        return with_width(choice, pruning.width) if pruning.width else choice

    # -- quantize ---------------------------------------------------------------------------------------------------

    def _quantize(self, on_progress: OnProgress | None) -> Report:
        plan = self._plan()
        try:
            report = self._run(plan, on_progress, force=False)
        except ResumeError:
            if not self.options.force:
                raise
            self._remove_card()
            self.folder.begin(QUANTIZE, self.prepared.inputs[QUANTIZE])
            report = self._run(plan, on_progress, force=True)
        self.folder.put(QUANTIZE, {}, {"plan": plan.fingerprint})
        return report

    def _run(self, plan: Plan, on_progress: OnProgress | None, *, force: bool) -> Report:
        jobs, device = self.options.jobs, "cpu" if self.request.recipe else self.options.device
        with self._tuner(plan, needed=force or not self._is_complete()) as tuner:
            options = RunOptions(jobs=jobs, device=device, force=force, tuner=tuner, on_progress=on_progress)
            return run(plan, self.request.out, options)

    def _plan(self) -> Plan:
        """The plan, with the experts that were chosen."""
        return plan_for(self.request, self._manifest())

    def _is_complete(self) -> bool:
        """Whether the output is there, of this plan; the run looks at its files."""
        plan = self._plan()
        state = state_of(self.request.out, plan)
        return state.name == "finished" and is_of(state, plan)

    def _manifest(self) -> Manifest | None:
        if self.request.pruning is None:
            return None
        self.folder.read(SELECT, KEEP)
        source = self.request.source
        return Manifest.load(self.folder.root / KEEP, layout_of(source.config, source.tensors, source.where))

    @contextlib.contextmanager
    def _tuner(self, plan: Plan, *, needed: bool) -> Iterator[StepTuner | None]:
        """What tunes the blocks of the plan; None where nothing is left to tune."""
        request = self.request
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

    # -- verify, evaluate -------------------------------------------------------------------------------------------

    def _verify(self, on_progress: OnProgress | None) -> None:
        from shardxform.verification import verify

        out, source, full = self.request.out, self.request.source, self.options.full_verify
        report = verify(
            out, source=source, quick=not full, written=True, jobs=self.options.jobs, on_progress=on_progress
        )
        if not report.sound:
            first, more = report.problems[0], len(report.problems) - 1
            others = f" and {more} more problem{'s' * (more > 1)}" if more else ""
            raise ExecutionError(
                f"{out}: not sound: {first.where}: {first.message}{others}; see"
                f" `shardxform verify {out} `source` {source.where}`"
            )
        facts = {
            "full": full,
            "tensors": report.tensors,
            "experts": report.experts,
            "warnings": len(report.warnings),
            "bytes_scanned": report.bytes_scanned,
            "tensors_digested": report.tensors_digested,
            "bytes_compared": report.bytes_compared,
            "values_compared": report.values_compared,
            "values_left": dict(report.values_left),
        }
        self.folder.put(VERIFY, {}, facts)

    def _evaluate(self, on_progress: OnProgress | None) -> None:
        from shardxform.evaluation.evaluate import EvaluateOptions, evaluate, evaluation_facts, identified

        request = self.request
        assert request.eval_windows is not None
        assert request.precision is not None
        work, windows = work_of(self.folder.root, EVALUATE), request.eval_windows
        options = EvaluateOptions(precision=request.precision, work=work, on_progress=on_progress)
        tested = self._written()
        found = self._going_on(work, lambda: evaluate(tested, windows, options, request.source))
        facts = identified(evaluation_facts(found, windows), tested, request.source)
        self.folder.put(EVALUATE, {EVALUATION: pretty(facts).encode()})

    def _written(self) -> Checkpoint:
        """What was written, to be run."""
        if self.request.scheme.format != GGUF:
            return as_family(Checkpoint.open(self.request.out))
        from shardxform.checkpoint.gguf import open_gguf
        from shardxform.checkpoint.table import find_gguf
        from shardxform.plan.gguf_origin import stands_for

        first = find_gguf(self.request.out)
        assert first is not None  # it was written and verified
        return stands_for(open_gguf(first), self.request.source)

    def _going_on(self, work: Path, call: Callable[[], _Result]) -> _Result:
        """Go on with the hidden states in `work`; start over where they are of other inputs, when that is asked for."""
        try:
            return call()
        except ResumeError as e:
            if not self.options.force:
                raise ResumeError(f"{str(e).partition('; remove it')[0]}; start over with `force`") from e
            _discard(work)
            return call()

    # -- what people see --------------------------------------------------------------------------------------------

    def _draw(self, stage: str) -> None:
        """Draw what a stage that is done gave, unless the picture is there.

        Raises:
            PlanError: matplotlib is not installed.

        """
        name = PICTURES.get(stage)
        if name is None or not self.options.plot or (self.folder.root / name).exists():
            return
        if stage == SELECT:
            from shardxform.experts.plotting import plot_choice

            data = plot_choice(self._choice())
        else:
            data = self._drawn_evaluation()
        self.folder.add(stage, name, data)

    def _drawn_evaluation(self) -> bytes:
        from shardxform.evaluation.plot import draw

        facts = json.loads(self.folder.read(EVALUATE, EVALUATION))
        title = f"{self.request.out.name} against {Path(self.request.source.where).name}"
        with interrupts.deferred(), tempfile.TemporaryDirectory() as place:
            path = Path(place) / "evaluation.png"
            draw(_comparison(facts["against"]), path, title=title)
            return path.read_bytes()

    def _write_card(self, _on_progress: OnProgress | None) -> None:
        """Write the model card of the output, unless somebody wrote their own."""
        from shardxform.publish.card import CardOptions, gather, render, write_card

        root, out = self.folder.root, self.request.out
        options = CardOptions(
            manifest=root / KEEP if SELECT in self.prepared.inputs else None,
            evaluations=[root / EVALUATION] if EVALUATE in self.prepared.inputs else [],
            plots=[root / name for name in self._pictures()],
        )
        text = render(gather(out, options))
        facts: dict[str, Any] = {"pictures": self._pictures(), "written": {}, "left": ""}
        try:
            write_card(out, text, options.plots)
            facts["written"] = {name: file_sha256(out / name) for name in (_README, *self._pictures())}
        except OutputError as e:  # somebody wrote their own: it is theirs
            facts["left"] = str(e)
        self.folder.put(CARD, {}, facts)

    def _remove_card(self) -> None:
        """Remove the card and its pictures from an output that is about to be started over, as far as they are ours."""
        entry = self.folder.stages.get(CARD)
        written = entry.facts.get("written") if entry else None
        for name, digest in written.items() if isinstance(written, dict) else ():
            path = self.request.out / name
            if name in (_README, *PICTURES.values()) and file_sha256(path) == digest:
                path.unlink()

    def _is_card_current(self) -> bool:
        """Whether the card says what is known now, and shows the pictures that there are."""
        entry = self.folder.stages[CARD]
        shown = entry.facts.get("pictures") == self._pictures()
        return self.folder.is_as(CARD, self.prepared.inputs[CARD]) and shown and (self.request.out / _README).is_file()

    def _pictures(self) -> list[str]:
        stages = [stage for stage in PICTURES if stage in self.prepared.inputs]
        return [PICTURES[stage] for stage in stages if PICTURES[stage] in self.folder.stages[stage].files]


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


def _comparison(facts: Mapping[str, Any]) -> Comparison:
    """What `evaluation_facts` was made of, as far as it is drawn."""
    from shardxform.evaluation.evaluate import Comparison
    from shardxform.evaluation.routing import Load

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return Comparison(
        perplexity=number(facts["perplexity"]),
        kl=facts["kl"],
        kl_error=number(facts["kl_standard_error"]),
        top1=facts["top1_agreement"],
        top1_error=number(facts.get("top1_standard_error")),
        block_errors=tuple(map(number, facts["block_errors"])),
        loads={int(layer): Load(**load) for layer, load in facts.get("routing", {}).items()},
    )


# -- driver ------------------------------------------------------------------------------------------------------------


class Watcher(Protocol):
    """Who is told of stages."""

    def __call__(self, number: int, total: int, stage: str, *, done: bool) -> None:
        """Stage `number` of `total` begins, or is done already."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a call of `compress`.

    Attributes:
        out: the output.
        folder: the directory of results.
        made: stages that were carried out now; of others the results were there.
        facts: stage -> what it found; of quantizing the plan's summary, of evaluating what evaluation.json holds.
        spent: stage -> seconds that it took now, and the peak of resident memory until its end.
        report: of the run that wrote the output, or found it there.
        seconds, peak_rss_bytes: of the whole call.

    """

    out: Path
    folder: Path
    made: tuple[str, ...]
    facts: Mapping[str, Mapping[str, Any]]
    spent: Mapping[str, tuple[float, int]]
    report: Report
    seconds: float
    peak_rss_bytes: int


def compress(
    prepared: Prepared,
    options: CompressOptions,
    *,
    on_stage: Watcher | None = None,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Carry out every stage that is not done, or go on where an earlier call stopped.

    Raises:
        ResumeError: OUT or a result was made from other inputs, and `options.force` is not set.
        OutputError: a result was changed since it was written, or another process works here.
        ExecutionError: a stage failed, or the output is not sound.
        Interrupted: KeyboardInterrupt; what was finished is safe, and the same call goes on.

    """
    started = time.monotonic()
    with ResultsFolder(prepared.request.folder) as folder:
        _refuse_or_forget(folder, prepared, force=options.force)
        stages = Stages(prepared=prepared, options=options, folder=folder)
        spent, report = _all(stages, _Overall(weights_of(prepared), on_progress), on_stage)
        facts = {stage: dict(folder.stages[stage].facts) for stage in prepared.inputs}
        if EVALUATE in facts:
            facts[EVALUATE] = parse_object(folder.read(EVALUATE, EVALUATION))
    facts[QUANTIZE] |= {**prepared.sketch.summary, "bytes_after": prepared.sketch.data_bytes}
    return Outcome(
        out=prepared.request.out,
        folder=prepared.request.folder,
        made=tuple(spent),
        facts=facts,
        spent=spent,
        report=report,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _refuse_or_forget(folder: ResultsFolder, prepared: Prepared, *, force: bool) -> None:
    """What was made from other inputs is refused, or by force no longer counts."""
    found = prepared.changed(folder.stages)
    if not force:
        refuse_changed(folder.root, folder.stages, found)
    if found:
        folder.forget(found)


def _all(stages: Stages, overall: _Overall, on_stage: Watcher | None) -> tuple[dict[str, tuple[float, int]], Report]:
    """What the stages that were carried out took, and the report of writing the output."""
    spent: dict[str, tuple[float, int]] = {}
    report: Report | None = None
    total = len(stages.prepared.inputs)
    for number, stage in enumerate(stages.prepared.inputs, 1):
        began = time.monotonic()
        try:
            with interrupts.during(f"[{number}/{total}] {stage}"):
                done = stages.is_done(stage)
                if on_stage:
                    on_stage(number, total, stage, done=done)
                report = stages.carry_out(stage, overall.of(stage), done=done) or report
                overall.end(stage, found=done)
        except Interrupted as e:
            raise Interrupted(f"[{number}/{total}] {stage}: {e}") from e
        except KeyboardInterrupt as e:
            raise Interrupted(f"[{number}/{total}] {stage}: stopped; run the same command again to go on") from e
        if not done:
            spent[stage] = time.monotonic() - began, peak_rss_bytes()
    assert report is not None
    return spent, report


class _Overall:
    """One progress over all stages, each weighed by the time that it usually takes compared with the others."""

    def __init__(self, weights: Mapping[str, int], on_progress: OnProgress | None) -> None:
        self._weights = weights
        self._on_progress = on_progress
        self._done = dict.fromkeys(weights, 0)
        self._resumed = dict.fromkeys(weights, 0)

    def of(self, stage: str) -> OnProgress | None:
        """What a stage reports to; None when nobody listens."""
        return (lambda p: self._update(stage, p)) if self._on_progress else None

    def end(self, stage: str, *, found: bool) -> None:
        """A stage is done; one that was found done is told with what is done next, if anything is."""
        self._done[stage] = self._weights[stage]
        if found:
            self._resumed[stage] = self._weights[stage]
        else:
            self._tell()

    def _update(self, stage: str, p: Progress) -> None:
        weight = self._weights[stage]
        self._done[stage] = weight * min(p.done, p.total) // max(p.total, 1)
        self._resumed[stage] = weight * min(p.resumed, p.total) // max(p.total, 1)
        self._tell(p.at)

    def _tell(self, at: str = "") -> None:
        if self._on_progress:
            done, total, resumed = (sum(d.values()) for d in (self._done, self._weights, self._resumed))
            self._on_progress(Progress(done, total, resumed, "work", at))
