"""Writing a card into an output: README.md and the pictures beside it, and nothing that is somebody else's.

README.md is replaced when it is the one that was copied from the source, or a card of ours; a picture when the card
that is replaced shows it. Links are never followed to write.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from shardxform.base import interrupts
from shardxform.base.file_system import FileSystem
from shardxform.checkpoint.record import PROVENANCE, read_record
from shardxform.errors import OutputError

__all__ = ["MARK", "README", "is_card", "picture_name", "read_readme", "write_card"]

MARK: Final = "<!-- shardxform card -->"
README: Final = "README.md"
_MAX_CARD_BYTES: Final = 4 << 20
_MAX_PICTURE_BYTES: Final = 64 << 20
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,99}\.png", re.ASCII)


def is_card(text: str) -> bool:
    """Whether a README is a card of ours."""
    return MARK in text.splitlines()


def read_readme(out: Path) -> str:
    """Text of OUT's README.md; empty when there is none, or no plain file."""
    path = out / README
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
        return ""
    return path.read_bytes().decode("utf-8", "replace")


def picture_name(path: Path) -> str:
    """Name under which a picture lies beside the card.

    Raises:
        OutputError: it is no PNG, or its name would need escaping somewhere.

    """
    if not _NAME.fullmatch(path.name):
        raise OutputError(f"{path}: expected a name of letters, digits, '-', '_' and '.' that ends in .png")
    _png(path)
    return path.name


def _refuse_foreign(out: Path, plots: Sequence[Path] = ()) -> None:
    """Refuse to replace what is not ours.

    Raises:
        OutputError: names the file.

    """
    readme = out / README
    card = read_readme(out)
    if os.path.lexists(readme) and not is_card(card) and not _is_copied(out):
        raise OutputError(
            f"{readme}: neither the source's nor a card of shardxform's; move it away and run the same command again"
        )
    for plot in plots:
        path = out / plot.name
        if not os.path.lexists(path) or (path.exists() and path.samefile(plot)):
            continue
        shown = is_card(card) and f"]({plot.name})" in card and not path.is_symlink()
        if not shown:
            raise OutputError(f"{path}: stands in the way and is not of an earlier card; give the picture another name")


def write_card(out: Path, card: str, plots: Sequence[Path] = (), fs: FileSystem | None = None) -> Path:
    """Write a card and its pictures, pictures first, each file whole or not at all.

    Args:
        out: the output directory.
        card: as `render` gives it.
        plots: pictures, as `gather` was given them.
        fs: where effects go.

    Returns:
        path of README.md.

    Raises:
        OutputError: a file of somebody else stands in the way.

    """
    fs = fs or FileSystem()
    _refuse_foreign(out, plots)
    files: Mapping[str, bytes] = {**{plot.name: _png(plot) for plot in plots}, README: card.encode()}
    with interrupts.deferred(), _scratch(out, files, fs) as scratch:
        for name, data in files.items():
            if (out / name).is_symlink() or not (out / name).is_file() or (out / name).read_bytes() != data:
                fs.write_atomic(out / name, data, scratch)
    return out / README


@contextlib.contextmanager
def _scratch(out: Path, names: Iterable[str], fs: FileSystem) -> Iterator[Path]:
    """A directory in which files of these names are made ready."""
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".shardxform-card-", dir=out))
    except OSError as e:
        raise OutputError(f"{out}: cannot be written into: {e.strerror}") from e
    try:
        yield scratch
    finally:
        for name in names:
            fs.remove_if_there(scratch / f"{name}.tmp")
        fs.rmdir(scratch)


def _is_copied(out: Path) -> bool:
    """Whether README.md is, byte for byte, the one that was copied from the source."""
    readme = out / README
    record = read_record(out / PROVENANCE)
    digest = record.files.get(README) if record else None
    if readme.is_symlink() or not readme.is_file() or not isinstance(digest, str):
        return False
    return hashlib.sha256(readme.read_bytes()).hexdigest() == digest


def _png(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > _MAX_PICTURE_BYTES:
            raise OutputError(f"{path}: expected a PNG file of at most {_MAX_PICTURE_BYTES} bytes")
        data = path.read_bytes()
    except OSError as e:
        raise OutputError(f"{path}: {e.strerror}") from e
    if not data.startswith(_PNG):
        raise OutputError(f"{path}: expected a PNG picture")
    return data
