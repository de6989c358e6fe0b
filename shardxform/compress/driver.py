"""Carrying out the stages in order, each unless it is done. The only loop, and the only place that knows the order."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shardxform.base import interrupts
from shardxform.base.progress import OnProgress, peak_rss_bytes
from shardxform.base.strict_json import parse_object
from shardxform.compress.folder import EVALUATION, Folder
from shardxform.compress.job import Job
from shardxform.compress.overall import Overall
from shardxform.compress.prepared import Prepared, made_of_others, refuse_others
from shardxform.compress.request import CARD, EVALUATE, QUANTIZE, SCORE, VERIFY, Settings
from shardxform.compress.showing import is_card_current, picture
from shardxform.compress.stages import MAKERS, clean, is_complete, start
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
    """What came of it.

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
    settings: Settings,
    *,
    on_stage: Watcher | None = None,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Carry out every stage that is not done, or go on where an earlier call stopped.

    Raises:
        ResumeError: OUT or a result was made from other inputs, and `settings.force` is not set.
        OutputError: a result was changed since it was written, or another process works here.
        ExecutionError: a stage failed, or the output is not sound.
        Interrupted: KeyboardInterrupt; what was finished is safe, and the same call goes on.

    """
    started = time.monotonic()
    overall = Overall(prepared.weights, on_progress)
    with Folder(prepared.request.folder) as folder:
        _refuse_or_forget(folder, prepared, settings)
        job = Job(prepared=prepared, settings=settings, folder=folder)
        spent, report = _stages(job, overall, on_stage)
        facts = {stage: dict(folder.entries[stage].facts) for stage in prepared.inputs}
        if EVALUATE in facts:
            facts[EVALUATE] = parse_object(folder.read(EVALUATE, EVALUATION))
    return Outcome(
        out=prepared.request.out,
        folder=prepared.request.folder,
        made=tuple(spent),
        facts={
            **facts,
            QUANTIZE: {**facts[QUANTIZE], **prepared.sketch.summary, "bytes_after": prepared.sketch.data_bytes},
        },
        spent=spent,
        report=report,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _refuse_or_forget(folder: Folder, prepared: Prepared, settings: Settings) -> None:
    """What was made from other inputs is refused, or by force no longer counts."""
    if not settings.force:
        refuse_others(prepared.request, folder.entries, prepared.inputs)
    if found := made_of_others(prepared.request, folder.entries, prepared.inputs):
        folder.forget(found)


def _stages(job: Job, overall: Overall, on_stage: Watcher | None) -> tuple[dict[str, tuple[float, int]], Report]:
    """What the stages that were carried out took, and the report of writing the output."""
    spent: dict[str, tuple[float, int]] = {}
    report: Report | None = None
    total = len(job.prepared.inputs)
    for number, stage in enumerate(job.prepared.inputs, 1):
        began = time.monotonic()
        try:
            with interrupts.during(f"[{number}/{total}] {stage}"):
                done = _is_done(job, stage)
                if on_stage:
                    on_stage(number, total, stage, done=done)
                result = _carry_out(job, stage, overall, done=done)
        except Interrupted as e:
            raise Interrupted(f"[{number}/{total}] {stage}: {e}") from e
        except KeyboardInterrupt as e:
            raise Interrupted(f"[{number}/{total}] {stage}: stopped; run the same command again to go on") from e
        if not done:
            spent[stage] = time.monotonic() - began, peak_rss_bytes()
        report = result or report
    assert report is not None
    return spent, report


def _carry_out(job: Job, stage: str, overall: Overall, *, done: bool) -> Report | None:
    """Do a stage unless it is done, and what may have been left of it."""
    report: Report | None = None
    if not done:
        start(job, stage)
    if not done or stage == QUANTIZE:  # the run itself looks at the files of an output that is there
        report = MAKERS[stage](job, overall.of(stage))
    if stage == SCORE:
        clean(job)
    picture(job, stage)
    (overall.found if done else overall.made)(stage)
    return report


def _is_done(job: Job, stage: str) -> bool:
    if not job.folder.is_done(stage):
        return False
    if stage == QUANTIZE:
        return is_complete(job)
    if stage == VERIFY:  # a quick one does not stand for a full one
        return bool(job.folder.entries[VERIFY].facts.get("full")) >= job.settings.full_verify
    return stage != CARD or is_card_current(job)
