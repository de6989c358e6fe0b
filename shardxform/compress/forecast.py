"""What every stage will take, before anything is done: memory, disk, work, and time on this machine.

Time is arithmetic: a stage is a row of amounts of a few kinds of work, a machine a row of seconds for one of each, and
time their product. What is not measured is as it usually is, which is enough to weigh stages.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import mul
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from shardxform.base.constants import BATCH_TOKENS
from shardxform.base.file_system import FileSystem
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
    plain,
    read_stages,
)
from shardxform.compress.request import CompressOptions, Prepared, Request
from shardxform.errors import CheckpointError
from shardxform.execution.output import state_of
from shardxform.formats.grid import Grid
from shardxform.formats.rounding import quantize
from shardxform.model.layout import Layout, layout_of
from shardxform.plan.plan import tokens_of

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.forward.weights import Precision

__all__ = ["Forecast", "forecast", "weights_of"]

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
        work_bytes=request.tuning_bytes,
        written_bytes=prepared.sketch.nbytes,
        tokens=sum(map(tokens_of, prepared.sketch.steps)),
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
        once = recipe.samples * recipe.seqlen * (1 if recipe.inputs == "fp" else 2)  # through both chains, no step
        tokens = once + _STEP * (recipe.block_tokens - once)
        tuned = _Work(products=tokens * reached, tokens=tokens * layout.num_layers, rounded=_SEARCHED * written)
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
