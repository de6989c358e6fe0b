"""The journal: which steps of a plan are durably done. Append-only, one line a step, bound to one fingerprint.

A line is the step's number, and what the step found worth recording as JSON when there is anything.

Losing lines costs time, never correctness: a step is a pure function of the source and the plan, so doing it again
writes the same bytes. A last line that was torn by a crash is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shardxform.base.file_system import FileSystem
from shardxform.base.strict_json import dumps, parse_object
from shardxform.errors import ResumeError

__all__ = ["MEASURED", "Journal", "measured", "recorded"]

_DEPTH: Final = 4  # of objects and lists in a report


class Journal:
    """Owns the journal's file descriptor; use as a context manager."""

    def __init__(self, fs: FileSystem, path: Path, fingerprint: str, steps: int) -> None:
        """Open the journal at `path`, or begin one for the plan with this fingerprint.

        Raises:
            ResumeError: it belongs to another plan.

        """
        self._fs = fs
        self._path = path
        self._head = head = _head(fingerprint)
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
            self.facts = _parse(whole[len(head) :], steps, path)
        except BaseException:
            os.close(self._fd)
            raise

    @staticmethod
    def read(path: Path, fingerprint: str, steps: int) -> Mapping[int, Mapping[str, Any]]:
        """Read the facts of the steps done in another directory, whose journal is not changed.

        Raises:
            ResumeError: it belongs to another plan, or is damaged.

        """
        head = _head(fingerprint)
        content = path.read_bytes() if path.exists() else head
        if not content.startswith(head):
            raise ResumeError(f"{path}: belongs to another plan")
        return _parse(content[len(head) : content.rfind(b"\n") + 1], steps, path)

    @property
    def done(self) -> set[int]:
        """Numbers of the steps done."""
        return set(self.facts)

    def record(self, facts: Mapping[int, Mapping[str, object]]) -> None:
        """Append steps whose bytes are durable, with their facts; returns when the lines are durable too."""
        data = _lines(facts)
        self._fs.truncate(self._fd, self._end)  # an interrupted call may have left half a line
        self._fs.write_all(self._fd, memoryview(data), self._end)
        self._end += len(data)  # before the sync, which may be interrupted too: the lines are there, and true
        self.facts.update(facts)
        self._fs.sync(self._fd)

    def forget(self, steps: set[int]) -> None:
        """Drop steps whose bytes are gone, durably; to be called before their shards are made anew."""
        kept = {step: found for step, found in self.facts.items() if step not in steps}
        os.close(self._fd)
        self._fs.write_atomic(self._path, self._head + _lines(kept), self._path.parent)
        self._fd = self._fs.open(self._path, os.O_RDWR)
        self._end = os.fstat(self._fd).st_size
        self.facts = kept

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _head(fingerprint: str) -> bytes:
    return f"shardxform journal 1 {fingerprint}\n".encode()


def _checked(facts: dict[str, object]) -> dict[str, Any]:
    for key, value in facts.items():
        if type(value) is not int and not (isinstance(value, list) and all(map(_is_item, value))):
            raise ValueError(f"{key} is neither a count nor a list of names or reports")
    return facts


def _is_item(item: object) -> bool:
    """A name, or a report: an object of numbers, names, null, and lists and objects of them."""
    return isinstance(item, str) or (isinstance(item, dict) and _is_plain(item, _DEPTH))


def _is_plain(value: object, depth: int) -> bool:
    if isinstance(value, (dict, list)):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(each, depth - 1) for each in inner)
    return value is None or isinstance(value, (int, float, str))


def _lines(facts: Mapping[int, Mapping[str, object]]) -> bytes:
    lines = (f"{step} {dumps(found)}\n" if found else f"{step}\n" for step, found in sorted(facts.items()))
    return "".join(lines).encode()


def _parse(lines: bytes, steps: int, path: Path) -> dict[int, Mapping[str, Any]]:
    facts: dict[int, Mapping[str, Any]] = {}
    for line in lines.splitlines():
        number, _, rest = line.partition(b" ")
        try:
            step = int(number)
            facts[step] = _checked(parse_object(rest)) if rest else {}
        except ValueError as e:  # a JsonError is one
            raise ResumeError(f"{path}: damaged at line {line[:40]!r}: {e}") from e
        if not 0 <= step < steps:
            raise ResumeError(f"{path}: names step {step}, but the plan has {steps}")
    return facts


# -- what a clock says --------------------------------------------------------------------------------------------


MEASURED: Final = "measured"


def recorded(facts: Mapping[str, object]) -> dict[str, Any]:
    """Return what steps found, for the record."""
    return {key: value for key, value in facts.items() if key != MEASURED}


def measured(facts: Mapping[str, object]) -> tuple[Mapping[str, Any], ...]:
    """Return what was measured of steps, one entry each."""
    found = facts.get(MEASURED)
    return tuple(each for each in found if isinstance(each, dict)) if isinstance(found, list) else ()
