"""Scores of experts, from their statistics: one pure function for each criterion.

Every function takes an `ExpertStats` and gives a float64 score for each of its E experts, finite and not negative; the
higher, the more the expert is worth keeping. Scores of different layers are not comparable, and nothing here compares
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardxform.errors import PlanError
from shardxform.experts.statistics import ExpertStats

__all__ = ["CRITERIA", "DEFAULT", "scores"]

Scores = NDArray[np.float64]


def reap(stats: ExpertStats) -> Scores:
    """Mean of g * ||e||_2 over the tokens that reach the expert, 0 where none does.

    Router-weighted expert activation pruning: Lasby et al. 2025, "REAP the Experts", equation 9.
    """
    return _mean(stats.reap_E, stats.count_E)


def reap_sum(stats: ExpertStats) -> Scores:
    """Sum of g * ||e||_2: as `reap`, times how often the expert is reached. A variant in REAP's own code."""
    return stats.reap_E


def ean(stats: ExpertStats) -> Scores:
    """Mean of ||e||_2 over the tokens that reach the expert, 0 where none does. A variant in REAP's own code."""
    return _mean(stats.ean_E, stats.count_E)


def ean_sum(stats: ExpertStats) -> Scores:
    """Sum of ||e||_2: the expert activation norm of Jaiswal et al. 2025, "Finding Fantastic Experts in MoEs"."""
    return stats.ean_E


def frequency(stats: ExpertStats) -> Scores:
    """Tokens that reach the expert: the baseline of every study of expert pruning."""
    return stats.count_E.astype(np.float64)


def gate_sum(stats: ExpertStats) -> Scores:
    """Sum of g: soft frequency, the heavy-hitter count of Muzio et al. 2024, "SEER-MoE"."""
    return stats.gate_E


def peak(stats: ExpertStats) -> Scores:
    """Largest |activation| of the expert's output: what tells super experts in Su et al. 2025."""
    return stats.peak_E


CRITERIA: Final[Mapping[str, Callable[[ExpertStats], Scores]]] = MappingProxyType(
    {
        "reap": reap,
        "reap-sum": reap_sum,
        "ean": ean,
        "ean-sum": ean_sum,
        "frequency": frequency,
        "gate-sum": gate_sum,
        "peak": peak,
    }
)
"""Criterion -> its function."""

DEFAULT: Final = "reap"


def scores(stats: ExpertStats, criterion: str) -> Scores:
    """Score of each expert of a layer, float64 [E].

    Raises:
        PlanError: there is no such criterion.

    """
    if criterion not in CRITERIA:
        raise PlanError(f"criterion: expected one of {', '.join(CRITERIA)}, found {criterion[:40]!r}")
    return CRITERIA[criterion](stats)


def _mean(sum_E: Scores, count_E: NDArray[np.int64]) -> Scores:
    return np.divide(sum_E, count_E, out=np.zeros_like(sum_E), where=count_E > 0)
