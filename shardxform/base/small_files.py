"""Writing a small result file: all of it, durably, or nothing; and never over another file.

A file that is there already is fine when it holds the very same bytes, so that a command can be run again. Nothing is
overwritten, whoever wrote it, unless the caller knows that it is its own.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shardxform.base import interrupts
from shardxform.base.file_system import FileSystem, why_not
from shardxform.errors import OutputError

__all__ = ["refuse_other", "write_new", "write_over"]

_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EMLINK}


def refuse_other(path: Path, data: bytes, kind: str = "file") -> bool:
    """Whether `path` holds exactly `data` already; False when nothing is there.

    Raises:
        OutputError: something else is there, or it cannot be looked at; `kind` says what it was taken for.

    """
    try:
        if not os.path.lexists(path):
            return False
        same = path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    except (OSError, ValueError) as e:
        raise OutputError(f"{path}: {getattr(e, 'strerror', None) or e}") from e
    if same:
        return True
    what = f"another {kind} is there" if path.is_file() else "something that is no file is there"
    raise OutputError(f"{path}: {what}, and nothing is overwritten; name a file that does not exist yet")


def write_new(path: Path, data: bytes, kind: str = "file") -> None:
    """Make `path` hold `data`, durably and in one step; nothing happens when it does already.

    Raises:
        OutputError: another file is there, or it cannot be written.

    """
    if not refuse_other(path, data, kind) and not _put(path, data, _publish):  # between the look and the link
        refuse_other(path, data, kind)


def write_over(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, durably and in one step, in place of what the caller found to be its own.

    Raises:
        OutputError: it cannot be written.

    """

    def replace(fs: FileSystem, temporary: Path, path: Path) -> bool:
        fs.rename(temporary, path)
        return True

    _put(path, data, replace)


def _put(path: Path, data: bytes, publish: Callable[[FileSystem, Path, Path], bool]) -> bool:
    """Write a file of another name and give it its own; what `publish` says of that."""
    fs = FileSystem()
    temporary = path.parent / f".shardxform-{secrets.token_hex(8)}.tmp"
    try:
        with interrupts.deferred():
            try:
                fs.write_synced(temporary, data, os.O_EXCL)
                published = publish(fs, temporary, path)
            finally:
                fs.remove_if_there(temporary)
            fs.sync_dir(path.parent)
    except OSError as e:
        raise OutputError(f"{path}: {why_not(path, e)}") from e
    return published


def _publish(fs: FileSystem, temporary: Path, path: Path) -> bool:
    """Give the file its name; False when the name is taken. A link, because a rename would replace what is there."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):  # a file system without links: look once more, and take the small risk
            return False
        fs.rename(temporary, path)
    return True
