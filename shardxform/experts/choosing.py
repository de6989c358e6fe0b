"""Which experts stay: from statistics to scores, and from scores to a keep manifest. Pure and deterministic.

A criterion is one function that takes an `ExpertStats` and gives a float64 score for each of its E experts, finite and
not negative; the higher, the more the expert is worth keeping. Scores of different layers are not comparable.

Every layer keeps equally many, because config.json has one number for them; with router groups every group does. The
highest scores stay, ties go to the lower id, and super experts stay whatever their score when they are protected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform import __version__
from shardxform.ask.manifest import Manifest
from shardxform.ask.width import Width
from shardxform.errors import PlanError
from shardxform.experts.statistics import CHANNELS, ExpertStats, Saliency

__all__ = [
    "CRITERIA",
    "DEFAULT",
    "WEIGHTS",
    "Choice",
    "LayerChoice",
    "channels_kept",
    "choose",
    "criteria_of",
    "decide",
    "keep_of_ratio",
    "scores",
    "super_experts",
    "with_width",
]

Scores = NDArray[np.float64]


def reap(stats: ExpertStats) -> Scores:
    """Mean of g * ||e||_2 over the tokens that reach the expert, 0 where none does.

    Router-weighted expert activation pruning: Lasby et al. 2025, "REAP the Experts", equation 9.
    """
    return _mean(stats.of("reap"), stats.of("count"))


def reap_sum(stats: ExpertStats) -> Scores:
    """Sum of g * ||e||_2: as `reap`, times how often the expert is reached. A variant in REAP's own code."""
    return stats.of("reap")


def ean(stats: ExpertStats) -> Scores:
    """Mean of ||e||_2 over the tokens that reach the expert, 0 where none does. A variant in REAP's own code."""
    return _mean(stats.of("ean"), stats.of("count"))


def ean_sum(stats: ExpertStats) -> Scores:
    """Sum of ||e||_2: the expert activation norm of Jaiswal et al. 2025, "Finding Fantastic Experts in MoEs"."""
    return stats.of("ean")


def frequency(stats: ExpertStats) -> Scores:
    """Tokens that reach the expert: the baseline of every study of expert pruning."""
    return stats.of("count").astype(np.float64)


def gate_sum(stats: ExpertStats) -> Scores:
    """Sum of g: soft frequency, the heavy-hitter count of Muzio et al. 2024, "SEER-MoE"."""
    return stats.of("gate")


def peak(stats: ExpertStats) -> Scores:
    """Largest |activation| of the expert's output: what tells super experts in Su et al. 2025."""
    return stats.of("peak")


def energy(stats: ExpertStats) -> Scores:
    """Sum of ||a||_2^2, a being what enters the down projection: what llama.cpp's imatrix files tell of an expert."""
    return stats.of("energy")


def output_energy(stats: ExpertStats) -> Scores:
    """Sum of ||e||_2^2 as `energy` and the down projection's weights let it be estimated, channel by channel."""
    return stats.of("output")


def msan(stats: ExpertStats) -> Scores:
    """Mean of ||e||_2^2 over the tokens that reach the expert, 0 where none does: arXiv 2606.15716."""
    return _mean(stats.of("square"), stats.of("count"))


def aimer(stats: ExpertStats) -> Scores:
    """Root mean square over mean absolute value of the expert's weights; no text is needed.

    The inverse of the score of Liu et al. 2026, "AIMER: Calibration-Free Task-Agnostic MoE Pruning" (arXiv
    2603.18492), by which the highest go first.
    """
    return stats.of("spread")


CRITERIA: Final[Mapping[str, Callable[[ExpertStats], Scores]]] = MappingProxyType(
    {
        "reap": reap,
        "reap-sum": reap_sum,
        "ean": ean,
        "ean-sum": ean_sum,
        "frequency": frequency,
        "gate-sum": gate_sum,
        "peak": peak,
        "energy": energy,
        "output-energy": output_energy,
        "msan": msan,
        "aimer": aimer,
    }
)
"""Criterion -> its function."""

DEFAULT: Final = "reap-sum"

WEIGHTS: Final = frozenset({"aimer"})
"""Criteria of weights alone, which no text is needed for; see `weighing.weigh`."""

_NEEDS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "reap": ("reap", "count"),
        "reap-sum": ("reap",),
        "ean": ("ean", "count"),
        "ean-sum": ("ean",),
        "frequency": ("count",),
        "gate-sum": ("gate",),
        "peak": ("peak",),
        "energy": ("energy",),
        "output-energy": ("output",),
        "msan": ("square", "count"),
        "aimer": ("spread",),
    }
)


def criteria_of(saliency: Saliency) -> tuple[str, ...]:
    """Names of the criteria that can be made of what a saliency holds."""
    return tuple(name for name in CRITERIA if set(_NEEDS[name]) <= set(saliency.known))


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


# -- choices -----------------------------------------------------------------------------------------------------------


_LEAST_GROUP: Final = 32  # columns that share a scale, in the smallest groups that are written
_SUPER_PERCENTILE: Final = 99.5
_SUPER_SHARE: Final = 0.1  # of the largest peak of all
_SUPER_DEPTH: Final = 0.75  # share of the layers, from the first, in which super experts are looked for
_DIGITS: Final = 4  # of shares in a manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """What one layer keeps, and what that costs.

    Attributes:
        keep: ids kept, ascending.
        protected: ids kept as super experts, whatever their score.
        saliency_kept: share of the layer's summed scores that the kept experts have; None when all scores are 0.
        routing_kept: share of the tokens' choices that fell on kept experts; None when there were none.
        unreached_kept: experts kept although no token reached them; 0 where tokens are not counted.
        unreached_pruned: experts pruned that no token reached; likewise.
        last_kept: the lowest score kept, protected experts aside; None when there is none.
        first_pruned: the highest score pruned; None when nothing is.

    """

    keep: tuple[int, ...]
    protected: tuple[int, ...]
    saliency_kept: float | None
    routing_kept: float | None
    unreached_kept: int
    unreached_pruned: int
    last_kept: float | None
    first_pruned: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What every layer keeps, and what it was chosen by."""

    saliency: Saliency
    criterion: str
    protect: bool
    layers: Mapping[int, LayerChoice]
    mtp_layers: Mapping[int, LayerChoice]
    width: Width | None = None

    @property
    def num_kept(self) -> int:
        """Experts kept per layer."""
        return len(next(iter(self.layers.values())).keep)

    def manifest(self, ratio: float | None = None) -> Manifest:
        """The choice as a keep manifest; `ratio` is the share that was asked to be removed, if one was."""
        saliency = self.saliency
        return Manifest(
            keep={layer: choice.keep for layer, choice in self.layers.items()},
            mtp_keep={layer: choice.keep for layer, choice in self.mtp_layers.items()},
            model=dict(saliency.model),
            criterion=self.criterion,
            width=self.width,
            ratio=1 - self.num_kept / saliency.num_experts if ratio is None else ratio,
            provenance=_provenance(self),
        )


def with_width(choice: Choice, channels: int) -> Choice:
    """Choose the channels that every expert of a choice keeps: those that gave most, ties to the lower id.

    A channel gives (g a)^2 times the squared norm of its column of the down projection, summed over the tokens: the
    energy that goes with it if the others stay as they are.

    Raises:
        PlanError: the saliency says nothing of channels, or there are not more of them.

    """
    saliency = choice.saliency
    if CHANNELS not in saliency.known:
        raise PlanError(f"`width`: {saliency.where} says nothing of channels; score with `channels`")
    sizes = {stats.of(CHANNELS).shape[1] for stats in (*saliency.layers.values(), *saliency.mtp_layers.values())}
    if len(sizes) != 1:
        raise PlanError(f"`width`: {saliency.where} has experts of {' and '.join(map(str, sorted(sizes)))} channels")
    (of,) = sizes
    if not 0 < channels < of or channels % _LEAST_GROUP:
        raise PlanError(
            f"`width`: expected fewer than the {of} channels of an expert, and a multiple of {_LEAST_GROUP} for the"
            f" groups of quantized weights, found {channels}"
        )
    kept, mtp_kept = (
        {
            layer: tuple(_best(layers[layer].of(CHANNELS)[expert], channels) for expert in chosen.keep)
            for layer, chosen in choices.items()
        }
        for layers, choices in ((saliency.layers, choice.layers), (saliency.mtp_layers, choice.mtp_layers))
    )
    return replace(choice, width=Width(channels=channels, of=of, kept=kept, mtp_kept=mtp_kept))


def _best(given_I: NDArray[np.float32], channels: int) -> bytes:
    order = np.lexsort((np.arange(given_I.size), -given_I))
    return np.packbits(np.isin(np.arange(given_I.size), order[:channels]), bitorder="little").tobytes()


def channels_kept(choice: Choice) -> dict[int, float | None]:
    """Layer -> share of what the channels of its kept experts gave that stays; None where they gave nothing."""
    assert choice.width is not None
    out: dict[int, float | None] = {}
    for layer, bitmaps in choice.width.kept.items():
        given_EI = choice.saliency.layers[layer].of(CHANNELS)[list(choice.layers[layer].keep)].astype(np.float64)
        bytes_EB = np.frombuffer(b"".join(bitmaps), np.uint8).reshape(len(bitmaps), -1)
        bits_EI = np.unpackbits(bytes_EB, axis=1, count=given_EI.shape[1], bitorder="little")
        out[layer] = float((given_EI * bits_EI).sum() / given_EI.sum()) if given_EI.any() else None
    return out


def choose(saliency: Saliency, keep: int, criterion: str = DEFAULT, protect: bool = False) -> Manifest:
    """The keep manifest of `decide`.

    Raises:
        PlanError: as `decide`.

    """
    return decide(saliency, keep, criterion, protect).manifest()


def decide(saliency: Saliency, keep: int, criterion: str = DEFAULT, protect: bool = False) -> Choice:
    """Choose the `keep` experts of every layer that score highest, ties to the lower id.

    Args:
        saliency: statistics of every layer.
        keep: experts to keep per layer.
        criterion: a name of `CRITERIA`.
        protect: keep all `super_experts`, whatever their score.

    Raises:
        PlanError: no such criterion, a count that the router cannot work with, or more super experts than are kept.

    """
    _check_known(saliency, criterion, protect)
    _check_count(saliency, keep)
    protected = super_experts(saliency) if protect else {}

    def choice_of(layer: int, stats: ExpertStats, ids: tuple[int, ...]) -> LayerChoice:
        score_E = scores(stats, criterion)
        forced_E = np.isin(np.arange(score_E.size), ids)
        groups = saliency.model["num_groups"]
        _check_room(forced_E, keep, groups, layer)
        return _measured(stats, score_E, forced_E, _kept(score_E, forced_E, keep, groups))

    return Choice(
        saliency=saliency,
        criterion=criterion,
        protect=protect,
        layers={layer: choice_of(layer, stats, protected.get(layer, ())) for layer, stats in saliency.layers.items()},
        mtp_layers={layer: choice_of(layer, stats, ()) for layer, stats in saliency.mtp_layers.items()},
    )


def keep_of_ratio(num_experts: int, ratio: float) -> int:
    """Experts that stay when the share `ratio` of them is removed: E - floor(E * ratio), binary fractions forgiven.

    Raises:
        PlanError: a share outside 0 <= ratio < 1.

    """
    if not 0 <= ratio < 1:  # NaN fails it too
        raise PlanError(f"`ratio`: expected the share of experts to remove, from 0 to below 1, found {ratio}")
    return num_experts - math.floor(num_experts * ratio + 1e-9)


def super_experts(saliency: Saliency) -> dict[int, tuple[int, ...]]:
    """Decoder block -> ids of its super experts, blocks without any left out.

    The rule of Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts Large Language Models": the expert's
    peak is above the 99.5th percentile (interpolated) of all peaks, and above a tenth of the largest, in a layer that
    takes part in forming massive activations. For the last condition stand the first three quarters of the layers, as
    in REAP's code: the last layers have large peaks without super experts. MTP layers have none.
    """
    peak_LE = np.stack([stats.of("peak") for stats in saliency.layers.values()])
    threshold = max(float(np.percentile(peak_LE, _SUPER_PERCENTILE)), float(peak_LE.max()) * _SUPER_SHARE)
    early = list(saliency.layers)[: int(len(saliency.layers) * _SUPER_DEPTH)]
    found = {layer: _ids(peak_LE[row] > threshold) for row, layer in enumerate(early)}
    return {layer: ids for layer, ids in found.items() if ids}


def _check_known(saliency: Saliency, criterion: str, protect: bool) -> None:
    known = criteria_of(saliency)
    if criterion in CRITERIA and criterion not in known:
        has = f"only {', '.join(known)}" if known else "none that is known"
        way = "; it is of weights alone: give the checkpoint itself" if criterion in WEIGHTS else ""
        raise PlanError(f"`criterion` {criterion}: {saliency.where} has not what it is made of, {has}{way}")
    if protect and "peak" not in saliency.known:
        raise PlanError(f"`protect`: {saliency.where} has no peaks, by which super experts are told")


def _check_count(saliency: Saliency, keep: int) -> None:
    experts, top_k = saliency.num_experts, saliency.model["num_experts_per_tok"]
    groups = saliency.model["num_groups"]
    if keep > experts:
        raise PlanError(f"`keep`: {keep} experts per layer, but {saliency.where} has {experts}")
    if keep < max(top_k, 1):
        raise PlanError(
            f"`keep`: {keep} experts per layer would stay, but the router picks {top_k} per token; keep at"
            f" least {top_k}"
        )
    if keep % groups:
        below, above = keep - keep % groups, keep - keep % groups + groups
        raise PlanError(
            f"`keep`: {keep} experts per layer, but the router has {groups} groups that must keep equally"
            f" many; {below} or {above} would do"
        )
    if groups > 1 and keep // groups < 2:
        raise PlanError(
            f"`keep`: {keep // groups} expert in each of the {groups} router groups, but the router scores a"
            f" group by its two best; keep at least {2 * groups}"
        )


def _check_room(forced_E: NDArray[np.bool_], keep: int, groups: int, layer: int) -> None:
    for group, count in enumerate(forced_E.reshape(groups, -1).sum(axis=1)):
        if count > keep // groups:
            place = f"layer {layer}" if groups == 1 else f"router group {group} of layer {layer}"
            raise PlanError(f"{place}: {count} super experts to protect, but only {keep // groups} experts are kept")


def _kept(score_E: NDArray[np.float64], forced_E: NDArray[np.bool_], keep: int, groups: int) -> NDArray[np.bool_]:
    """Which experts stay: in each group the forced ones, then the highest scores, then the lower ids."""
    size = score_E.size // groups
    kept_E = np.zeros(score_E.size, bool)
    for first in range(0, score_E.size, size):
        ids = np.arange(first, first + size)
        order = np.lexsort((ids, -score_E[ids], ~forced_E[ids]))  # the last key counts most
        kept_E[ids[order[: keep // groups]]] = True
    return kept_E


def _measured(
    stats: ExpertStats, score_E: NDArray[np.float64], forced_E: NDArray[np.bool_], kept_E: NDArray[np.bool_]
) -> LayerChoice:
    free_E = kept_E & ~forced_E
    unreached_E = stats.unreached
    return LayerChoice(
        keep=_ids(kept_E),
        protected=_ids(forced_E),
        saliency_kept=_share(score_E, kept_E),
        routing_kept=None if stats.count_E is None else _share(stats.count_E, kept_E),
        unreached_kept=int((unreached_E & kept_E).sum()),
        unreached_pruned=int((unreached_E & ~kept_E).sum()),
        last_kept=float(score_E[free_E].min()) if free_E.any() else None,
        first_pruned=None if kept_E.all() else float(score_E[~kept_E].max()),
    )


def _share(values_E: NDArray[np.float64] | NDArray[np.int64], kept_E: NDArray[np.bool_]) -> float | None:
    total = float(values_E.sum())
    return float(values_E[kept_E].sum()) / total if total else None


def _ids(mask_E: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(expert) for expert in np.flatnonzero(mask_E))


def _provenance(choice: Choice) -> dict[str, Any]:
    out: dict[str, Any] = {
        "tool": f"shardxform {__version__}",
        "tokens": choice.saliency.tokens,
        "protect_super_experts": choice.protect,
    }
    if choice.protect:
        out["super_experts"] = {str(n): list(c.protected) for n, c in choice.layers.items() if c.protected}
    out["layers"] = _facts(choice.layers)
    if choice.mtp_layers:
        out["mtp_layers"] = _facts(choice.mtp_layers)
    out["runs"] = [dict(run) for run in choice.saliency.runs]
    return out


def _facts(layers: Mapping[int, LayerChoice]) -> dict[str, Any]:
    """One list for each fact, in the order of the layers."""
    listed = list(layers.values())
    return {
        "saliency_kept": [_rounded(choice.saliency_kept) for choice in listed],
        "routing_kept": [_rounded(choice.routing_kept) for choice in listed],
        "never_reached_kept": [choice.unreached_kept for choice in listed],
        "never_reached_pruned": [choice.unreached_pruned for choice in listed],
    }


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, _DIGITS)
