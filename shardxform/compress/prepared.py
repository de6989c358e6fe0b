"""What can be known and refused before the first stage: the plan's sizes, and the inputs of every stage.

Which experts stay is found out in the first stages, but how many is known: a stand-in choice gives the plan's tensors,
sizes and memory, and meets whatever the choice would be refused for. Nothing is written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shardxform.ask.manifest import Manifest
from shardxform.base import computing
from shardxform.base.file_system import FileSystem
from shardxform.base.strict_json import dumps
from shardxform.calibration import Windows
from shardxform.checkpoint.identity import names_of
from shardxform.checkpoint.table import Checkpoint
from shardxform.compress.costs import amounts, seconds, shape_of, usual
from shardxform.compress.folder import Entry, changed, read_entries, refuse_changed
from shardxform.compress.request import CARD, EVALUATE, QUANTIZE, SCORE, SELECT, VERIFY, Pruning, Request
from shardxform.errors import FamilyError, OutputError
from shardxform.execution.output import Output, state_of
from shardxform.experts import ExpertStats, Saliency, choose
from shardxform.model.layout import layout_of
from shardxform.plan.plan import Plan, source_inputs
from shardxform.plan.quantize import plan_quantize
from shardxform.verification.planned import refuse_unsound

if TYPE_CHECKING:
    from shardxform.forward.weights import Precision

__all__ = [
    "Prepared",
    "following",
    "hidden_bytes",
    "made_of_others",
    "plan_for",
    "prepare",
    "refuse_others",
    "tuning_bytes",
]

_UNIT_SECONDS: Final = 1e-3
_MADE_FROM: Final = {SELECT: SCORE, QUANTIZE: SELECT, VERIFY: QUANTIZE, EVALUATE: QUANTIZE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that nothing speaks against.

    Attributes:
        request: as it was made.
        sketch: the plan of quantizing, with a stand-in for the experts that stay: right in all but which they are.
        inputs: stage -> what its result depends on, for the stages that are to be done, in order.
        weights: stage -> its share of the work, as it usually is.

    """

    request: Request
    sketch: Plan
    inputs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, int]

    @property
    def kept(self) -> int:
        """Routed experts of a layer that the output has."""
        return int(self.sketch.summary["experts_after"])


def prepare(request: Request, *, force: bool = False) -> Prepared:
    """Plan everything; with `force`, what was made from other inputs is no obstacle.

    Raises:
        PlanError, SchemeError, FamilyError, ManifestError: the request does not fit the source, or what verification
            will call unsound in the end would be made.
        OutputError: OUT, or the directory beside it, is foreign, overlaps the source, or is on too small a disk.
        ResumeError: one of them was made from other inputs; names the first difference.

    """
    _refuse_inside(request.folder, request.source.root)
    _refuse_overlap(request.folder, request.out)
    sketch = plan_for(request, _stand_in(request.source, request.pruning))
    refuse_unsound(sketch)
    state = state_of(request.out, sketch)
    inputs = _inputs(request, sketch)
    if not force:
        refuse_others(request, read_entries(request.folder), inputs)
    if state.name != "finished":
        beside = max(tuning_bytes(request), hidden_bytes(request, request.eval_windows, request.precision))
        Output(request.out, sketch, FileSystem()).refuse_too_little_space(beside)
    weights = _weights(request, sketch)
    return Prepared(request=request, sketch=sketch, inputs=inputs, weights={stage: weights[stage] for stage in inputs})


def made_of_others(
    request: Request, entries: Mapping[str, Entry], inputs: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Stages whose results are of other inputs, and the first difference; a card is simply written again."""
    names = names_of(request.source.shards)
    return changed(entries, {stage: each for stage, each in inputs.items() if stage != CARD}, names)


def refuse_others(request: Request, entries: Mapping[str, Entry], inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse results of other inputs, and say which results are not of them.

    Raises:
        ResumeError: names the first difference.

    """
    found = made_of_others(request, entries, inputs)
    gone = {CARD, *found, *(later for stage in found for later in following(stage))}
    refuse_changed(
        request.folder, found, [stage for stage, entry in entries.items() if stage not in gone and entry.done]
    )


def plan_for(request: Request, manifest: Manifest | None) -> Plan:
    """The plan of the stage that writes the output."""
    return plan_quantize(request.source, request.scheme, manifest, request.view, request.recipe)


def following(stage: str) -> list[str]:
    """Stages whose results are made from what a stage gives, directly or not; the card looks for itself."""
    out = [later for later, earlier in _MADE_FROM.items() if earlier == stage]
    return [*out, *(name for each in out for name in following(each))]


def tuning_bytes(request: Request) -> int:
    """Disk that hidden states take while blocks are tuned."""
    return hidden_bytes(request, request.tune_windows, request.tuned_in)


def hidden_bytes(request: Request, windows: Windows | None, precision: Precision | None) -> int:
    """Disk that the hidden states of two chains take, in tuning and in evaluating against the source."""
    if windows is None or precision is None:
        return 0
    from shardxform.tuning.session import Tuner, TunerOptions

    with Tuner(request.source, windows, (), TunerOptions(precision=precision, threads=1)) as tuner:
        return tuner.work_bytes


def _refuse_inside(folder: Path, source: Path) -> None:
    real, root = Path(os.path.realpath(folder)), Path(os.path.realpath(source))
    if root in (real, *real.parents):
        raise OutputError(f"{folder}: lies in the checkpoint {source}, which is only read; name another OUT")


def _refuse_overlap(folder: Path, out: Path) -> None:
    real, other = (Path(os.path.realpath(path)) for path in (folder, out))
    if real == other or real in other.parents or other in real.parents:
        raise OutputError(f"{folder}: what stages give cannot lie in OUT, {out}, nor OUT in it; name another `results`")


def _stand_in(source: Checkpoint, pruning: Pruning | None) -> Manifest | None:
    """A choice of as many experts as there will be, among experts that are all alike."""
    if pruning is None:
        return None
    layout = layout_of(source.config, source.tensors, source.where)
    if not layout.moe_layers:
        raise FamilyError(f"{source.where}: no layer has experts; there is nothing to prune")
    from shardxform.experts.scoring import model_facts

    zeros = np.zeros(layout.num_experts)
    alike = ExpertStats(
        count_E=zeros.astype(np.int64), **{f"{name}_E": zeros for name in ("reap", "ean", "gate", "peak")}
    )
    saliency = Saliency(
        model=model_facts(source, layout),
        layers=dict.fromkeys(layout.moe_layers, alike),
        mtp_layers=dict.fromkeys(range(_scored_mtp_layers(source)), alike),
        tokens=0,
        runs=(),
        where=source.where,
    )
    return choose(saliency, pruning.kept(layout.num_experts))


def _scored_mtp_layers(source: Checkpoint) -> int:
    """MTP layers that scoring will find: those whose tensors are there."""
    import torch

    from shardxform.forward.mtp import mtp_numbers
    from shardxform.forward.skeleton import Skeleton
    from shardxform.forward.weights import Precision, Weights

    with Weights(source, Precision(torch.device("cpu"), torch.float32)) as weights:
        return len(mtp_numbers(Skeleton(weights)))


def _inputs(request: Request, sketch: Plan) -> dict[str, dict[str, Any]]:
    """What the result of every stage depends on; what it takes from another stage is that one's inputs, hashed."""
    out: dict[str, dict[str, Any]] = {}
    pruning, windows = request.pruning, request.score_windows
    if pruning is not None and windows is not None:
        run = {"data": windows.provenance, "windows": windows.fingerprint, **_computed(request)}
        out[SCORE] = {"source": source_inputs(request.source, {}), **run}
        kept = pruning.kept(int(sketch.summary["experts_before"]))
        asked = {"keep": kept, "ratio": pruning.ratio, "criterion": pruning.criterion, "protect": pruning.protect}
        out[SELECT] = {**asked, "saliency": _hash(out[SCORE])}
    planned = {key: value for key, value in sketch.inputs.items() if key not in ("manifest", "command")}
    out[QUANTIZE] = {"pruned_by": _hash(out[SELECT]) if SELECT in out else None, **planned}
    out[VERIFY] = {"output": _hash(out[QUANTIZE])}
    if request.eval_windows is not None:
        held_out = request.eval_windows
        run = {"data": held_out.provenance, "windows": held_out.fingerprint, **_computed(request)}
        out[EVALUATE] = {**run, "output": _hash(out[QUANTIZE])}
    out[CARD] = {"output": _hash(out[QUANTIZE]), "evaluation": _hash(out[EVALUATE]) if EVALUATE in out else None}
    return out


def _computed(request: Request) -> dict[str, Any]:
    assert request.precision is not None
    return {
        computing.KEY: computing.of_model(str(request.precision.device)),
        "device": request.precision.device.type,
        "dtype": str(request.precision.dtype).removeprefix("torch."),
    }


def _weights(request: Request, sketch: Plan) -> dict[str, int]:
    shape = shape_of(request.source, int(sketch.summary["experts_after"]))
    costs = usual(shape)
    work = amounts(request, shape, sketch.nbytes)
    return {stage: max(1, round(seconds(each, costs) / _UNIT_SECONDS)) for stage, each in work.items()}


def _hash(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(dumps(computing.without(inputs)).encode()).hexdigest()
