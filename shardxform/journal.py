"""The journal: which steps of a plan are durably done. Append-only, one line a step, bound to one fingerprint.

Losing lines costs time, never correctness: a step is a pure function of the source and the plan, so doing it again
writes the same bytes. A last line that was torn by a crash is dropped.
"""

from __future__ import annotations

import os
from pathlib import Path

from shardxform.errors import ResumeError
from shardxform.fsio import FileSystem

__all__ = ["Journal"]


class Journal:
    """Owns the journal's file descriptor; use as a context manager."""

    def __init__(self, fs: FileSystem, path: Path, fingerprint: str, steps: int) -> None:
        """Open the journal at `path`, or begin one for the plan with this fingerprint.

        Raises:
            ResumeError: it belongs to another plan.

        """
        self._fs = fs
        head = f"shardxform journal 1 {fingerprint}\n".encode()
        if not path.exists():
            fs.write_atomic(path, head, path.parent)
        self._fd = fs.open(path, os.O_RDWR)
        try:
            content = path.read_bytes()
            if not content.startswith(head):
                raise ResumeError(f"{path}: belongs to another plan")
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) != len(content):
                fs.truncate(self._fd, len(whole))
            self._end = len(whole)
            self.done = _parse(whole[len(head) :], steps, path)
        except BaseException:
            os.close(self._fd)
            raise

    def record(self, steps: list[int]) -> None:
        """Append steps whose bytes are durable; returns when the lines are durable too."""
        lines = "".join(f"{step}\n" for step in steps).encode()
        self._fs.write_all(self._fd, memoryview(lines), self._end)
        self._fs.sync(self._fd)
        self._end += len(lines)
        self.done.update(steps)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(lines: bytes, steps: int, path: Path) -> set[int]:
    try:
        done = {int(line) for line in lines.split()}
    except ValueError as e:
        raise ResumeError(f"{path}: damaged: {e}") from e
    if done and not (min(done) >= 0 and max(done) < steps):
        raise ResumeError(f"{path}: names step {max(done)}, but the plan has {steps}")
    return done
