"""What `compress` is asked for, and what can be known and refused before the first stage.

A `Request` decides bytes; `CompressOptions` do not. Which experts stay is found out in the first stages, but how many
is known: a stand-in choice gives the plan's tensors, sizes and memory, and meets what the choice would be refused for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shardxform.ask.manifest import Manifest
from shardxform.ask.recipe import Recipe
from shardxform.base import computing
from shardxform.base.file_system import FileSystem
from shardxform.base.strict_json import dumps
from shardxform.calibration import Windows
from shardxform.checkpoint.identity import names_of
from shardxform.checkpoint.table import Checkpoint
from shardxform.compress.folder import (
    CARD,
    EVALUATE,
    QUANTIZE,
    SCORE,
    SELECT,
    VERIFY,
    StageRecord,
    changed,
    read_stages,
    refuse_changed,
    results_folder,
)
from shardxform.errors import FamilyError, OutputError, PlanError
from shardxform.execution.output import Output, state_of
from shardxform.experts import ExpertStats, Saliency, choose
from shardxform.experts.choosing import DEFAULT, keep_of_ratio
from shardxform.formats.scheme import Scheme
from shardxform.model.layout import layout_of
from shardxform.plan.plan import Plan, source_inputs
from shardxform.plan.prune import ViewOptions
from shardxform.plan.quantize import plan_quantize
from shardxform.verification.structure import refuse_unsound

if TYPE_CHECKING:
    from shardxform.forward.weights import Precision

__all__ = ["CompressOptions", "Prepared", "Pruning", "Request", "plan_compress", "plan_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """Which experts stay.

    Attributes:
        keep: experts of every layer that stay; or
        ratio: the share of them that goes.
        criterion: what they are chosen by, a name of `experts.CRITERIA`.
        protect: keep super experts, whatever their score.

    """

    keep: int | None = None
    ratio: float | None = None
    criterion: str = DEFAULT
    protect: bool = False

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.ratio is None):
            raise PlanError("pruning: expected either a number of experts to keep or a ratio, found both or neither")

    def kept(self, num_experts: int) -> int:
        """Experts of a layer that stay."""
        return self.keep if self.keep is not None else keep_of_ratio(num_experts, self.ratio or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to become of a checkpoint.

    Attributes:
        source: what is compressed.
        out: directory that is written.
        work: where what stages give lies, and hidden states of scoring and evaluating; `<out>.compress` if None.
        scheme: how weights are stored.
        view: what of the source is taken, and how large shards are.
        pruning: which experts stay; None for all.
        score_windows: what experts are scored on; needed to prune.
        tune_windows: what the rounding is tuned on, as `recipe` says; both or neither.
        recipe: how blocks are tuned; None to round to nearest.
        eval_windows: held-out text; None not to evaluate.
        precision: of running the model; needed for all but plain rounding. What is tuned is computed on the same
            device in the type that `recipe` says.

    """

    source: Checkpoint
    out: Path
    scheme: Scheme
    view: ViewOptions = field(default_factory=ViewOptions)
    pruning: Pruning | None = None
    score_windows: Windows | None = None
    tune_windows: Windows | None = None
    recipe: Recipe | None = None
    eval_windows: Windows | None = None
    precision: Precision | None = None
    work: Path | None = None

    def __post_init__(self) -> None:
        if self.out.name in ("", ".."):
            raise OutputError(f"{self.out}: expected the name of a directory, beside which there is room for another")
        if (self.pruning is None) != (self.score_windows is None):
            raise PlanError("pruning: expected a choice and data to score experts on, found one without the other")
        if (self.recipe is None) != (self.tune_windows is None):
            raise PlanError("tuning: expected a recipe and its data, found one without the other")
        if self.runs_model and self.precision is None:
            raise PlanError("precision: expected a device and a type to run the model with, found none")

    @property
    def folder(self) -> Path:
        """Where results and the record of them lie."""
        return self.work or results_folder(self.out)

    @property
    def tuned_in(self) -> Precision | None:
        """Where and in what type blocks are tuned; None where none is."""
        if self.recipe is None or self.precision is None:
            return None
        import torch

        return replace(self.precision, dtype=getattr(torch, self.recipe.dtype))

    @property
    def tuning_bytes(self) -> int:
        """Disk that hidden states take while blocks are tuned."""
        return _hidden_bytes(self, self.tune_windows, self.tuned_in)

    @property
    def runs_model(self) -> bool:
        """Whether any stage runs the model, which needs torch."""
        return any(each is not None for each in (self.score_windows, self.tune_windows, self.eval_windows))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOptions:
    """What changes speed, checks and pictures, never a byte of the output.

    Attributes:
        jobs: steps of rounding, or threads of verifying, at a time.
        device: where weights are rounded.
        force: start over what was made from other inputs, as far as it is ours.
        full_verify: read and compare all data of the output, not headers alone.
        plot: draw the choice of experts and the errors of the blocks.

    """

    jobs: int = 2
    device: str = "cpu"
    force: bool = False
    full_verify: bool = False
    plot: bool = False


# -- prepared ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that nothing speaks against.

    Attributes:
        request: as it was made.
        sketch: the plan of quantizing, with a stand-in for the experts that stay: right in all but which they are.
        inputs: stage -> what its result depends on, for the stages that are to be done, in order.

    """

    request: Request
    sketch: Plan
    inputs: Mapping[str, Mapping[str, object]]

    @property
    def kept(self) -> int:
        """Routed experts of a layer that the output has."""
        return int(self.sketch.summary["experts_after"])

    def changed(self, stages: Mapping[str, StageRecord]) -> dict[str, str]:
        """Stages whose results are of other inputs, and the first difference of each."""
        return changed(stages, self.inputs, names_of(self.request.source.shards))


def plan_compress(request: Request, *, force: bool = False) -> Prepared:
    """Plan everything, and write nothing; with `force`, what was made from other inputs is no obstacle.

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
    prepared = Prepared(request=request, sketch=sketch, inputs=_inputs(request, sketch))
    if not force:
        stages = read_stages(request.folder)
        refuse_changed(request.folder, stages, prepared.changed(stages))
    if state.name != "finished":
        beside = max(request.tuning_bytes, _hidden_bytes(request, request.eval_windows, request.precision))
        Output(request.out, sketch, FileSystem()).refuse_too_little_space(beside)
    return prepared


def plan_for(request: Request, manifest: Manifest | None) -> Plan:
    """The plan of the stage that writes the output."""
    return plan_quantize(request.source, request.scheme, manifest, request.view, request.recipe)


def _hidden_bytes(request: Request, windows: Windows | None, precision: Precision | None) -> int:
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

    from shardxform.forward.skeleton import Skeleton, mtp_numbers
    from shardxform.forward.weights import Precision, Weights

    with Weights(source, Precision(torch.device("cpu"), torch.float32)) as weights:
        return len(mtp_numbers(Skeleton(weights)))


def _inputs(request: Request, sketch: Plan) -> dict[str, dict[str, object]]:
    """What the result of every stage depends on; what it takes from another stage is that one's inputs, hashed."""
    out: dict[str, dict[str, object]] = {}
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


def _computed(request: Request) -> dict[str, object]:
    assert request.precision is not None
    return {
        computing.KEY: computing.of_model(str(request.precision.device)),
        "device": request.precision.device.type,
        "dtype": str(request.precision.dtype).removeprefix("torch."),
    }


def _hash(inputs: Mapping[str, object]) -> str:
    return hashlib.sha256(dumps(computing.without(inputs)).encode()).hexdigest()
