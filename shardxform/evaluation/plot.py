"""A picture of what a change of the weights hurts: which blocks, and which sources of text."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from shardxform.base.file_system import write_over
from shardxform.errors import OutputError
from shardxform.evaluation.evaluate import Comparison, Evaluation
from shardxform.evaluation.routing import Load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_tasks", "refuse_foreign_picture"]

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_MAKER: Final = "shardxform"
_MARK: Final = b"tEXtSoftware\0" + _MAKER.encode()
_BLUE: Final = "#31688e"
_ORANGE: Final = "#e6851e"
_MOST_DOUBLINGS: Final = 2.0
_SCALES: Final = (0.5, 1.0, _MOST_DOUBLINGS)
"""Ends of the scale of colours, in doublings; the first that holds all experts, or the last."""
_MOST_NAMED: Final = 10
"""Experts, and layers, up to which each is named."""
_MAX_NAME: Final = 30  # characters
_NO_SOURCES: Final[Mapping[str, Evaluation]] = MappingProxyType({})


def draw(against: Comparison, path: Path, *, title: str, sources: Mapping[str, Evaluation] = _NO_SOURCES) -> None:
    """Draw the relative error of every block's output as a PNG, and beside it the divergence on each of `sources`.

    A picture of an earlier evaluation is replaced.

    Raises:
        OutputError: another file is there, or it cannot be written.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = max(6.0, min(14.0, 2.5 + 0.28 * len(against.block_errors)))
    widths = [blocks, *([5.0] if sources else []), *([6.0] if against.loads else [])]
    figure = Figure(figsize=(sum(widths), max(4.2, 1.4 + 0.4 * len(sources))), layout="constrained")
    FigureCanvasAgg(figure)
    places: Any = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    _draw_blocks(places[0], against)
    divergence = f"{against.kl:.4g}{_give_or_take(against.kl_error, '{:.2g}')}"
    agreement = f"{against.top1:.1%}{_give_or_take(against.top1_error, '{:.1%}')}"
    places[0].set_title(f"{title}\nKL {divergence} nats, same choice {agreement}", fontsize=11)
    if sources:
        _draw_sources(places[1], sources)
    if against.loads:
        _draw_loads(figure, places[-1], against.loads)
    _save(figure, path)


def draw_tasks(results: Mapping[str, Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw a bar for the first metric of every task as a PNG, with its standard error, and the reference as a mark.

    Args:
        results: those of `tasks.accuracy`, by task.
        path: of the picture; one of an earlier evaluation is replaced.
        title: above it.

    Raises:
        OutputError: another file is there, or it cannot be written.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [(name, *next(iter(task["metrics"].items()))) for name, task in results.items() if task["metrics"]]
    figure = Figure(figsize=(8.0, max(2.4, 1.4 + 0.45 * len(found))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places, values = range(len(found)), [each["value"] for _, _, each in found]
    errors = [each["standard_error"] or 0.0 for _, _, each in found]
    axes.barh(places, values, xerr=errors, color=_BLUE, height=0.65, error_kw={"linewidth": 1})
    if any("reference" in each for _, _, each in found):
        marks = [each.get("reference", math.nan) for _, _, each in found]
        axes.plot(marks, places, "D", color=_ORANGE, markersize=6, linestyle="none", label="reference")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    names = [f"{_shortened(name)}\n{_shortened(metric)}" for name, metric, _ in found]
    axes.set_yticks(places, names, parse_math=False)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.grid(visible=True, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": _MAKER})
    refuse_foreign_picture(path)
    write_over(path, picture.getvalue())


def refuse_foreign_picture(path: Path) -> None:
    """Refuse a name that anything but a picture of an earlier evaluation has.

    Raises:
        OutputError: says what to do.

    """
    if not os.path.lexists(path):
        return
    head = b""
    try:
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                head = file.read(4096)
    except OSError as e:
        raise OutputError(f"{path}: {e.strerror}") from e
    if not head.startswith(_PNG) or _MARK not in head:
        raise OutputError(
            f"{path}: another file is there, and nothing is overwritten; name one that does not exist yet"
        )


def _draw_blocks(axes: Axes, against: Comparison) -> None:
    errors = [100 * error for error in against.block_errors]
    axes.bar(range(len(errors)), errors, color=_BLUE, width=0.8)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("error of its output, %")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(visible=True, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)


def _draw_sources(axes: Axes, sources: Mapping[str, Evaluation]) -> None:
    """One bar a source, the first on top, with its standard error."""
    found = [(name, each.ratio, each.against) for name, each in sources.items() if each.against]
    errors = [against.kl_error if math.isfinite(against.kl_error) else 0.0 for _, _, against in found]
    places, divergences = range(len(found)), [against.kl for _, _, against in found]
    axes.barh(
        places, divergences, xerr=errors, color=_BLUE, height=min(0.7, 0.2 * len(found)), error_kw={"linewidth": 1}
    )
    names = [_shortened(name) + _ratio(ratio, against.ratio_error) for name, ratio, against in found]
    axes.set_yticks(places, names, parse_math=False)  # they are a stranger's
    axes.invert_yaxis()
    axes.set_xlabel("KL divergence, nats")
    axes.set_title("each source of text,\nwith the ratio of perplexities", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.grid(visible=True, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)


def _draw_loads(figure: Figure, axes: Axes, loads: Mapping[int, Load]) -> None:
    """A row a layer, its experts by falling share of the reference's choices; coloured by what became of the share.

    Each has its id and the change written on it where there is room for that.
    """
    experts = max(len(load.keep) for load in loads.values())
    rows = [[math.nan] * experts for _ in loads]
    named = experts <= _MOST_NAMED and len(loads) <= _MOST_NAMED
    cells: list[tuple[tuple[int, int], int, float, float]] = []
    for number, load in enumerate(loads.values()):
        by_share = sorted(zip(load.shares, load.keep, strict=True), key=lambda each: -each[0][0])
        for place, ((old, new), expert) in enumerate(by_share):
            rows[number][place] = _doublings(old, new)
            cells.append(((place, number), expert, old, new))
    widest = max((abs(each) for row in rows for each in row if math.isfinite(each)), default=0.0)
    most = next(each for each in _SCALES if each >= min(widest, _MOST_DOUBLINGS))
    image = axes.imshow(rows, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    for cell in cells if named else ():
        _name_cell(axes, *cell, most)
    axes.set_xlabel(f"kept experts{' by id' if named else ''}, from the reference's busiest to its least busy")
    axes.set_ylabel("layer")
    numbers = list(loads)
    step = max(1, len(numbers) // 12)
    axes.set_yticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    axes.set_xticks([])  # places, which would be taken for ids
    lost = math.fsum(load.lost for load in loads.values()) / len(loads)
    moved = math.fsum(load.moved for load in loads.values()) / len(loads)
    axes.set_title(f"which experts are busier\n{lost:.0%} of choices lost, {moved:.0%} moved", fontsize=11)
    bar = figure.colorbar(image, ax=axes, extend="both" if widest > most else "neither")
    bar.set_ticks([-most, 0, most], labels=[f"x {2**-most:.2g}", "same", f"x {2**most:.2g}"])
    bar.set_label("share of the choices among kept experts")


def _name_cell(axes: Axes, place: tuple[int, int], expert: int, old: float, new: float, most: float) -> None:
    """Write an expert's id, and how its share of the choices changed; in white near the ends of the scale."""
    change = f"{new / old - 1:+.0%}" if old else "new" if new else "idle"
    dark = abs(_doublings(old, new)) > most * 0.6
    axes.text(*place, f"{expert}\n{change}", ha="center", va="center", fontsize=8, color="white" if dark else "black")


def _doublings(old: float, new: float) -> float:
    """How often a share doubled; at the end of the scale where one of the two is nothing."""
    if old and new:
        return math.log2(new / old)
    return 0.0 if old == new else math.copysign(_MOST_DOUBLINGS, new - old)


def _ratio(ratio: float, error: float) -> str:
    return f"\nx {ratio:.3f}{_give_or_take(error, '{:.3f}')}" if math.isfinite(ratio) else ""


def _give_or_take(error: float, text: str) -> str:
    return f" \N{PLUS-MINUS SIGN} {text.format(error)}" if math.isfinite(error) else ""


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
