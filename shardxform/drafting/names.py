"""Which parts of names differ between releases and the modules of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

__all__ = ["renames"]

_MOST: Final = 40

Pair = tuple[str, str]


def renames(names: Mapping[str, str]) -> list[Pair] | None:
    """Pairs that make the names of modules of those of releases, and back; the first whose part occurs counts.

    Args:
        names: of the tensors of a block in releases, and what transformers calls them.

    Returns:
        as few pairs as are found, in order; None where no pairs do it.

    """
    chosen: list[Pair] = []
    candidates = {pair for ours, theirs in names.items() if ours != theirs for pair in _pairs(ours, theirs)}
    for _ in range(_MOST):
        right = _right(names, chosen)
        if right == len(names):
            return chosen
        ranked = [(_right(names, [pair, *chosen]), -len(pair[0]), pair) for pair in sorted(candidates)]
        best, _length, pair = max(ranked, default=(0, 0, ("", "")))
        if best <= right:
            return None
        chosen = [pair, *chosen]
    return None


def _right(names: Mapping[str, str], pairs: Sequence[Pair]) -> int:
    back = [(theirs, ours) for ours, theirs in pairs]
    return sum(_renamed(ours, pairs) == theirs and _renamed(theirs, back) == ours for ours, theirs in names.items())


def _renamed(name: str, pairs: Iterable[Pair]) -> str:
    """As `forward.skeleton` reads them."""
    return next((name.replace(old, new, 1) for old, new in pairs if old in name), name)


def _pairs(ours: str, theirs: str) -> Iterator[Pair]:
    """Both names less what they share at the end, and less more and more of what they share at the beginning."""
    a, b = ours.split("."), theirs.split(".")
    shared = 0
    while shared < min(len(a), len(b)) - 1 and a[-1 - shared] == b[-1 - shared]:
        shared += 1
    for tail in range(shared + 1):
        ends = ".".join(a[: len(a) - tail]), ".".join(b[: len(b) - tail])
        dot = "." if tail else ""
        one, other = ends[0].split("."), ends[1].split(".")
        while one and other:
            yield ".".join(one) + dot, ".".join(other) + dot
            if one[0] != other[0]:
                break
            one, other = one[1:], other[1:]
