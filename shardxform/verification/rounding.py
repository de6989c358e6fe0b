"""Verification of quantized weights against the source's: rounded again, bit for bit, or within a bound.

With r = fl32(w / s) for a weight w, its stored scale s and code q, the nearest code is r rounded and clamped to the
range. Where r lies in the range |r - w/s| <= 2^(bits - 26), half an ulp, so that a code at most t from the nearest
means |w - s q| <= |s| (1/2 + t + 2^(bits - 26)); beyond the range the code must be at its end, or t from it. A weight
that is not finite is no rounding of anything. All this is decided in float32, where r - q is exact near 1/2.
"""

# O: output channels, I: input channels, W: words of a row, G: groups of a row.

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.formats import packing
from shardxform.formats.encoding import Opener, Read, SourceDtype, row_tiles
from shardxform.formats.packing import IntRows
from shardxform.formats.rounding import quantize
from shardxform.formats.scheme import COLUMN_MULTIPLE, Grid
from shardxform.verification.findings import Findings, Rounding, WeightError
from shardxform.verification.parts import Pair, Rule
from shardxform.verification.systematic import STEP, Sums, found_in

__all__ = ["Tally", "examine", "report_tallies"]

_TILE_WEIGHTS: Final = 1 << 17
"""Weights that are held against their codes at a time: few enough for the cache, unless a row has more."""

_NUMBA: Final = find_spec("numba") is not None


@dataclass(slots=True)
class Tally:
    """What one pair showed.

    Attributes:
        weights: how many.
        bad, moved, clipped: not within the tolerance; within it, but not nearest; beyond the range by more than half a
            step, and rightly at its end.
        square, energy: sums of (w - w')^2 and of w^2.
        outside: of squares of what the range of codes does not hold, beyond its ends.
        words_equal, scales_differing: against the source rounded again.
        first_bad, first_scale: a sentence each on the first.
        sums: over rows, where only a bound on codes is known.
        same: whether the source's own integers were compared.
        systematic: what these show to be wrong with codes and scales, a sentence each; empty if nothing.

    """

    pair: Pair
    weights: int = 0
    bad: int = 0
    moved: int = 0
    clipped: int = 0
    square: float = 0.0
    energy: float = 0.0
    outside: float = 0.0
    words_equal: bool = True
    scales: int = 0
    scales_differing: int = 0
    first_bad: str = ""
    first_scale: str = ""
    sums: Sums | None = None
    same: bool = False
    systematic: tuple[str, str] = ("", "")

    @property
    def relative_error(self) -> float:
        """Norm of the error over the norm of the weight; 0 for a weight of zeros."""
        return math.sqrt(self.square / self.energy) if self.energy else 0.0

    @property
    def sound(self) -> bool:
        """Whether every code is within the tolerance, alone and all together, and every scale one that can be."""
        return self.words_equal and not self.scales_differing and not self.bad and not any(self.systematic)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a code may be from r: `near` for nearest, `far` for right; `strict` rounds r to even first."""

    zero: int
    span: int
    strict: bool
    near: float
    far: float

    @classmethod
    def of(cls, rule: Rule, columns: int) -> Limits:
        """By the rule: to the tie where rounding is known to be to even, else to either of two equally near codes."""
        grid = rule.stored.scheme.grid
        strict = rule.grid is not None
        near = 0.0 if strict else 0.5
        return cls(grid.zero_code, grid.span(columns), strict, near, near + rule.tolerance)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows of a weight [O, I] from row `start` on, and what is stored for them: words [O, W], scales [O, G]."""

    start: int
    bits: NDArray[Any]
    dtype: SourceDtype
    words: NDArray[np.int32]
    scales: NDArray[np.float32]


def examine(pair: Pair, rule: Rule, read_out: Read, read_source: Read) -> Tally:
    """Hold a stored weight against the source's, tile by tile; its packed parts and one tile are in memory."""
    rows, columns = pair.source.shape
    stored, source = (
        each.open(Opener(read, checked=False)) for read, each in ((read_out, pair.stored), (read_source, pair.source))
    )
    assert isinstance(stored, IntRows)
    if isinstance(source, IntRows) and (rule.packed or (not rule.anew and _are_alike(stored, source))):
        moved = _same(pair, stored, source)
        if rule.packed or rule.anew is False or moved.sound:
            return moved
    limits = Limits.of(rule, columns)
    tally = Tally(pair, sums=None if rule.grid else Sums(columns, limits.zero))
    for start, stop in row_tiles(rows, columns, _TILE_WEIGHTS):
        _examine(_Tile(start, *source.raw(start, stop), *stored.turned(start, stop)), rule, limits, tally)
    if tally.sums:
        tally.systematic = found_in(tally.sums, tally.square - tally.outside, rule.freedom)
        tally.sums = None
    return tally


def _are_alike(ours: IntRows, theirs: IntRows) -> bool:
    return (ours.grid.bits, ours.grid.group_size) == (theirs.grid.bits, theirs.grid.group_size)


def _same(pair: Pair, ours: IntRows, theirs: IntRows) -> Tally:
    """Hold a stored weight against a quantized source's: the same integers and scales, however they lie."""
    rows, columns = pair.source.shape
    tally = Tally(pair, weights=rows * columns, same=True)
    (our_OW, our_OG), (their_OW, their_OG) = ours.turned(0, rows), theirs.turned(0, rows)
    tally.words_equal = np.array_equal(our_OW, their_OW)
    _compare_scales(0, our_OG, their_OG, tally)
    return tally


def _examine(tile: _Tile, rule: Rule, limits: Limits, tally: Tally) -> None:
    if rule.grid is not None and tile.bits.shape[1] % COLUMN_MULTIPLE == 0:
        _round_again(tile, rule.grid, tally)
    usable = np.isfinite(tile.scales) & (tile.scales != 0)  # the others are reported where scales are looked at
    scale_OG = tile.scales if usable.all() else np.where(usable, tile.scales, np.float32(1))
    w_OI = packing.float32_of(tile.bits, tile.dtype)
    codes_OI = packing.unpack(tile.words, rule.stored.scheme.grid.bits, "row")
    seen = (_compiled if _NUMBA else _plain)(w_OI, codes_OI, scale_OG, limits)
    if not all(map(math.isfinite, seen.squares)) or seen.squares[1] == 0:
        seen = replace(seen, squares=_plain(w_OI, codes_OI, scale_OG, limits).squares)  # in float64
    counts, (square, energy, outside) = seen.counts, seen.squares
    if counts[0] and not tally.first_bad:
        tally.first_bad = _explain(tile.start, w_OI, codes_OI, scale_OG, limits)
    tally.weights += w_OI.size
    tally.bad += counts[0]
    tally.moved += counts[1]
    tally.clipped += counts[2]
    tally.square += square
    tally.energy += energy
    tally.outside += outside
    if tally.sums:
        tally.sums.add(*seen.rows, tile.scales)


def _round_again(tile: _Tile, grid: Grid, tally: Tally) -> None:
    """Round the source's rows as `quantize` did, and compare words and scales."""
    again, stats = quantize(tile.bits, tile.dtype, grid, layout="row")
    tally.words_equal &= stats.ok and np.array_equal(again.words, tile.words)
    _compare_scales(tile.start, tile.scales, again.scales.view(np.float16).astype(np.float32), tally)


def _compare_scales(start: int, found: NDArray[np.float32], wanted: NDArray[np.float32], tally: Tally) -> None:
    tally.scales += found.size
    if found.shape == wanted.shape and np.array_equal(found, wanted):
        return
    differing = found != wanted if found.shape == wanted.shape else np.ones(found.shape, np.bool_)
    tally.scales_differing += int(np.count_nonzero(differing))
    if not tally.first_scale and found.shape == wanted.shape:
        at = tuple(int(i) for i in np.unravel_index(int(differing.argmax()), differing.shape))
        tally.first_scale = f"row {start + at[0]}, group {at[1]}: {found[at]:.6g}, expected {wanted[at]:.6g}"


# -- codes against weights ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Counted:
    """Weights of a tile that are bad, moved, clipped; sums of squares; `rows` are what `systematic.Sums.add` takes.

    The squares are those of errors, of weights, and of what lies beyond the range.
    """

    counts: list[int]
    squares: tuple[float, float, float]
    rows: tuple[NDArray[np.int64], NDArray[np.float32]]


def _compiled(
    w_OI: NDArray[np.float32], codes_OI: NDArray[np.uint8], scale_OG: NDArray[np.float32], limits: Limits
) -> _Counted:
    from shardxform.verification import kernels

    settings = kernels.Settings(limits.zero, limits.span, int(limits.strict), limits.near, limits.far)
    counts = np.zeros(3, np.int64)
    sums_2O, peak_OG = np.empty((2, w_OI.shape[0]), np.int64), np.empty(scale_OG.shape, np.float32)
    arrays = counts, sums_2O, peak_OG
    squares = kernels.checker()(w_OI, codes_OI, np.ascontiguousarray(scale_OG), settings, *arrays)
    return _Counted(counts.tolist(), squares, (sums_2O, peak_OG))


def _plain(
    w_OI: NDArray[np.float32], codes_OI: NDArray[np.uint8], scale_OG: NDArray[np.float32], limits: Limits
) -> _Counted:
    seen = _look(w_OI, codes_OI, scale_OG, limits)
    w = seen.weights.astype(np.float64)
    scales = seen.scales.astype(np.float64)
    error, over = w - scales * seen.codes, np.where(seen.beyond, w - scales * seen.inside, 0.0)
    counts = [int(np.count_nonzero(mask)) for mask in (seen.bad, seen.moved, seen.clipped)]
    squares = float(np.vdot(error, error)), float(np.vdot(w, w)), float(np.vdot(over, over))
    return _Counted(counts, squares, _rows(w_OI, seen, limits.span))


def _rows(w_OI: NDArray[np.float32], seen: _Look, span: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Codes of each row beyond a step, and above the nearest less below it [2, O]; largest weights [O, G]."""
    more_OI = seen.codes - seen.inside
    beyond_O = np.count_nonzero(np.abs(more_OI) > STEP, axis=1)
    above_O = 2 * np.count_nonzero(more_OI > 0.5, axis=1) - np.count_nonzero(seen.moved | seen.bad, axis=1)
    peak_OG = np.maximum.reduceat(np.abs(w_OI), np.arange(0, w_OI.shape[1], span), axis=1)
    return np.array([beyond_O, above_O], np.int64), peak_OG


@dataclass(frozen=True, slots=True)
class _Look:
    """Everything about a tile, element by element [O, I]: weights, their scales, codes less zero, r in the range."""

    weights: NDArray[np.float32]
    scales: NDArray[np.float32]
    codes: NDArray[np.float32]
    inside: NDArray[np.float32]
    beyond: NDArray[np.bool_]
    bad: NDArray[np.bool_]
    moved: NDArray[np.bool_]
    clipped: NDArray[np.bool_]
    finite: NDArray[np.bool_]


def _look(
    w_OI: NDArray[np.float32], codes_OI: NDArray[np.uint8], scale_OG: NDArray[np.float32], limits: Limits
) -> _Look:
    finite = np.isfinite(w_OI)
    w_OI = np.where(finite, w_OI, np.float32(0))
    zero = np.float32(limits.zero)
    q_OI = codes_OI.astype(np.float32) - zero
    scale_OI = np.repeat(scale_OG, limits.span, axis=1)[:, : w_OI.shape[1]]
    with np.errstate(over="ignore", under="ignore"):
        ratio = w_OI / scale_OI
    inside = np.clip(ratio, -zero, zero - np.float32(1))
    off = np.abs((np.rint(inside) if limits.strict else inside) - q_OI)
    bad = (off > np.float32(limits.far)) | ~finite
    moved = (off > np.float32(limits.near)) & ~bad
    return _Look(w_OI, scale_OI, q_OI, inside, ratio != inside, bad, moved, np.abs(ratio - inside) > 0.5, finite)


def _explain(
    start: int,
    w_OI: NDArray[np.float32],
    codes_OI: NDArray[np.uint8],
    scale_OG: NDArray[np.float32],
    limits: Limits,
) -> str:
    """A sentence on the first weight that its code is no rounding of."""
    seen = _look(w_OI, codes_OI, scale_OG, limits)
    at = tuple(int(i) for i in np.unravel_index(int(seen.bad.argmax()), seen.bad.shape))
    where = f"row {start + at[0]}, column {at[1]}"
    if not seen.finite[at]:
        return f"{where}: the source's weight is {w_OI[at]}"
    w, scale, code = float(w_OI[at]), float(seen.scales[at]), int(codes_OI[at])
    wanted = int(np.rint(seen.inside[at])) + limits.zero
    value = scale * (code - limits.zero)
    return f"{where}: code {code} for {value:.6g}, expected {wanted} for {w:.6g} (scale {scale:.6g})"


# -- saying it ----------------------------------------------------------------------------------------------------

_EXPERT: Final = re.compile(r".*\.experts\.(\d+)\..*")


def report_tallies(tallies: Sequence[Tally], rule: Rule, findings: Findings) -> Rounding:
    """Add a problem for every weight that is no rounding of the source's, and sum up."""
    for tally in tallies:
        again = "the source's" if rule.packed or tally.same else "what rounding the source again gives"
        _report(tally, again, findings)
    weights, moved = sum(t.weights for t in tallies), sum(t.moved for t in tallies)
    if moved and rule.plain:
        count = sum(t.moved > 0 for t in tallies)
        text = f"{moved} of {weights} weights, in {count} modules, are not at the nearest code, as after tuning"
        findings.warn("moved", ".", f"{text}; but nothing says that OUT was tuned")
    errors = [
        WeightError(
            name=t.pair.name.removesuffix(".weight"), relative_error=t.relative_error, clipped=t.clipped, moved=t.moved
        )
        for t in tallies
        if not t.same
    ]
    energy = sum(t.energy for t in tallies)
    return Rounding(
        modules=len(tallies),
        differing=sum(not t.sound for t in tallies),
        exact=bool(rule.grid or rule.packed) and all(t.sound for t in tallies),
        repacked=rule.packed is not None,
        weights=weights,
        clipped=sum(t.clipped for t in tallies),
        moved=moved,
        relative_error=math.sqrt(sum(t.square for t in tallies) / energy) if energy else 0.0,
        taken_over=0 if rule.packed else sum(t.same for t in tallies),
        by_weight=() if rule.packed else tuple(sorted(errors, key=lambda e: (-e.relative_error, e.name))),
    )


def _report(tally: Tally, again: str, findings: Findings) -> None:
    expert = _EXPERT.fullmatch(tally.pair.name)
    of = f"expert {expert[1]}: " if expert else ""
    scales = f"{tally.scales_differing} of {tally.scales} scales are not {again}"
    codes, ranges = tally.systematic
    name = dict(tally.pair.stored.parts).get("scales", tally.pair.stored.parts[0][1]).name
    if tally.bad:
        text = f"{of}{tally.bad} of {tally.weights} weights are no rounding of the source's, the first at "
        also = f"; {scales}" if tally.scales_differing else f"; {codes}" if codes else ""
        findings.problem("source-error", tally.pair.words, text + tally.first_bad + also)
    elif tally.scales_differing:
        findings.problem("source-scale", name, f"{of}{scales}, the first at {tally.first_scale}")
    elif not tally.words_equal:
        findings.problem("source-error", tally.pair.words, f"{of}its integers are not {again}")
    elif codes:
        findings.problem("systematic", tally.pair.words, f"{of}{codes}")
    elif ranges:
        findings.problem("scale-range", name, f"{of}{ranges}")
