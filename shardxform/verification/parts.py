"""Verification of quantized weights as stored: every part is there, in the dtype and shape that the scheme gives.

`formats.stored` does the comparing; here its errors become findings. Names, dtypes and shapes only, no tensor data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Final

from shardxform.ask.recipe import Reach, first_steps_told
from shardxform.checkpoint.record import PROVENANCE
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import CheckpointError, FamilyError, SchemeError
from shardxform.formats.config_names import declared_in, method_of
from shardxform.formats.decoding import is_read
from shardxform.formats.encoding import Source, Storage
from shardxform.formats.scheme import FORMATS, Grid
from shardxform.formats.stored import Stored, scan_stored
from shardxform.model.layout import COMPANIONS, Layout
from shardxform.verification.declared import faults_of_words
from shardxform.verification.findings import Findings, Item

__all__ = ["Freedom", "Pair", "Rule", "check_merged_rows", "check_parts", "freedom_of", "grid_of", "pair_of", "rule_of"]

_ABOUT: Final = re.compile(r"tensor '([^']+)'(?: is |: )(.*)", re.DOTALL)
_MALFORMED: Final = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_ALONG_ROWS: Final = {"qweight": 0, "scales": 0, "weight_packed": 1, "weight_scale": 1}
_SLACK: Final = 1  # codes that tuning may move a weight from the nearest
_SMALLEST_SCALE: Final = 168 * 2.0**-24  # float16(1e-5), where scales are clamped
_WIDEST_CLIP: Final = 1.2
_SEARCHED: Final[Mapping[int, tuple[float, float]]] = {4: (389 / 512, 592 / 512), 8: (1006 / 1024, 1180 / 1024)}
_FEWEST_STEPS: Final = 50  # of a tool that does not say how many; auto-round's own recipes have 50, 200 and 1,000
_UNTOLD: Final = Reach((1 + 1 / _FEWEST_STEPS) / 2, (1 + 1 / _FEWEST_STEPS) / 2)


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight [O, I] of the source, and the stored module, or rows of it, that stand for it.

    `name` is in the current spelling, whatever the source's and the output's.
    """

    name: str
    source: Source
    stored: Storage

    @property
    def words(self) -> str:
        """Name of the tensor that holds the integers."""
        return self.stored.parts[0][1].name


@dataclass(frozen=True, slots=True)
class Freedom:
    """What a way of rounding leaves open, beside to which of two codes a weight goes; see `systematic`.

    Attributes:
        offset: most that is added to a weight before it is rounded, in steps.
        narrowest, widest: smallest and largest scale of a group, as factors of the one that brings its largest weight
            to the end of the range.
        smallest: where scales are clamped from below.

    """

    offset: float
    narrowest: float
    widest: float
    smallest: float = _SMALLEST_SCALE

    @property
    def growth(self) -> float:
        """Most that the squared error of plain rounding with the same scales grows by."""
        return 12 * self.offset**2 + 1


@dataclass(frozen=True, slots=True)
class Rule:
    """How weights were rounded, as far as it is known.

    Attributes:
        stored: format, bits and groups.
        grid: what rounding the source again must reproduce bit for bit; None where only a bound is known.
        tolerance: codes that a weight may be from the nearest; where our record says how it was tuned, what offsets of
            so many steps allow.
        freedom: what the rounding leaves open.
        packed: the source, where its weights are the same integers and scales in another form.
        anew: whether integers of the source were rounded anew; None where that is not known.
        plain: whether the output is known not to be tuned; then a weight that is off is worth a warning at least.

    """

    stored: Stored
    grid: Grid | None
    tolerance: float
    plain: bool
    freedom: Freedom
    packed: Stored | None = None
    anew: bool | None = None


def check_parts(checkpoint: Checkpoint, layout: Layout, findings: Findings) -> Stored | None:
    """Report every part of a quantized weight that is missing, misshapen or foreign to the format.

    Call it when names and counts are checked: what was said of a tensor then is not said again.

    Returns:
        the checkpoint as modules; None when it has none, when its quantization is not one that is understood, or when
        its weights are read by rules, by which their parts are looked at.

    """
    declared: object = None
    with suppress(SchemeError):  # which is told where the config is looked at
        declared = declared_in(checkpoint.config)
    if not isinstance(declared, Mapping) or method_of(declared) not in FORMATS:
        return None
    there = any(name.rpartition(".")[2] in COMPANIONS for name in checkpoint.tensors)
    if not there or is_read(checkpoint.config):
        return None
    try:
        stored, errors = scan_stored(checkpoint)
    except (FamilyError, SchemeError) as e:
        if not any(problem.code == "quantization-config" for problem in findings.problems):
            if _check_words(declared, layout, checkpoint, findings):
                return None
            text = str(e).removeprefix(f"{checkpoint.where}/").removeprefix(f"{CONFIG}: ")
            findings.warn("not-understood", CONFIG, f"quantized weights are not looked into: {text}")
        if method_of(declared) != "mlx":  # which merges nothing
            check_merged_rows(checkpoint, layout, findings)
        return None
    except _MALFORMED as e:  # shapes or values that nothing can mean; as a rule a problem says so already
        if not findings.problems:
            findings.problem("parts", ".", f"quantized weights make no sense: {e!r}")
        return None
    items = list(_items(errors, layout, findings))
    findings.items([item for item in items if isinstance(item, Item)], layout.num_experts)
    for item in items:
        if not isinstance(item, Item):
            findings.problem(*item)
    if errors and not findings.problems:
        findings.problem("parts", ".", str(errors[0]))
    return stored


def _check_words(declared: Mapping[str, object], layout: Layout, checkpoint: Checkpoint, findings: Findings) -> bool:
    """Hold words that are not read against bits and groups of the config; tells whether they contradict each other."""
    found = list(faults_of_words(declared, layout, checkpoint.tensors))
    findings.items([Item("bits", name, layout.places[name], text) for name, text in found], layout.num_experts)
    return bool(found)


def _items(errors: list[CheckpointError], layout: Layout, findings: Findings) -> Iterator[Item | tuple[str, str, str]]:
    """Errors about tensors that no problem names yet; those of known names can be told together."""
    for error in errors:
        about = _ABOUT.fullmatch(str(error))
        if not about:  # experts of one layer in two spellings, or some of them plain: reported as such
            continue
        name, detail = about.groups()
        stem, _, last = name.rpartition(".")
        if any(
            each in findings.named and each in layout.places for each in (name, *(f"{stem}.{c}" for c in COMPANIONS))
        ):
            continue
        code = "missing" if detail.startswith("missing") else "part-shape" if "expected" in detail else "parts"
        place = layout.places.get(name)
        words = next((each for each in (f"{stem}.qweight", f"{stem}.weight") if each in layout.places), "")
        if place is None and words:  # a part that is not there has its module's place
            place = layout.places[words]._replace(companion=last)
        if "unknown to family" not in detail:
            yield Item(code, name, place, detail) if place else (code, name, detail)


def check_merged_rows(checkpoint: Checkpoint, layout: Layout, findings: Findings) -> None:
    """Members of a merged module have as many words and scales a row, that is the same bits and groups.

    Where one scheme holds for all weights, every shape is checked against it, and this says nothing more.
    """
    merged = {name: group for group, names in layout.family.merged.items() for name in names}
    first: dict[tuple[object, ...], tuple[int, str]] = {}
    items: list[Item] = []
    for name, place in layout.places.items():
        dim = _ALONG_ROWS.get(place.companion)
        local = place.template.name.removesuffix(".weight")
        group = local if place.template.variant else merged.get(local)
        shape = checkpoint.tensors[name].spec.shape
        if dim is None or group is None or len(shape) != 2:
            continue
        size, other = first.setdefault((place.scope, place.layer, group, place.companion), (shape[dim], name))
        if size != shape[dim]:
            detail = f"{shape[dim]} elements a row, but {size} in {other}, which clients merge with it"
            items.append(Item("merged", name, place, detail))
    findings.items(items, layout.num_experts)


def pair_of(name: str, source: Sequence[Storage], stored: Stored) -> Pair | None:
    """The stored module of the weight `name`, as `Stored.weights` calls it; None when none stands for it."""
    found = stored.weights.get(name)
    return Pair(name, source[0], found.sources[0]) if found and len(source) == 1 else None


def rule_of(
    stored: Stored,
    record: Mapping[str, object],
    tolerance: int | None,
    findings: Findings,
    packed: Stored | None = None,
) -> Rule:
    """How the weights of `stored` were rounded: exactly, when our record says by which rule.

    Args:
        stored: the output.
        record: `inputs` of shardxform.json, or empty.
        tolerance: codes that a weight may be from the nearest; None for 0 where the record says that weights were
            rounded to nearest, and 1 where they were tuned or nothing is known.
        findings: added to.
        packed: a source of integers; where it was converted, nothing was rounded.

    """
    scheme = record.get("scheme")
    scheme = scheme if isinstance(scheme, Mapping) else {}
    rounds = record.get("command") == "quantize" or "method" in scheme  # `convert` says in which scheme it wrote
    if packed and not rounds and stored.weights.keys() <= packed.weights.keys():
        return Rule(stored, None, 0, plain=True, freedom=freedom_of(stored.scheme.grid, None), packed=packed)
    grid = grid_of(scheme.get("grid")) if scheme.get("method") == "rtn" else None
    if grid and (grid.bits, grid.group_size) != (stored.scheme.grid.bits, stored.scheme.grid.group_size):
        ours = stored.scheme.grid
        text = f"rounded to {grid.bits} bits in groups of {grid.group_size}, but config.json says {ours.bits} in groups"
        findings.problem("record", PROVENANCE, f"{text} of {ours.group_size}")
        grid = None
    declared = declared_in(stored.layout.config)
    tuned = scheme.get("method", "rtn") != "rtn" or bool(declared.get("iters"))
    reach = _reach(record.get("recipe")) if scheme.get("method") == "auto-round" else None
    start = grid_of(scheme.get("grid")) or replace(stored.scheme.grid, search=True)
    freedom = freedom_of(start, reach, tolerance)
    anew = scheme.get("requantize") is True if rounds else None
    bound = tolerance if tolerance is not None else 0 if grid else freedom.offset if reach else _SLACK
    return Rule(stored, grid, bound, plain=not tuned, freedom=freedom, anew=anew)


def _reach(recipe: object) -> Reach | None:
    """How far tuning a block can move offsets and clips, by our record; None where it says nothing.

    Steps fall to zero linearly from the first.
    """
    iters = recipe.get("iters") if isinstance(recipe, Mapping) else None
    if not isinstance(recipe, Mapping) or type(iters) is not int or iters < 1:
        return None
    offset, clip = first_steps_told(recipe, iters)
    return Reach(offset * (iters + 1) / 2, clip * (iters + 1) / 2)


def freedom_of(grid: Grid, reach: Reach | None, tolerance: float | None = None) -> Freedom:
    """Give what tuning by signed steps leaves open, from a start that was searched if `grid` says so.

    Args:
        grid: bits, and whether scales were searched.
        reach: how far they move offsets and clips at most; None where nothing is known.
        tolerance: codes that a weight may be from the nearest, where the caller says so.

    """
    offset, clip = reach or _UNTOLD
    walked = min(1.0, offset + 2.0**-12)  # offsets are multiples of 2^-13
    low, high = _SEARCHED[grid.bits] if grid.search else (1.0, 1.0)
    clipped = min(1.0, clip + 2.0**-12)
    return Freedom(max(walked, tolerance or 0), (1 - clipped) * low, min(_WIDEST_CLIP, 1 + clipped) * high)


def grid_of(recorded: object) -> Grid | None:
    """The grid of a record; None when it is none, or one with more to it than is known here."""
    try:
        grid = Grid(**recorded) if isinstance(recorded, Mapping) else None
    except (SchemeError, TypeError):
        return None
    return grid if grid and asdict(grid) == recorded and type(grid.search) is bool else None
