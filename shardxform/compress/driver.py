"""Carrying out the stages in order, each unless it is done. The only loop, and the only place that knows the order."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shardxform.base import interrupts
from shardxform.base.progress import OnProgress, Progress, peak_rss_bytes
from shardxform.base.strict_json import parse_object
from shardxform.compress.folder import EVALUATE, EVALUATION, QUANTIZE, ResultsFolder, refuse_changed
from shardxform.compress.forecast import weights_of
from shardxform.compress.request import CompressOptions, Prepared
from shardxform.compress.stages import Stages
from shardxform.errors import Interrupted
from shardxform.execution.runner import Report

__all__ = ["Outcome", "Watcher", "compress"]


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
