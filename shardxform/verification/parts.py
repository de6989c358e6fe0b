"""Verification of quantized weights as stored: every part is there, in the dtype and shape that the scheme gives.

`formats.stored` does the comparing; here its errors become findings. Names, dtypes and shapes only, no tensor data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardxform.checkpoint.record import PROVENANCE
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import CheckpointError, FamilyError, SchemeError
from shardxform.formats.encoding import Storage
from shardxform.formats.scheme import FORMATS, Grid
from shardxform.formats.stored import Stored, scan_stored
from shardxform.model.layout import COMPANIONS, Layout
from shardxform.verification.findings import Findings, Item

__all__ = [
    "SIGMAS",
    "STEP",
    "Freedom",
    "Pair",
    "Rule",
    "Sums",
    "check_parts",
    "found_in",
    "freedom_of",
    "grid_of",
    "pair_of",
    "rule_of",
]

_ABOUT: Final = re.compile(r"tensor '([^']+)'(?: is |: )(.*)", re.DOTALL)
_MALFORMED: Final = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_ALONG_ROWS: Final = {"qweight": 0, "scales": 0, "weight_packed": 1, "weight_scale": 1}
_SLACK: Final = 1  # codes that tuning may move a weight from the nearest
_SMALLEST_SCALE: Final = 168 * 2.0**-24  # float16(1e-5), where scales are clamped
_WIDEST_CLIP: Final = 1.2
_SEARCHED: Final[Mapping[int, tuple[float, float]]] = {4: (389 / 512, 592 / 512), 8: (1006 / 1024, 1180 / 1024)}
_FEWEST_STEPS: Final = 50  # of a tool that does not say how many; auto-round's own recipes have 50, 200 and 1,000


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight [O, I] of the source, and the stored module, or rows of it, that stand for it.

    `name` is in the current spelling, whatever the source's and the output's.
    """

    name: str
    source: Storage
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
        """Most that the squared error of plain rounding grows by."""
        return (12 * self.offset**2 + 1) * self.widest**2


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
        plain: whether the output is known not to be tuned; then a weight that is off is worth a warning at least.

    """

    stored: Stored
    grid: Grid | None
    tolerance: float
    plain: bool
    freedom: Freedom
    packed: Stored | None = None


def check_parts(checkpoint: Checkpoint, layout: Layout, findings: Findings) -> Stored | None:
    """Report every part of a quantized weight that is missing, misshapen or foreign to the format.

    Call it when names and counts are checked: what was said of a tensor then is not said again.

    Returns:
        the checkpoint as modules; None when it has none, or when its quantization is not one that is understood.

    """
    declared = checkpoint.config.get("quantization_config")
    if not isinstance(declared, Mapping) or declared.get("quant_method") not in FORMATS:
        return None
    if not any(name.rpartition(".")[2] in COMPANIONS for name in checkpoint.tensors):
        return None
    try:
        stored, errors = scan_stored(checkpoint)
    except (FamilyError, SchemeError) as e:
        if not any(problem.code == "quantization-config" for problem in findings.problems):
            text = str(e).removeprefix(f"{checkpoint.where}/").removeprefix(f"{CONFIG}: ")
            findings.warn("not-understood", CONFIG, f"quantized weights are not looked into: {text}")
        _check_merged_rows(checkpoint, layout, findings)
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
        if place is None and f"{stem}.qweight" in layout.places:  # a part that is not there has its module's place
            place = replace(layout.places[f"{stem}.qweight"], companion=last)
        if "unknown to family" not in detail:
            yield Item(code, name, place, detail) if place else (code, name, detail)


def _check_merged_rows(checkpoint: Checkpoint, layout: Layout, findings: Findings) -> None:
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
        packed: a quantized source; then nothing was rounded.

    """
    if packed:
        return Rule(stored, None, 0, plain=True, freedom=freedom_of(stored.scheme.grid, None), packed=packed)
    scheme = record.get("scheme")
    scheme = scheme if isinstance(scheme, Mapping) else {}
    grid = grid_of(scheme.get("grid")) if scheme.get("method") == "rtn" else None
    if grid and (grid.bits, grid.group_size) != (stored.scheme.grid.bits, stored.scheme.grid.group_size):
        ours = stored.scheme.grid
        text = f"rounded to {grid.bits} bits in groups of {grid.group_size}, but config.json says {ours.bits} in groups"
        findings.problem("record", PROVENANCE, f"{text} of {ours.group_size}")
        grid = None
    declared = stored.layout.config["quantization_config"]
    tuned = scheme.get("method", "rtn") != "rtn" or bool(declared.get("iters"))
    steps = _steps(record) if scheme.get("method") == "auto-round" else None
    start = grid_of(scheme.get("grid")) or replace(stored.scheme.grid, search=True)
    freedom = freedom_of(start, steps, tolerance)
    if tolerance is not None:
        return Rule(stored, grid, tolerance, plain=not tuned, freedom=freedom)
    bound = 0 if grid else freedom.offset if steps else _SLACK
    return Rule(stored, grid, bound, plain=not tuned, freedom=freedom)


def _steps(record: Mapping[str, object]) -> int | None:
    """Steps of tuning a block, by our record."""
    recipe = record.get("recipe")
    iters = recipe.get("iters") if isinstance(recipe, Mapping) else None
    return iters if type(iters) is int and iters > 0 else None


def freedom_of(grid: Grid, steps: int | None, tolerance: float | None = None) -> Freedom:
    """Give what tuning by signed steps leaves open, from a start that was searched if `grid` says so.

    Steps begin at 1 / steps and fall to zero linearly, so that offsets and clips move by (1 + 1 / steps) / 2 at most.

    Args:
        grid: bits, and whether scales were searched.
        steps: how many; None where nothing is known.
        tolerance: codes that a weight may be from the nearest, where the caller says so.

    """
    walked = min(1.0, (1 + 1 / (steps or _FEWEST_STEPS)) / 2 + 2.0**-12)  # offsets are multiples of 2^-13
    low, high = _SEARCHED[grid.bits] if grid.search else (1.0, 1.0)
    return Freedom(max(walked, tolerance or 0), (1 - walked) * low, _WIDEST_CLIP * high)


def grid_of(recorded: object) -> Grid | None:
    """The grid of a record; None when it is none, or one with more to it than is known here."""
    try:
        grid = Grid(**recorded) if isinstance(recorded, Mapping) else None
    except (SchemeError, TypeError):
        return None
    return grid if grid and asdict(grid) == recorded and type(grid.search) is bool else None


# O: output channels, I: input channels, G: groups of a row, S: columns of a group.


SIGMAS: Final = 8.0
"""Standard deviations between the worst that rounding and tuning give and what is reported."""

STEP: Final = np.float32(1 + 2.0**-10)
"""A whole step, and what float32 may have made of it."""

_LEAST_SHARE: Final = 2.0**-10
_ROUNDED: Final = (1 + 2.0**-8) ** 2
"""So many times wider, or narrower, a scale may be for having been rounded to 16 bits, and its start before."""


@dataclass(slots=True)
class Sums:
    """What the rows of one weight showed that were looked at so far, from the first on, a run of rows in each item.

    Attributes:
        columns, zero: of the weight, and the code that stands for zero.
        beyond, above: of each row, codes farther than a step; codes above the nearest less those below it.
        peaks, scales: of each group [O, G], its largest weight as a magnitude, and its scale.

    """

    columns: int
    zero: int
    beyond: list[NDArray[np.int64]] = field(default_factory=list)
    above: list[NDArray[np.int64]] = field(default_factory=list)
    peaks: list[NDArray[np.float32]] = field(default_factory=list)
    scales: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, sums_2O: NDArray[np.int64], peak_OG: NDArray[np.float32], scale_OG: NDArray[np.float32]) -> None:
        """Add the next rows."""
        self.beyond.append(sums_2O[0])
        self.above.append(sums_2O[1])
        self.peaks.append(peak_OG)
        self.scales.append(scale_OG)

    @property
    def mean(self) -> float:
        """Mean signed error in codes: those above the nearest less those below it, over all weights."""
        rows = sum(len(each) for each in self.above)
        return sum(int(each.sum()) for each in self.above) / max(rows * self.columns, 1)


@dataclass(frozen=True, slots=True)
class _Groups:
    """Groups of a weight.

    Groups of zeros do not count: what their codes stand for is next to nothing, whatever the scale.

    Attributes:
        ratio_OG: scales, as factors of those that plain rounding takes; 1 for groups of zeros.
        number: of groups that hold more than zeros.
        plain: squared error to be expected of plain rounding.

    """

    ratio_OG: NDArray[np.float32]
    number: int
    plain: float

    @classmethod
    def of(cls, sums: Sums, freedom: Freedom) -> _Groups:
        peak_OG, scale_OG = np.concatenate(sums.peaks), np.concatenate(sums.scales)
        used_OG = np.isfinite(peak_OG) & (peak_OG > 0)
        plain_OG = np.maximum(peak_OG / np.float32(sums.zero), np.float32(freedom.smallest))
        plain_OG[~used_OG] = 1
        ratio_OG = np.abs(scale_OG) / plain_OG
        ratio_OG[~used_OG] = 1
        plain_OG[~used_OG] = 0
        span = -(-sums.columns // peak_OG.shape[1])  # of a short last group too, which only raises the limit
        square = float(np.square(plain_OG, dtype=np.float64).sum())
        return cls(ratio_OG, int(np.count_nonzero(used_OG)), square * span / 12)


def found_in(sums: Sums, square: float, freedom: Freedom) -> tuple[str, str]:
    """Say what is systematically wrong with the codes and with the scales of a weight: empty where nothing is.

    Args:
        sums: over all its rows.
        square: its squared error.
        freedom: what the way of rounding leaves open.

    """
    groups = _Groups.of(sums, freedom)
    codes = _in_steps(sums, freedom), _signs(sums, freedom), _size(groups, square, freedom)
    return "; ".join(text for text in codes if text), _scales(groups, freedom)


def _in_steps(sums: Sums, freedom: Freedom) -> str:
    """Rows of which too many codes are farther than a step."""
    beyond_O, size = np.concatenate(sums.beyond), sums.columns
    limit = _most(freedom.offset - 0.5, size)
    wrong = int(np.count_nonzero(beyond_O > limit * size))
    if not wrong:
        return ""
    worst = int(beyond_O.argmax())
    mean = int(np.concatenate(sums.above)[worst]) / size
    return (
        f"{wrong} of {len(beyond_O)} rows are systematically off, row {worst} most: {beyond_O[worst] / size:.3f} of its"
        f" codes by more than a step, expected at most {limit:.3f}; its mean signed error is {mean:+.3f} codes"
    )


def _most(probability: float, number: int) -> float:
    """The share that chance does not reach, of so many, each of which comes up with `probability` at most."""
    p, most = min(max(probability, _LEAST_SHARE), 1.0), SIGMAS**2 / 2 / max(number, 1)
    low, high = p, 1.0
    for _ in range(40):
        x = (low + high) / 2
        low, high = (x, high) if _divergence(x, p) < most else (low, x)
    return high


def _divergence(x: float, p: float) -> float:
    """Of a coin that comes up x of the time from one that does p of the time, in nats."""
    rest = (1 - x) * math.log((1 - x) / (1 - p)) if 0 < x < 1 and p < 1 else 0.0
    return x * math.log(x / p) + rest


def _signs(sums: Sums, freedom: Freedom) -> str:
    """A weight whose codes lie on one side."""
    limit = SIGMAS * freedom.offset / math.sqrt(max(sum(len(each) for each in sums.above), 1))
    if abs(sums.mean) <= limit:
        return ""
    return f"mean signed error {sums.mean:+.3f} codes, expected {-limit:.3f} to {limit:.3f}"


def _size(groups: _Groups, square: float, freedom: Freedom) -> str:
    """A weight that is farther from the source's than codes and scales of its kind can be."""
    spread = 12 * math.sqrt(freedom.offset**2 / 3 + 1 / 180) * freedom.widest**2
    most = freedom.growth + SIGMAS * spread / math.sqrt(max(groups.number, 1))
    if not groups.plain or square <= most * groups.plain:
        return ""
    times = math.sqrt(square / groups.plain)
    return f"its error is {times:.2f} times that of plain rounding, expected at most {math.sqrt(most):.2f} times"


def _scales(groups: _Groups, freedom: Freedom) -> str:
    """A weight with scales that no rounding takes."""
    ratio_OG = groups.ratio_OG
    outside_OG = (ratio_OG > freedom.widest * _ROUNDED) | (ratio_OG < freedom.narrowest / _ROUNDED)
    if not outside_OG.any():
        return ""
    row, group = divmod(int(outside_OG.argmax()), outside_OG.shape[1])
    where = f"row {row}, group {group}: {ratio_OG[row, group]:.3g} times the min/max scale"
    return (
        f"{np.count_nonzero(outside_OG)} of {groups.number} scales are none that rounding takes, the first at {where},"
        f" expected {freedom.narrowest:.2f} to {freedom.widest:.2f} times"
    )
