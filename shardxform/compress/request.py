"""What `compress` is asked for, and what can be known and refused before the first stage.

A `Request` decides bytes; `CompressOptions` do not. Which experts stay is found out in the first stages, but how many
is known: a stand-in choice gives the plan's tensors, sizes and memory, and meets what the choice would be refused for.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from shardxform.ask.manifest import Manifest
from shardxform.ask.recipe import Recipe
from shardxform.base import computing
from shardxform.base.constants import BATCH_TOKENS
from shardxform.base.file_system import FileSystem
from shardxform.base.strict_json import dumps
from shardxform.calibration import Windows
from shardxform.checkpoint.identity import names_of
from shardxform.checkpoint.table import Checkpoint
from shardxform.compress.folder import (
    CARD,
    EVALUATE,
    PICTURES,
    QUANTIZE,
    SCORE,
    SELECT,
    VERIFY,
    StageRecord,
    changed,
    plain,
    read_stages,
    refuse_changed,
    results_folder,
)
from shardxform.errors import CheckpointError, FamilyError, OutputError, PlanError
from shardxform.execution.output import Output, state_of
from shardxform.experts import ExpertStats, Saliency
from shardxform.experts.choosing import DEFAULT, WEIGHTS, decide, keep_of_ratio, with_width
from shardxform.formats.rounding import quantize
from shardxform.formats.scheme import Grid, Scheme
from shardxform.model.families import family_origin
from shardxform.model.layout import Layout, layout_of, value_at
from shardxform.plan.narrowing import width_key
from shardxform.plan.plan import Plan, source_inputs, step_tokens
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions
from shardxform.verification.structure import refuse_unsound

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.forward.weights import Precision

__all__ = [
    "CompressOptions",
    "Forecast",
    "Prepared",
    "Pruning",
    "Request",
    "forecast",
    "plan_compress",
    "plan_for",
    "weights_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """Which experts stay.

    Attributes:
        keep: experts of every layer that stay; or
        ratio: the share of them that goes.
        criterion: what they are chosen by, a name of `experts.CRITERIA`.
        protect: keep super experts, whatever their score.
        width: channels that every expert that stays keeps; None for all.

    """

    keep: int | None = None
    ratio: float | None = None
    criterion: str = DEFAULT
    protect: bool = False
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.ratio is None):
            raise PlanError("pruning: expected either a number of experts to keep or a ratio, found both or neither")
        if self.criterion in WEIGHTS:
            raise PlanError(
                f"`criterion` {self.criterion}: it is of weights alone, and compress scores experts on text;"
                " `shardxform select SRC` makes a manifest of it, and `shardxform quantize` takes that"
            )

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
    def narrows(self) -> bool:
        """Whether experts lose channels."""
        return self.pruning is not None and self.pruning.width is not None

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
    if sketch.container != "gguf":  # what that must hold is what its plan was made of
        refuse_unsound(sketch)
    state = state_of(request.out, sketch)
    prepared = Prepared(request=request, sketch=sketch, inputs=_inputs(request, sketch))
    if not force:
        stages = read_stages(request.folder)
        refuse_changed(request.folder, stages, prepared.changed(stages))
    if state.name != "finished":
        states = _hidden_bytes(request, request.eval_windows, request.precision)
        beside = max(request.tuning_bytes + sketch.work_bytes, states)
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
    from shardxform.experts.weighing import model_facts

    alike = ExpertStats.alike(layout.num_experts, _channels(layout) if pruning.width else 0)
    saliency = Saliency(
        model=model_facts(source, layout),
        layers=dict.fromkeys(layout.moe_layers, alike),
        mtp_layers=dict.fromkeys(range(_scored_mtp_layers(source)), alike),
        tokens=0,
        runs=(),
        where=source.where,
    )
    choice = decide(saliency, pruning.kept(layout.num_experts))
    return (with_width(choice, pruning.width) if pruning.width else choice).manifest()


def _channels(layout: Layout) -> int:
    """Channels of a routed expert, as config.json has them."""
    return int(value_at(layout.config, ".".join(width_key(layout))))


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
        out[SCORE] = {"source": source_inputs(request.source, {}), **family_origin(request.source.config), **run}
        kept = pruning.kept(int(sketch.summary["experts_before"]))
        if pruning.width:
            out[SCORE] = {**out[SCORE], "channels": True}
        asked = {"keep": kept, "ratio": pruning.ratio, "criterion": pruning.criterion, "protect": pruning.protect}
        asked = {**asked, "width": pruning.width} if pruning.width else asked
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


# -- forecast ----------------------------------------------------------------------------------------------------------
# What every stage will take, before anything is done: memory, disk, work, and time on this machine.
#
# Time is arithmetic: a stage is a row of amounts of a few kinds of work, a machine a row of seconds for one of each,
# and time their product. What is not measured is as it usually is, which is enough to weigh stages.

_LIBRARIES: Final = 450_000_000  # python with torch and transformers, resident, once any stage has run the model
_PLAIN: Final = 100_000_000  # python with numpy and the compiled kernels
_UNIT_SECONDS: Final = 1e-3  # of progress
_STEP: Final = 4  # of tuning against a forward pass: it, backward, and what is computed again
_SEARCHED: Final = 10  # a weight made ready to be tuned against one rounded to nearest
_READ_BYTES: Final = 64 << 20
_ROUNDED: Final = (256, 2048)  # rows and columns
_EXPERTS: Final = 32
_WIDTH: Final = 1024  # where a config does not say it


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What one stage will take.

    Attributes:
        stage: its name.
        state: `done`, `begun` or `to do`.
        peak_memory_bytes: of the process meanwhile.
        work_bytes: of disk that is free again afterwards.
        written_bytes: that stay.
        tokens: counted once for each block that they go through.
        seconds: from its beginning; 0 when it is done, or time was not asked for.

    """

    stage: str
    state: str
    peak_memory_bytes: int
    work_bytes: int = 0
    written_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0


def forecast(prepared: Prepared, options: CompressOptions, *, timed: bool = False) -> list[Forecast]:
    """Return what every stage will take, in order; `timed` measures this machine for some seconds.

    Raises:
        FamilyError: transformers does not run the model.
        CheckpointError: the source cannot be read.

    """
    stages = read_stages(prepared.request.folder)
    found = [_forecast(prepared, options, stages, stage) for stage in prepared.inputs]
    if not timed or all(each.state == "done" for each in found):
        return found
    work, rates = _amounts(prepared, full_verify=options.full_verify), _measured(prepared, options.jobs)
    return [
        each if each.state == "done" else replace(each, seconds=_seconds(work[each.stage], rates[each.stage]))
        for each in found
    ]


def weights_of(prepared: Prepared) -> dict[str, int]:
    """Return every stage's share of the work, as it usually is."""
    work = _amounts(prepared)
    return {stage: max(1, round(_seconds(work[stage], _USUAL) / _UNIT_SECONDS)) for stage in prepared.inputs}


# -- memory and disk --------------------------------------------------------------------------------------------------


def _forecast(prepared: Prepared, options: CompressOptions, stages: Mapping[str, StageRecord], stage: str) -> Forecast:
    request = prepared.request
    base = _LIBRARIES if request.runs_model else _PLAIN
    found = Forecast(stage=stage, state=_state(prepared, options, stages.get(stage), stage), peak_memory_bytes=base)
    if stage == SCORE and request.score_windows is not None:
        return _pass(found, request, request.score_windows)
    if stage == EVALUATE and request.eval_windows is not None:
        return _pass(found, request, request.eval_windows, against=True)
    if stage != QUANTIZE:
        return found
    return replace(
        found,
        peak_memory_bytes=prepared.sketch.peak_bytes(options.jobs) + (0 if request.recipe else base - _PLAIN),
        work_bytes=request.tuning_bytes + prepared.sketch.work_bytes,
        written_bytes=prepared.sketch.nbytes,
        tokens=sum(map(step_tokens, prepared.sketch.steps)),
    )


def _pass(found: Forecast, request: Request, windows: Windows, *, against: bool = False) -> Forecast:
    """What running the model takes; of a quantized one, which is not there yet, no more than of its source."""
    from shardxform.forward.passes import estimate

    assert request.precision is not None
    chains = {"tested": request.source} | ({"reference": request.source} if against else {})
    one = estimate(chains, windows, request.precision, request.folder)
    return replace(
        found,
        peak_memory_bytes=one["peak_memory_bytes"],
        work_bytes=one["work_bytes"],
        tokens=one["tokens"] * (one["blocks"] + against) * len(chains),
    )


def _state(prepared: Prepared, options: CompressOptions, record: StageRecord | None, stage: str) -> str:
    if record is None:
        begun = stage == QUANTIZE and state_of(prepared.request.out, prepared.sketch).name != "new"
        return "begun" if begun else "to do"
    if not record.done:
        return "begun"
    return "done" if _still_holds(prepared, options, record, stage) else "to do"


def _still_holds(prepared: Prepared, options: CompressOptions, record: StageRecord, stage: str) -> bool:
    """Whether a stage that is recorded as done is not done again, as far as a look at files' names tells."""
    request, inputs = prepared.request, prepared.inputs
    if stage == QUANTIZE:
        return state_of(request.out, prepared.sketch).name == "finished"
    if stage == VERIFY:
        return bool(record.facts.get("full")) >= options.full_verify
    if stage == CARD:
        drawn = record.facts.get("pictures")
        wanted = sum(each in inputs for each in PICTURES) if options.plot else 0
        shown = isinstance(drawn, list) and len(drawn) >= wanted
        return shown and record.inputs == plain(inputs[CARD]) and (request.out / "README.md").is_file()
    return all((request.folder / name).is_file() for name in record.files if not name.endswith(".png"))


# -- time -------------------------------------------------------------------------------------------------------------


class _Work(NamedTuple):
    """How much there is to do of each kind of work; of a machine, the seconds for one of each.

    Attributes:
        products: weights times the tokens that go through them.
        tokens: tokens through a block, for all in it that is no product.
        rounded: weights rounded to nearest, or turned back into numbers.
        moved: bytes read from the disk, or written to it.
        fixed: stages that take about a second whatever the model.

    """

    products: float = 0.0
    tokens: float = 0.0
    rounded: float = 0.0
    moved: float = 0.0
    fixed: float = 0.0


_USUAL: Final = _Work(products=30e-12, tokens=15e-6, rounded=1e-9, moved=1e-9, fixed=0.1)
"""Seconds for one of each, on a thread of 80 GFLOP/s."""


class _Weights(NamedTuple):
    """Weights of the decoder blocks beside the routed experts, of all routed experts, and of the output head."""

    around: int
    experts: int
    head: int


def _weights(layout: Layout, source: Checkpoint) -> _Weights:
    around = experts = head = 0
    for name, place in layout.places.items():
        size = math.prod(source.tensors[name].spec.shape)
        if place.role in ("lm head", "embeddings"):
            head = size
        elif place.scope in ("block", "mtp"):
            routed = place.template.role == "routed experts"
            experts, around = experts + size * routed, around + size * (not routed)
    return _Weights(around, experts, head)


def _amounts(prepared: Prepared, *, full_verify: bool = False) -> dict[str, _Work]:
    """Work of every stage."""
    request, sketch = prepared.request, prepared.sketch
    layout = layout_of(request.source.config, request.source.tensors, request.source.where)
    weights = _weights(layout, request.source)
    reached = weights.around + weights.experts * layout.top_k // max(layout.num_experts, 1)  # by a token
    written = weights.around + weights.experts * prepared.kept // max(layout.num_experts, 1)
    rounding = _Work(rounded=written, moved=request.source.nbytes + sketch.nbytes)
    out = {stage: _Work(fixed=1) for stage in (SELECT, VERIFY, CARD)}
    if windows := request.score_windows:
        tokens = windows.ids_NT.size
        out[SCORE] = _Work(products=tokens * reached, tokens=tokens * layout.num_layers, moved=request.source.nbytes)
    if windows := request.eval_windows:  # source and output side by side, and the head of both
        tokens, batches = windows.ids_NT.size, math.ceil(windows.ids_NT.size / BATCH_TOKENS)
        both = _Work(products=2 * tokens * (reached + weights.head), tokens=2 * tokens * layout.num_layers)
        out[EVALUATE] = both._replace(rounded=batches * written, moved=rounding.moved)
    out[QUANTIZE] = rounding
    if recipe := request.recipe:
        once = recipe.windows_run * recipe.seqlen * (1 if recipe.inputs == "fp" else 2)  # through both chains, no step
        timed = recipe.heal.seconds if recipe.heal else 0
        tokens = once + _STEP * (recipe.block_tokens - once - (recipe.heal_tokens if timed else 0))
        merging = [step_tokens(step) - recipe.block_tokens for step in sketch.steps if step_tokens(step)]
        tokens += 0 if timed else max(merging, default=0)  # which has no backward pass
        tuned = _Work(
            products=tokens * reached,
            tokens=tokens * layout.num_layers,
            rounded=_SEARCHED * written,
            fixed=timed / _USUAL.fixed,
        )
        out[QUANTIZE] = tuned._replace(moved=rounding.moved)
    if full_verify:  # rounded again, or held to the bound of tuned rounding
        out[VERIFY] = rounding
    return out


def _seconds(work: _Work, rates: _Work) -> float:
    return math.fsum(map(mul, work, rates))


def _measured(prepared: Prepared, jobs: int) -> dict[str, _Work]:
    """Seconds that one of each kind of work takes in every stage, on this machine with whatever else it is doing."""
    request = prepared.request
    rates = _USUAL._replace(
        rounded=_rounding_seconds(request.scheme.grid) / jobs, moved=_reading_seconds(request.source)
    )
    computed: dict[Precision | None, _Work] = {
        precision: rates._replace(products=_product_seconds(request.source, precision))
        for precision in (request.precision, request.tuned_in)
        if precision
    }
    return {
        stage: computed.get(request.tuned_in if stage == QUANTIZE else request.precision, rates)
        for stage in prepared.inputs
    }


def _reading_seconds(source: Checkpoint) -> float:
    """Seconds to read a byte of the largest shard, from the hub, or the disk if the system forgets what it holds."""
    shard = max(source.shards, key=lambda each: each.nbytes)
    if source.remote and shard.name in source.remote.streamed:
        return float(source.remote.downloads.seconds(source.remote, shard.name))
    fs, path = FileSystem(), source.root / shard.name
    count = min(_READ_BYTES, shard.nbytes)
    start, buffer = (shard.nbytes - count) // 2, memoryview(bytearray(count))
    try:
        fd = fs.open(path, os.O_RDONLY)
        try:
            fs.done_with(fd, start, count)
            return _clock(lambda: fs.read_exact_into(fd, buffer, start)) / count
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror or e}") from e


def _rounding_seconds(grid: Grid) -> float:
    """Seconds of a weight that is rounded to nearest, on one thread."""
    w_OI = np.random.default_rng(0).integers(0, 0x3F00, _ROUNDED).astype(np.uint16)
    plain_grid = replace(grid, search=False)
    return min(_clock(lambda: quantize(w_OI, "BF16", plain_grid, layout="gptq")) for _ in range(2)) / w_OI.size


def _product_seconds(source: Checkpoint, precision: Precision) -> float:
    """Seconds of a weight times a token, in as many experts in turn as no cache holds, each made ready from 16 bits."""
    import torch

    layout = layout_of(source.config, source.tensors, source.where)
    hidden, width = (int(layout.text.get(str(key)) or _WIDTH) for key in map(layout.family.symbols.get, "HI"))
    tokens = max(1, BATCH_TOKENS * layout.top_k // max(layout.num_experts, 1))
    w_EIH = torch.full((_EXPERTS, width, hidden), 0.02, dtype=torch.bfloat16, device=precision.device)
    x_TH = torch.ones(tokens, hidden, dtype=precision.dtype, device=precision.device)

    def multiply() -> None:
        for w_IH in w_EIH:
            found_TI = torch.nn.functional.linear(x_TH, w_IH.to(precision.dtype))
        found_TI.sum().item()  # a device has done it all by then

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would tell of nothing else
    try:
        seconds = min(_clock(multiply) for _ in range(3)) / (w_EIH.numel() * tokens)
    finally:
        torch.set_num_threads(threads)
    return seconds / (threads if precision.device.type == "cpu" else 1)


def _clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
