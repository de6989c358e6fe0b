"""What a terminal shows: sizes, aligned lines, and progress as a bar or, when piped, as plain lines."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import click

from shardxform.progress import Progress, Unit
from shardxform.sharding import show_size

__all__ = ["amount", "count", "gb", "interruptible", "print_json", "progress", "rows", "short", "table", "tell"]

_PLAIN_SECONDS: Final = 5.0  # between two lines of progress that is not shown on a terminal, and more as time goes on
_PLAIN_SHARE: Final = 0.05
_PLAIN_MOST: Final = 60.0


gb = show_size


def tell(text: str) -> None:
    """Print a line on stderr; work goes on when nobody reads it any more."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            click.echo(text, err=True)


def count(number: int, what: str) -> str:
    """Number and noun: `1 shard`, `1,811 tensors`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def short(number: int) -> str:
    """Count of parameters as people say it: 35.95 B, 4.41 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


def rows(pairs: Iterable[tuple[str, str]], file: Any = None) -> None:  # noqa: ANN401
    """Print label and value, aligned, indented by two."""
    listed = list(pairs)
    width = max((len(label) for label, _ in listed), default=0)
    for label, value in listed:
        click.echo(f"  {label:<{width}}  {value}", file=file)


def table(header: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    listed = [header, *lines]
    widths = [max(len(line[i]) for line in listed) for i in range(len(header))]
    for number, line in enumerate(listed):
        cells = [f"{line[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))]
        text = "  " + "  ".join(cells).rstrip()
        click.echo(click.style(text, bold=True) if number == 0 else text)


def print_json(value: Mapping[str, Any]) -> None:
    """Print a result for machines."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C: stop cleanly, say how to go on."""

    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def progress(label: str, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show progress on stderr: a bar with rate and ETA on a terminal, plain lines otherwise, nothing when quiet."""
    if quiet or sys.stderr is None:
        yield None
    elif sys.stderr.isatty():
        with _bar(label) as update:
            yield update
    else:
        yield _plain(label)


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, amount="", rate="")

        def update(p: Progress) -> None:
            if bar.tasks[0].total is None and p.resumed:
                bar.console.print(f"going on: {_of(p.resumed, p)} were done already")
            bar.update(task, total=p.total, completed=p.done, amount=_of(p.done, p), rate=_rate(p, started))

        yield update


def _plain(label: str) -> Callable[[Progress], None]:
    started = time.monotonic()
    last = 0.0
    finished = False

    def update(p: Progress) -> None:
        nonlocal last, finished
        now = time.monotonic()
        complete = p.done == p.total
        wanted = min(_PLAIN_MOST, _PLAIN_SECONDS + _PLAIN_SHARE * (now - started))
        if finished or (not complete and now - last < wanted):
            return
        finished = complete
        last = now
        pace = (p.done - p.resumed) / max(now - started, 1e-3)
        eta = f", {(p.total - p.done) / pace:.0f} s left" if pace and not complete else ""
        tell(f"{label}: {_of(p.done, p)}, {_rate(p, started)}{eta}")

    return update


def _of(done: int, p: Progress) -> str:
    return f"{gb(done)} of {gb(p.total)}" if p.unit == "bytes" else f"{short(done)} of {amount(p.total, p.unit)}"


def _rate(p: Progress, started: float) -> str:
    return f"{amount(int((p.done - p.resumed) / max(time.monotonic() - started, 1e-3)), p.unit)}/s"


def amount(number: int, unit: Unit) -> str:
    """A number of bytes or tokens as people say it."""
    return gb(number) if unit == "bytes" else f"{short(number)} tokens"
