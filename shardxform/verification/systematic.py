"""Systematic errors of quantized weights: each code is near enough, and all of them together are not.

A bound on single codes passes a weight whose every code is off by one. Shares and means over rows and weights do not.
With r = w / s for a weight w and its stored scale s, clamped to the range of codes, and q its code less the zero point:

*Steps.* Tuning adds an offset v, |v| <= V, to r before it rounds, so that q - r is v + u with u the error of rounding,
which is uniform in [-1/2, 1/2] for weights that no grid binds. A share of V - 1/2 at most is farther than a whole step,
and that where every offset is at its limit: 0 by plain rounding, 0.0025 after 200 steps. Of codes off by one it is 1/2.

*Signs.* A code that is not the nearest lies above or below it. Offsets may all point one way in a row, if its inputs
have one sign, but each row is tuned for an output of its own: over O rows the mean share of codes above the nearest
less those below has a standard deviation of at most V / sqrt(O). Of codes off by one it is 1, and of codes that were
rounded down -1/2, with no code farther than a step.

*Scales.* Tuning multiplies the scale that it starts from, which brings the largest weight of the group to the end of
the range or was searched around that, by a clip between 1 - V and 1.2. Rounded to a 16-bit float, a scale moves by less
than 2^-8; twice, as the start is rounded too.

*Size.* Where r lies beyond the range by e, a code at the end is s e off, and one that is not is s (v + u) off; where it
lies in the range, a code is s (v + u) off at most. So the squared error of a weight is at most the sum of s^2 (v + u)^2
over its codes and of s^2 e^2 over those beyond: the second, what the range cannot hold of weights whose scale was
clipped, is known and taken off. Of the rest the mean of (v + u)^2 is at most V^2 + 1/12, its variance V^2 / 3 + 1/180:
12 V^2 + 1 times what plain rounding in the same steps leaves, s^2 / 12 for each weight.

Limits are where chance leaves off: by Chernoff's bound a share of x among n that have probability p each comes up with
less than exp(-n KL(x || p)), a mean z standard deviations off with less than exp(-z^2 / 2). Both are taken at
`SIGMAS` = 8: 1.3e-14 for a row, 4e-7 for all 3e7 rows of a model with 31,000 quantized weights.
"""

# O: output channels, I: input channels, G: groups of a row, S: columns of a group.

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardxform.verification.parts import Freedom

__all__ = ["SIGMAS", "STEP", "Sums", "found_in"]

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
        plain: squared error to be expected of plain rounding with these scales, none taken for wider than may be.
        spread: root of the sum of the squares of what each group has of that.

    """

    ratio_OG: NDArray[np.float32]
    number: int
    plain: float
    spread: float

    @classmethod
    def of(cls, sums: Sums, freedom: Freedom) -> _Groups:
        peak_OG, scale_OG = np.concatenate(sums.peaks), np.concatenate(sums.scales)
        used_OG = np.isfinite(peak_OG) & (peak_OG > 0)
        plain_OG = np.maximum(peak_OG / np.float32(sums.zero), np.float32(freedom.smallest))
        plain_OG[~used_OG] = 1
        ratio_OG = np.abs(scale_OG) / plain_OG
        ratio_OG[~used_OG] = 1
        span = -(-sums.columns // peak_OG.shape[1])  # of a short last group too, which only raises the limit
        step_OG = plain_OG * np.minimum(ratio_OG, np.float32(freedom.widest * _ROUNDED))
        square_OG = np.square(step_OG, dtype=np.float64) * used_OG * (span / 12)
        return cls(
            ratio_OG, int(np.count_nonzero(used_OG)), float(square_OG.sum()), math.sqrt(np.vdot(square_OG, square_OG))
        )


def found_in(sums: Sums, square: float, freedom: Freedom) -> tuple[str, str]:
    """Say what is systematically wrong with the codes and with the scales of a weight: empty where nothing is.

    Args:
        sums: over all its rows.
        square: its squared error, less what the range of codes cannot hold.
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
    """A weight that is farther from the source's than codes of its kind can be."""
    deviation = 12 * math.sqrt(freedom.offset**2 / 3 + 1 / 180)
    most = freedom.growth * groups.plain + SIGMAS * deviation * groups.spread
    if not groups.plain or square <= most:
        return ""
    times, most = (math.sqrt(each / groups.plain) for each in (square, most))
    return f"its error is {times:.2f} times that of plain rounding with its scales, expected at most {most:.2f} times"


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
