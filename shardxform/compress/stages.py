"""The stages: each a call of the library, its results put into the folder.

A stage is carried out as often as it takes: killed at any instant it goes on where the library goes on. In which order
stages are done is the driver's business.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shardxform.ask.manifest import Manifest, manifest_text
from shardxform.base import interrupts
from shardxform.base.progress import OnProgress
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
    work_of,
)
from shardxform.compress.request import CompressOptions, Prepared, Request, plan_for
from shardxform.errors import ExecutionError, OutputError, ResumeError
from shardxform.execution.output import is_of, state_of
from shardxform.execution.runner import Report, RunOptions, run
from shardxform.model.layout import layout_of
from shardxform.plan.plan import Plan

if TYPE_CHECKING:
    from shardxform.evaluation.evaluate import Comparison
    from shardxform.execution.options import StepTuner
    from shardxform.experts import Choice

__all__ = ["Stages"]

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
        options = ScoreOptions(precision=request.precision, work=work, on_progress=on_progress)
        saliency = self._going_on(work, lambda: score(request.source, windows, options))
        self.folder.put(SCORE, {SALIENCY: saliency.to_bytes()}, {"tokens": saliency.tokens})
        self._clean()

    def _clean(self) -> None:
        """Remove the hidden states of scoring, whose result is safe; a kill may have left them."""
        from shardxform.experts.scoring import ScoreOptions, remove_work

        request, work = self.request, work_of(self.folder.root, SCORE)
        if request.score_windows is not None and request.precision is not None and work.is_dir():
            remove_work(request.source, request.score_windows, ScoreOptions(precision=request.precision, work=work))

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
            "saliency_kept": math.fsum(shares) / len(shares) if shares else None,
            "never_reached_kept": sum(layer.unreached_kept for layer in layers),
            "never_reached_pruned": sum(layer.unreached_pruned for layer in layers),
        }
        self.folder.put(SELECT, {KEEP: data}, facts)

    def _choice(self) -> Choice:
        """The experts that stay, by what was scored."""
        from shardxform.experts import Saliency, decide

        pruning = self.request.pruning
        assert pruning is not None
        self.folder.read(SCORE, SALIENCY)  # refuses what another wrote
        saliency = Saliency.load(self.folder.root / SALIENCY)
        return decide(saliency, pruning.kept(saliency.num_experts), pruning.criterion, pruning.protect)

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
                f" `shardxform verify {out}`, with `source` {source.where}"
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
        tested = Checkpoint.open(request.out)
        found = self._going_on(work, lambda: evaluate(tested, windows, options, request.source))
        facts = identified(evaluation_facts(found, windows), tested, request.source)
        self.folder.put(EVALUATE, {EVALUATION: pretty(facts).encode()})

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

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return Comparison(
        perplexity=number(facts["perplexity"]),
        kl=facts["kl"],
        kl_error=number(facts["kl_standard_error"]),
        top1=facts["top1_agreement"],
        top1_error=number(facts.get("top1_standard_error")),
        block_errors=tuple(map(number, facts["block_errors"])),
    )
