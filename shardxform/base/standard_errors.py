"""Standard errors of means over the positions of token windows.

A figure is a sum over all windows divided by the number of positions. What it would be on other windows of the same
kind varies with the residuals of the windows, x_n - figure * c_n, where x_n is a window's sum and c_n its positions:
the usual linearisation of a ratio (Cochran, Sampling Techniques, 1977, chapter 6), and for windows of one length just
the error of a mean. Of two models on the same windows the sums are those of their differences, window by window, since
most of what varies is common to both (Miller, Adding Error Bars to Evals, arXiv:2411.00640).

Windows that are cut from documents joined into one stream are not independent: a document goes on in the next window,
and its neighbours are of its kind. Their residuals' covariances count too, with the weights of Bartlett's window up to
a lag of 4 (n / 100)^(2/9) windows (Newey and West, Econometrica 55, 1987, and Review of Economic Studies 61, 1994),
which is what means of overlapping batches give. Few windows tell little of covariances: the error is never less than
that of independent windows. Where sources of text are kept apart, each is a stratum: how far the sources are from one
another is no error. Means over windows alone; takes no sample, so the same figures have the same errors.
"""

# n: windows of a stratum, x: sums of windows, c: positions of windows.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

__all__ = ["Sampling", "mean", "standard_error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How windows were chosen.

    Attributes:
        strata: numbers of windows of each of the strata, in which they cover all windows.
        joined: whether neighbours in a stratum were cut from one stream of documents.

    """

    strata: tuple[range, ...]
    joined: bool


def mean(sums: Sequence[float], counts: Sequence[float]) -> float:
    """Return the mean over all positions."""
    return math.fsum(sums) / math.fsum(counts)


def standard_error(sums: Sequence[float], counts: Sequence[float], sampling: Sampling) -> float:
    """Return the standard error of `mean`; NaN where a stratum has fewer than two windows."""
    centre = mean(sums, counts)
    residuals = [x - centre * c for x, c in zip(sums, counts, strict=True)]
    variances = [
        _variance([residuals[n] for n in stratum], _lag(len(stratum)) if sampling.joined else 0)
        for stratum in sampling.strata
    ]
    return math.sqrt(math.fsum(variances)) / math.fsum(counts)


def _lag(windows: int) -> int:
    return min(windows - 1, int(4 * math.pow(windows / 100, 2 / 9)))


def _variance(residuals: Sequence[float], lag: int) -> float:
    """Variance of the sum of residuals of one stratum."""
    n = len(residuals)
    if n < 2:
        return math.nan
    centre = math.fsum(residuals) / n
    found = [r - centre for r in residuals]
    alone = math.fsum(r * r for r in found)
    together = [2 * (1 - k / (lag + 1)) * math.fsum(map(mul, found, found[k:])) for k in range(1, lag + 1)]
    return n / (n - 1) * max(alone, math.fsum([alone, *together]))
