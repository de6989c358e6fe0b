"""A directory that belongs to one kind of work, and to one process at a time."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final, TypeVar

from shardxform.base.file_system import FileSystem
from shardxform.errors import ExecutionError, OutputError

__all__ = ["LOCK", "OwnedDir", "items_of"]

LOCK: Final = "lock"
"""File that the process at work holds."""

_Dir = TypeVar("_Dir", bound="OwnedDir")


class OwnedDir:
    """Holds the lock of a directory as a context manager; a subclass says what may lie there, and reads it."""

    def __init__(self, root: Path, fs: FileSystem) -> None:
        self.root = root
        self.fs = fs
        self._stack = contextlib.ExitStack()

    def __enter__(self: _Dir) -> _Dir:
        """Make or enter the directory.

        Raises:
            OutputError: something stands there that shardxform did not make, or another process works in it.
            ResumeError: it holds work of other inputs, as far as the subclass looks.

        """
        with contextlib.ExitStack() as stack:
            try:
                self.refuse_foreign()
                self.fs.mkdir(self.root)
                stack.enter_context(self.fs.locked(self.root / LOCK))
                self.load()
            except BlockingIOError as e:
                raise OutputError(f"{self.root}: another process works here") from e
            except OSError as e:
                raise OutputError(f"{e.filename or self.root}: {e.strerror or e}") from e
            self._stack = stack.pop_all()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Let go of the directory; what the disk refused meanwhile becomes an `ExecutionError`."""
        self._stack.close()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise ExecutionError(
                f"{error.filename or self.root}: {error.strerror or error};"
                f" what was finished is safe in {self.root}: run the same command again to go on"
            ) from error

    def refuse_foreign(self) -> None:
        """Refuse what somebody else put there, before anything is written."""
        raise NotImplementedError

    def load(self) -> None:
        """Read what an earlier process left; the lock is held."""
        raise NotImplementedError


def items_of(root: Path, expected: str) -> list[os.DirEntry[str]]:
    """Return what lies in a directory; nothing where there is none.

    Raises:
        OutputError: a link or a file stands there; `expected` is what should.

    """
    if not os.path.lexists(root):
        return []
    if root.is_symlink() or not root.is_dir():
        raise OutputError(f"{root}: expected {expected} or nothing, found something else")
    return list(os.scandir(root))
