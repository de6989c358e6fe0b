"""A choice of experts as a picture: how saliency falls off in every layer, where the cut is, what is kept.

Gives the bytes of a PNG; the same choice gives the same bytes with the same matplotlib. Nothing is shown on a screen,
no global state of matplotlib is left changed, and the user's matplotlibrc has no say. matplotlib is imported on call.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.errors import PlanError
from shardxform.experts.choosing import Choice, LayerChoice, scores
from shardxform.experts.statistics import ExpertStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_choice"]

_DPI: Final = 150
_FLOOR: Final = 1  # % of the layer's largest score: the lower end of the colour scale
_MAX_LABELS: Final = 24  # layers that are named on the axis; of more, every other or every fifth is
_CUT: Final = "#e4002b"
_SALIENCY: Final = "#1f4e79"
_ROUTING: Final = "#e08214"
_UNREACHED: Final = "#d9d9d9"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One layer of the picture."""

    label: str
    stats: ExpertStats
    choice: LayerChoice


def plot_choice(choice: Choice) -> bytes:
    """PNG: a heat map of layers by experts in order of their score with the cut, and what every layer keeps.

    Raises:
        PlanError: matplotlib is not installed.

    """
    try:
        import matplotlib as mpl
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise PlanError("`plot` needs matplotlib: pip install 'shardxform[plot]'") from e
    rows = _rows(choice)
    with mpl.rc_context(), style.context("default"):
        figure = Figure(figsize=(11.0, _height(len(rows))), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, choice, rows)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _rows(choice: Choice) -> list[_Row]:
    saliency = choice.saliency
    rows = [_Row(label=str(n), stats=saliency.layers[n], choice=c) for n, c in choice.layers.items()]
    rows += [_Row(label=f"MTP {n}", stats=saliency.mtp_layers[n], choice=c) for n, c in choice.mtp_layers.items()]
    return rows


def _height(rows: int) -> float:
    """Inches: enough for a few layers, and no taller than a page for many."""
    return float(min(max(2.6 + 0.14 * rows, 3.8), 12.0))


def _draw(figure: Figure, choice: Choice, rows: list[_Row]) -> None:
    heat, kept = figure.subplots(1, 2, sharey=True, width_ratios=(3.4, 1))
    figure.suptitle(
        f"{choice.num_kept} of {choice.saliency.num_experts} experts kept in each layer, by {choice.criterion}"
        f"  ({ascii(choice.saliency.model['model_type'])[1:-1][:60]})",
        fontsize=12,
        parse_math=False,
    )
    _draw_heat(figure, heat, choice, rows)
    _draw_kept(kept, choice, rows)
    named = _named(rows)
    heat.set_yticks(named, [rows[at].label for at in named])
    heat.set_ylim(len(rows) - 0.5, -0.5)
    heat.set_ylabel("layer")


def _named(rows: list[_Row]) -> list[int]:
    """Rows to name on the axis: every n-th decoder block and all MTP layers, none over another."""
    extra = [at for at, row in enumerate(rows) if not row.label.isdigit()]
    blocks = len(rows) - len(extra)
    step = next((s for s in (1, 2, 5, 10, 20, 50) if blocks / s <= _MAX_LABELS), blocks)
    room = blocks - step // 2 if extra else blocks
    return [*range(0, room, step), *extra]


def _draw_heat(figure: Figure, axes: Axes, choice: Choice, rows: list[_Row]) -> None:
    import matplotlib as mpl
    from matplotlib.colors import LogNorm

    experts, cut = choice.saliency.num_experts, choice.num_kept
    percent_LE = np.ma.masked_less([_ranked(row, choice.criterion) for row in rows], 0)
    image = axes.imshow(
        np.ma.maximum(percent_LE, _FLOOR / 2),
        norm=LogNorm(_FLOOR, 100),
        cmap=mpl.colormaps["viridis"].with_extremes(bad=_UNREACHED),
        aspect="auto",
        interpolation="nearest",
        extent=(0, experts, len(rows) - 0.5, -0.5),
    )
    axes.axvline(cut, color=_CUT, linewidth=1.8)
    axes.set_xlabel("experts: the kept ones, then the pruned ones, each by falling score")
    above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "bottom", "fontsize": 9}
    if cut < experts:
        axes.text(cut, 1.01, "kept | pruned", color=_CUT, ha="center", **above)
    if percent_LE.mask.any():
        x, side = (0, "left") if cut > experts / 2 else (experts, "right")
        axes.text(x, 1.01, "grey: reached by no token", color="0.45", ha=side, **above)
    bar = figure.colorbar(image, ax=axes, location="bottom", extend="min", aspect=50, shrink=0.7, pad=0.02)
    bar.set_ticks([_FLOOR, 10, 100], labels=[f"{_FLOOR}", "10", "100"])
    bar.set_label("score, in % of the layer's largest")


def _ranked(row: _Row, criterion: str) -> NDArray[np.float64]:
    """Scores in % of the layer's largest, kept experts first, each part descending; -1 where never reached."""
    score_E = scores(row.stats, criterion)
    kept_E = np.isin(np.arange(score_E.size), row.choice.keep)
    largest = float(score_E.max()) or 1.0
    percent_E = np.where(row.stats.unreached, -1.0, 100 * (score_E / largest))
    return percent_E[np.lexsort((-percent_E, ~kept_E))]


def _draw_kept(axes: Axes, choice: Choice, rows: list[_Row]) -> None:
    saliency = [row.choice.saliency_kept for row in rows]
    routing = [row.choice.routing_kept for row in rows]
    lines = [("routing", _ROUTING, routing), ("saliency", _SALIENCY, saliency)]
    for label, colour, shares in lines[:1] if saliency == routing else lines:
        percent = [np.nan if share is None else 100 * share for share in shares]
        axes.plot(percent, range(len(rows)), color=colour, marker="o", markersize=3.5, linewidth=1.2, label=label)
    even = 100 * choice.num_kept / choice.saliency.num_experts
    axes.axvline(even, color="0.5", linestyle="--", linewidth=1, label="experts")
    axes.set_xlim(0, 102)
    axes.set_xlabel("kept in the layer, %")
    axes.grid(axis="x", color="0.9")
    axes.legend(
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
        columnspacing=1,
        handlelength=1.4,
    )
