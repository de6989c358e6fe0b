"""Pieces of Markdown, and figures in words. Text from strangers is put so that it can only be text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from shardxform.base.tensors import show_size
from shardxform.publish.card.facts import Change

__all__ = ["code", "fence", "figure", "folded", "listing", "pipe_table", "shell", "short_count", "sizes"]


def code(text: str) -> str:
    """A name as code: one line, and nothing in it that ends a code span or a cell of a table."""
    folded = " ".join(text.split())
    return "`" + re.sub(r"[`|]", "'", folded[:200]) + "`"


def fence(text: str, language: str) -> str:
    """A block of code, whatever back ticks are in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def shell(args: Sequence[str]) -> str:
    """A command line, broken before options where it is long."""
    words = [_quoted(arg) for arg in args]
    lines, line = [], words[0]
    for at, word in enumerate(words[1:], 1):
        ahead = word + (f" {words[at + 1]}" if at + 1 < len(words) and word.startswith("--") else "")
        if len(line) + 1 + len(ahead) > 100 and word.startswith("--"):
            lines.append(line + " \\")
            line = f"    {word}"
        else:
            line += f" {word}"
    return "\n".join([*lines, line])


def _quoted(word: str) -> str:
    """A word of a command line; what a terminal does not show as it is, in the escapes of bash."""
    if word.isprintable():
        return shlex.quote(word)
    letters = (f"\\{c}" if c in "\\'" else c if c.isprintable() else f"\\U{ord(c):08x}" for c in word)
    return f"$'{''.join(letters)}'"


def pipe_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of figures, the first column to the left, the others to the right; empty without lines."""
    listed = [*lines]
    if not listed:
        return ""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *listed))


def listing(pairs: Iterable[tuple[str, str]]) -> str:
    """What is told, and what of it; pairs without a value are left out."""
    return "\n".join(f"- {label}: {value}" for label, value in pairs if value)


def short_count(count: int) -> str:
    """A count of parameters as people say it: `34.66 B`, `4.41 M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"


def sizes(change: Change) -> tuple[str, str]:
    """Sizes before and after."""
    return (show_size(change.before) if change.before is not None else "", show_size(change.after))


def folded(text: str) -> str:
    """A long table under a line that opens it."""
    return f"<details>\n<summary>per block</summary>\n\n{text}\n\n</details>" if text else ""


def figure(value: float | None, error: float | None, form: str) -> str:
    """A figure and its standard error, as far as they are known."""
    if value is None:
        return ""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")
