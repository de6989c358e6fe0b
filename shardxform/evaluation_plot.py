"""A picture of which blocks a change of the weights hurts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from shardxform.errors import OutputError
from shardxform.evaluation import Comparison

__all__ = ["draw"]

_BLUE: Final = "#31688e"


def draw(against: Comparison, path: Path, *, title: str) -> None:
    """Draw the relative error of every block's output as a PNG.

    Raises:
        OutputError: the file cannot be written.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    errors = [100 * error for error in against.block_errors]
    figure = Figure(figsize=(max(6.0, min(14.0, 2.5 + 0.28 * len(errors))), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    axes.bar(range(len(errors)), errors, color=_BLUE, width=0.8)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("error of its output, %")
    axes.set_title(f"{title}\nKL {against.kl:.4g} nats, same choice {against.top1:.1%}", fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(visible=True, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    try:
        figure.savefig(path, dpi=120, metadata={"Software": None})
    except (OSError, ValueError) as e:
        raise OutputError(f"{path}: {getattr(e, 'strerror', None) or e}") from e
