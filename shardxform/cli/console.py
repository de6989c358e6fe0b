"""What a terminal shows: sizes, aligned lines, and progress as a bar or, when piped, as plain lines."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Final

import click

from shardxform.base.progress import Progress, Unit
from shardxform.base.tensors import show_size

__all__ = [
    "LOWER",
    "Label",
    "amount",
    "count",
    "escaped",
    "gb",
    "give_or_take",
    "option_of",
    "pasteable",
    "print_json",
    "progress",
    "rows",
    "say",
    "short",
    "span",
    "table",
    "tell",
    "with_options",
]

# -- option names ------------------------------------------------------------------------------------------------------
# Which option of the command line gives a field of the library.
#
# The library knows fields alone: in its messages a field stands in backquotes, by the path that records have for it
# or by the last part of that, and is replaced by its option before a person reads it. A field that no option gives,
# such as the headers of a source, keeps its name.

_OPTIONS: Final[Mapping[str, str]] = {
    "options.text_only": "--text-only",
    "options.mtp": "--mtp",
    "options.max_shard_bytes": "--max-shard-size",
    "manifest": "--manifest",
    "scheme.method": "--method",
    "scheme.grid.bits": "--scheme",
    "scheme.grid.group_size": "--group-size",
    "scheme.grid.scale_grid": "--scale-grid",
    "scheme.grid.search": "--search",
    "scheme.format": "--format",
    "scheme.expert_names": "--expert-names",
    "scheme.g_idx": "--g-idx",
    "scheme.keep_16bit": "--keep-16bit",
    "scheme.quantize": "--also-quantize",
    "scheme.requantize": "--requantize",
    "target.format": "--to",
    "target.expert_names": "--expert-names",
    "target.g_idx": "--g-idx",
    "options.gguf.pre_tokenizer": "--pre-tokenizer",
    "options.gguf.kind": "--gguf-type",
    "recipe": "--method, --heal or --merge",
    "heal": "--heal",
    "heal.what": "--heal",
    "heal.iters": "--heal-iters",
    "heal.schedule": "--heal-iters",
    "heal.seconds": "--heal-time",
    "heal.encoding": "--heal-encoding",
    "heal.extra": "--heal-extra",
    "heal.lr": "--heal-lr",
    "heal.merge": "--merge",
    "merge": "--merge",
    "heal.batch_size": "--batch-size",
    "iters": "--iters",
    "lr": "--lr",
    "minmax_lr": "--minmax-lr",
    "batch_size": "--batch-size",
    "inputs": "--inputs",
    "seed": "--seed",
    "samples": "--samples",
    "seqlen": "--seqlen",
    "device": "--device",
    "dtype": "--dtype",
    "windows": "windows of --data",
    "data": "--data",
    "data.data": "--data",
    "data.samples_asked": "--samples",
    "data.seqlen": "--seqlen",
    "data.seed": "--seed",
    "data.pack": "packed (--no-pack)",
    "data.chat_template": "--chat-template",
    "data.text_key": "--text-key",
    "data.sources": "--text-sources",
    "data.by_source": "--by-text-source",
    "family": "--family",
    "keep": "--keep or --ratio",
    "ratio": "--ratio",
    "criterion": "--criterion",
    "protect": "--protect-super-experts",
}
_OF_STAGES: Final[Mapping[str, Mapping[str, str]]] = {  # of `compress`, where a stage has options of its own
    "score": {},
    "select": {},
    "quantize": {"--samples": "--tune-samples or --samples", "--seqlen": "--tune-seqlen or --seqlen"},
    "verify": {},
    "evaluate": {
        "--data": "--eval-data",
        "--samples": "--eval-samples",
        "--seqlen": "--eval-seqlen",
        "windows of --data": "windows of --eval-data",
    },
    "card": {},
}
_SHORT: Final[Mapping[str, str]] = {  # by which messages name fields, and such as no record has
    **{path.rpartition(".")[2]: option for path, option in reversed(list(_OPTIONS.items()))},
    **_OPTIONS,
    "any_source": "--any-source",
    "base_model": "--base-model",
    "blocks": "--blocks",
    "branch": "--revision",
    "cache_bytes": "--cache-limit",
    "channels": "--channels",
    "create": "--create",
    "force": "--force",
    "full_verify": "--full-verify",
    "independent": "--independent",
    "plot": "--plot",
    "private": "--private",
    "ray": "--ray",
    "replace": "--replace",
    "results": "--results",
    "scheme": "--scheme",
    "sort": "`shardxform manifest convert --sort`",
    "source": "--source",
    "step": "`shardxform manifest convert --step`",
    "tasks": "--tasks",
    "width": "--width",
    "work": "--work",
}


def option_of(path: str) -> str:
    """The option that gives the field at `path`, and what lies below it; `path` itself where none does.

    A path may begin with the stage of `compress` that the field belongs to.
    """
    stage, _, rest = path.partition(".")
    own = _OF_STAGES.get(stage) if rest else None
    path = path if own is None else rest
    key, below = path.removeprefix("recipe."), ""
    if "." not in key:
        option = _SHORT.get(key, "")
        return (own or {}).get(option, option) or path
    while key and key not in _OPTIONS:
        key, _, last = key.rpartition(".")
        below = f"{last}.{below}" if below else last
    if not key:
        return path
    option = (own or {}).get(_OPTIONS[key], _OPTIONS[key])
    return f"{option}: {below}" if below else option


def with_options(message: str, stage: str = "") -> str:
    """The message with options in place of fields; a `stage` of `compress` may have options of its own for them."""
    start = f"{stage}." if stage else ""
    return re.sub(r"`([^`\s]+)`", lambda found: option_of(start + found[1]), message)


# -- console -----------------------------------------------------------------------------------------------------------

_PLAIN_SECONDS: Final = 5.0  # between two lines of progress that is not shown on a terminal, and more as time goes on
_PLAIN_SHARE: Final = 0.05
_PLAIN_MOST: Final = 60.0
_MOST_SAID: Final = 2000  # letters of an error or a note, which may quote a file
_UNSEEN: Final = re.compile(r"[^ -~\n]")
_SEEN_SECONDS: Final = 0.2
_PACE_SECONDS: Final = 30.0
_PACE_SHARE: Final = 0.2
_PACE_STRAYS: Final = 3.0


gb = show_size
LOWER: Final = "lower by chance, or because it suits this text: compare by KL divergence"
"""What a perplexity below that of the 16-bit model means."""


def give_or_take(error: float | None, text: str = "{:.4f}") -> str:
    """` +- 0.0012` behind a figure, or nothing where its standard error is not known."""
    return f" +- {text.format(error)}" if error is not None and math.isfinite(error) else ""


def pasteable(*words: object) -> str:
    """A command line of these words, quoted where a shell needs it."""
    return shlex.join(map(str, words))


def escaped(text: str, most: int = 0) -> str:
    """The text as a terminal may show it, whoever wrote it: what is no letter is escaped, but for ends of lines.

    Where it is longer than `most`, its middle is left out: what is wrong stands at one end of a message, and what to
    do at the other.
    """
    if most and len(text) > most:
        before, after = most * 2 // 3, most // 3
        text = f"{text[:before]} ... ({len(text) - before - after:,} characters) ... {text[-after:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def say(text: str = "", *, file: IO[str] | None = None, err: bool = False, bold: bool = False, color: str = "") -> None:
    """Print what may hold a stranger's words, as `escaped` gives it."""
    shown = escaped(text)
    click.echo(click.style(shown, bold=bold, fg=color or None) if bold or color else shown, file=file, err=err)


def tell(text: str) -> None:
    """Print a line on stderr, above a bar that is shown; work goes on when nobody reads it any more."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(escaped(text, _MOST_SAID), file=sys.stderr, flush=True)  # click.echo would write into the bar


def count(number: int, what: str) -> str:
    """Number and noun: `1 shard`, `1,811 tensors`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def short(number: int) -> str:
    """Count of parameters as people say it: 35.95 B, 4.41 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


def rows(pairs: Iterable[tuple[str, str]], file: IO[str] | None = None) -> None:
    """Print label and value, aligned, indented by two."""
    listed = list(pairs)
    width = max((len(label) for label, _ in listed), default=0)
    for label, value in listed:
        say(f"  {label:<{width}}  {value}", file=file)


def table(header: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    listed = [tuple(map(escaped, line)) for line in (header, *lines)]
    widths = [max(len(line[i]) for line in listed) for i in range(len(header))]
    for number, line in enumerate(listed):
        cells = [f"{line[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))]
        text = "  " + "  ".join(cells).rstrip()
        say(text, bold=number == 0)


def print_json(value: Mapping[str, object]) -> None:
    """Print a result for machines."""
    click.echo(_UNSEEN.sub(_escape, json.dumps(value, indent=2, ensure_ascii=False)))


def _escape(found: re.Match[str]) -> str:
    """A letter that no terminal shows, as JSON spells it."""
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


@dataclass(slots=True)
class Label:
    """What progress is called; may change while it is shown."""

    text: str


@contextlib.contextmanager
def progress(label: str | Label, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show progress on stderr: a bar with rate and ETA on a terminal, plain lines otherwise, nothing when quiet."""
    label = Label(label) if isinstance(label, str) else label
    if quiet or sys.stderr is None:
        yield None
    elif sys.stderr.isatty():
        with _bar(label) as update:
            yield update
    else:
        yield _plain(label)


@contextlib.contextmanager
def _bar(label: Label) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[state]}"),
    )
    pace, resumption = _Pace(), _Resumption()
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label.text, total=None, state="")

        def update(p: Progress) -> None:
            if said := resumption.see(p):
                bar.console.print(said, highlight=False)
            pace.see(p)
            state = _state(p, pace)
            shown = state.partition(" % ")[2] if p.unit == "work" else state  # the bar has the percentage
            bar.update(task, description=label.text, total=p.total, completed=p.done, state=shown)

        yield update


def _plain(label: Label) -> Callable[[Progress], None]:
    pace, resumption = _Pace(), _Resumption()
    last = 0.0
    finished = False

    def update(p: Progress) -> None:
        nonlocal last, finished
        if said := resumption.see(p):
            tell(f"{label.text}: {said}")
        pace.see(p)
        now = time.monotonic()
        complete = p.done == p.total
        wanted = min(_PLAIN_MOST, _PLAIN_SECONDS + _PLAIN_SHARE * (now - pace.started))
        if finished or (not complete and now - last < wanted):
            return
        finished = complete
        last = now
        tell(f"{label.text}: {_state(p, pace)}")

    return update


class _Resumption:
    """What an earlier run did, to be said at first, and again where a later stage goes on amid its blocks."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def see(self, p: Progress) -> str:
        """The line to print, or nothing."""
        new = p.resumed > 0 and (p.at not in self._said if p.at else not self._said)
        self._said.add(p.at)
        return f"going on{f' with {p.at}' if p.at else ''}: {_of(p.resumed, p)} done already" if new else ""


class _Pace:
    """How fast work goes lately, and so how long the rest will take."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, p: Progress) -> None:
        """Remember what is done, a few times a second, over the last fifth of the time, at least half a minute."""
        now, work = time.monotonic(), p.done - p.resumed
        if not self._seen:
            self._seen.append((self.started, 0))
        if now - self._seen[-1][0] > _SEEN_SECONDS:
            self._seen.append((now, work))
        span = max(_PACE_SECONDS, _PACE_SHARE * (now - self.started))
        while len(self._seen) > 2 and now - self._seen[1][0] > span:
            self._seen.popleft()

    def of(self, p: Progress) -> float:
        """Work a second lately, as far as it does not stray from that of the whole time: a pause is no forecast."""
        now, done = time.monotonic(), p.done - p.resumed
        then, work = self._seen[0] if self._seen else (self.started, 0)
        lately, overall = ((done - w) / max(now - t, 1e-3) for t, w in ((then, work), (self.started, 0)))
        return max(0.0, min(max(lately, overall / _PACE_STRAYS), overall * _PACE_STRAYS))


def _state(p: Progress, pace: _Pace) -> str:
    """How much is done, how fast, and what is left: `1.2 GB of 3.4 GB, 0.5 GB/s, 4 s left`."""
    rate = pace.of(p)
    parts = [_of(p.done, p)]
    if rate and p.unit != "work":  # before the first of it is done, there is none to tell
        parts.append(f"{amount(int(rate), p.unit)}/s")
    if rate and p.done < p.total:
        parts.append(f"{span((p.total - p.done) / rate)} left")
    return ", ".join(parts)


def _of(done: int, p: Progress) -> str:
    if p.unit == "work":
        return f"{100 * done / max(p.total, 1):.0f} % of all stages"
    return f"{gb(done)} of {gb(p.total)}" if p.unit == "bytes" else f"{short(done)} of {amount(p.total, p.unit)}"


def amount(number: int, unit: Unit) -> str:
    """A number of bytes or tokens as people say it."""
    return gb(number) if unit == "bytes" else f"{short(number)} tokens"


def span(seconds: float) -> str:
    """A time as people say it: 3.2 s, 45 s, 2 min 13 s, 12 min, 3 h 20 min, 4 days 2 h."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 599.5:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    return f"{hours // 24} days {hours % 24} h"
