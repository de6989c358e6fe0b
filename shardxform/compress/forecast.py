"""What every stage will take, before anything is done: memory, disk, work, and time where the machine was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from shardxform.base.file_system import FileSystem
from shardxform.compress.costs import Costs, amounts, seconds, shape_of
from shardxform.compress.folder import Entry, plain, read_entries
from shardxform.compress.prepared import Prepared, tuning_bytes
from shardxform.compress.request import CARD, EVALUATE, QUANTIZE, SCORE, SELECT, VERIFY, Request, Settings
from shardxform.execution.output import state_of
from shardxform.plan.plan import tokens_of

if TYPE_CHECKING:
    from shardxform.calibration import Windows

__all__ = ["forecast", "free_bytes"]

_LIBRARIES: Final = 450_000_000  # python with torch and transformers, resident, once any stage has run the model
_PLAIN: Final = 100_000_000  # python with numpy and the compiled kernels


def forecast(prepared: Prepared, settings: Settings, costs: Costs | None = None) -> list[dict[str, Any]]:
    """One record a stage, in order.

    `state` (`done`, `begun`, `to do`), `peak_memory_bytes` of the process meanwhile, `work_bytes` of disk that is
    free again afterwards, `written_bytes` that stay, `tokens` counted once for each block that they go through; with
    the `costs` of a machine also the `seconds` that the stage takes from its beginning, 0 when it is done.
    """
    request = prepared.request
    entries = read_entries(request.folder)
    base = _LIBRARIES if request.runs_model else _PLAIN
    needs: dict[str, dict[str, int]] = {}
    if request.score_windows is not None:
        needs[SCORE] = _pass(request, request.score_windows, against=False)
    if request.eval_windows is not None:
        needs[EVALUATE] = _pass(request, request.eval_windows, against=True)
    needs[QUANTIZE] = {
        "peak_memory_bytes": prepared.sketch.peak_bytes(settings.jobs) + (0 if request.recipe else base - _PLAIN),
        "work_bytes": tuning_bytes(request),
        "written_bytes": prepared.sketch.nbytes,
        "tokens": sum(map(tokens_of, prepared.sketch.steps)),
    }
    nothing = {"peak_memory_bytes": base, "work_bytes": 0, "written_bytes": 0, "tokens": 0}
    stages = [
        {"stage": stage, "state": _state(prepared, settings, entries, stage), **nothing, **needs.get(stage, {})}
        for stage in prepared.inputs
    ]
    return stages if costs is None else _with_seconds(stages, prepared, settings, costs)


def _with_seconds(
    stages: list[dict[str, Any]], prepared: Prepared, settings: Settings, costs: Costs
) -> list[dict[str, Any]]:
    request, sketch = prepared.request, prepared.sketch
    shape = shape_of(request.source, prepared.kept)
    work = amounts(request, shape, sketch.nbytes, full_verify=settings.full_verify)
    return [
        {**each, "seconds": 0.0 if each["state"] == "done" else seconds(work[each["stage"]], costs)} for each in stages
    ]


def free_bytes(request: Request) -> int:
    """Disk that is free where OUT will be."""
    return FileSystem().free_bytes(request.out.absolute())


def _state(prepared: Prepared, settings: Settings, entries: Mapping[str, Entry], stage: str) -> str:
    entry = entries.get(stage)
    if entry is None:
        begun = stage == QUANTIZE and state_of(prepared.request.out, prepared.sketch).name != "new"
        return "begun" if begun else "to do"
    if not entry.done:
        return "begun"
    return "done" if _still_holds(prepared, settings, entry, stage) else "to do"


def _still_holds(prepared: Prepared, settings: Settings, entry: Entry, stage: str) -> bool:
    """Whether a stage that is recorded as done is not done again, as far as a look at files' names tells."""
    request, inputs = prepared.request, prepared.inputs
    if stage == QUANTIZE:
        return state_of(request.out, prepared.sketch).name == "finished"
    if stage == VERIFY:
        return bool(entry.facts.get("full")) >= settings.full_verify
    if stage == CARD:
        drawn = entry.facts.get("pictures")
        wanted = sum(each in inputs for each in (SELECT, EVALUATE)) if settings.plot else 0
        shown = isinstance(drawn, list) and len(drawn) >= wanted
        return shown and entry.inputs == plain(inputs[CARD]) and (request.out / "README.md").is_file()
    return all((request.folder / name).is_file() for name in entry.files if not name.endswith(".png"))


def _pass(request: Request, windows: Windows, *, against: bool) -> dict[str, int]:
    """What running the model takes; of a quantized one, which is not there yet, no more than of its source."""
    from shardxform.forward.estimate import estimate

    assert request.precision is not None
    chains = {"tested": request.source} | ({"reference": request.source} if against else {})
    found = estimate(chains, windows, request.precision, request.folder)
    heads = 1 if against else 0
    return {
        "peak_memory_bytes": found["peak_memory_bytes"],
        "work_bytes": found["work_bytes"],
        "tokens": found["tokens"] * (found["blocks"] + heads) * len(chains),
    }
