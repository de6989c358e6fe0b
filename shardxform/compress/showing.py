"""What people see of the results: pictures, when they are asked for, and the model card of the output."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardxform.base import interrupts
from shardxform.base.progress import OnProgress
from shardxform.compress.folder import EVALUATION, KEEP, file_sha256
from shardxform.compress.job import Job, choice_of
from shardxform.compress.request import CARD, EVALUATE, SELECT
from shardxform.errors import OutputError

if TYPE_CHECKING:
    from shardxform.evaluation.evaluate import Comparison

__all__ = ["is_card_current", "make_card", "picture", "remove_card"]

_PICTURES: Final = {SELECT: "saliency.png", EVALUATE: "evaluation.png"}
_README: Final = "README.md"


def picture(job: Job, stage: str) -> None:
    """Draw what a stage that is done gave, unless the picture is there.

    Raises:
        PlanError: matplotlib is not installed.

    """
    name = _PICTURES.get(stage)
    if name is None or not job.settings.plot or (job.folder.root / name).exists():
        return
    if stage == SELECT:
        from shardxform.experts.plotting import plot_choice

        data = plot_choice(choice_of(job))
    else:
        data = _drawn_evaluation(job)
    job.folder.add(stage, name, data)


def _drawn_evaluation(job: Job) -> bytes:
    from shardxform.evaluation.plot import draw

    facts = json.loads(job.folder.read(EVALUATE, EVALUATION))
    title = f"{job.request.out.name} against {Path(job.request.source.where).name}"
    with interrupts.deferred(), tempfile.TemporaryDirectory() as place:
        path = Path(place) / "evaluation.png"
        draw(_comparison(facts["against"]), path, title=title)
        return path.read_bytes()


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


def make_card(job: Job, _on_progress: OnProgress | None) -> None:
    """Write the model card of the output, unless somebody wrote their own."""
    from shardxform.publish.card import CardOptions, gather, render, write_card

    root, out = job.folder.root, job.request.out
    options = CardOptions(
        manifest=root / KEEP if SELECT in job.prepared.inputs else None,
        evaluations=[root / EVALUATION] if EVALUATE in job.prepared.inputs else [],
        plots=[root / name for name in _pictures(job)],
    )
    text = render(gather(out, options))
    facts: dict[str, Any] = {"pictures": _pictures(job), "written": {}, "left": ""}
    try:
        write_card(out, text, options.plots)
        facts["written"] = {name: file_sha256(out / name) for name in (_README, *_pictures(job))}
    except OutputError as e:  # somebody wrote their own: it is theirs
        facts["left"] = str(e)
    job.folder.put(CARD, {}, facts)


def remove_card(job: Job) -> None:
    """Remove the card and its pictures from an output that is about to be started over, as far as they are ours."""
    entry = job.folder.entries.get(CARD)
    written = entry.facts.get("written") if entry else None
    for name, digest in written.items() if isinstance(written, dict) else ():
        path = job.request.out / name
        if name in (_README, *_PICTURES.values()) and file_sha256(path) == digest:
            path.unlink()


def is_card_current(job: Job) -> bool:
    """Whether the card says what is known now, and shows the pictures that there are."""
    entry = job.folder.entries[CARD]
    shown = entry.facts.get("pictures") == _pictures(job)
    return job.folder.is_as(CARD, job.prepared.inputs[CARD]) and shown and (job.request.out / _README).is_file()


def _pictures(job: Job) -> list[str]:
    stages = [stage for stage in _PICTURES if stage in job.prepared.inputs]
    return [_PICTURES[stage] for stage in stages if _PICTURES[stage] in job.folder.entries[stage].files]
