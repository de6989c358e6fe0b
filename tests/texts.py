"""The first of the small checkpoint's texts: a command tokenizes all that it is given, however little it takes."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

TEXTS = Path(__file__).resolve().parents[1] / "examples" / "small-moe" / "text"
COUNT = 3  # some 5,000 tokens


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="shardxform-texts-")  # gone with the process


def few(name: str, count: int = COUNT) -> Path:
    """A file with the first `count` lines of `name`, and that name."""
    path = Path(_folder().name, str(count), name)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join((TEXTS / name).read_bytes().splitlines(keepends=True)[:count]))
    return path
