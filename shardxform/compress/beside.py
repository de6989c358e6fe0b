"""What `compress` left beside an output, for whoever describes it: its choice of experts, its figures, its pictures.

Only results that are as the record has them, and of the very output that is described, count. Changes nothing, and an
unusable directory is no error: what is missing is said in a word.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardxform.checkpoint.record import PROVENANCE, read_record
from shardxform.compress.folder import EVALUATION, KEEP, Entry, file_sha256, read_entries
from shardxform.compress.request import EVALUATE, QUANTIZE, SELECT, folder_of
from shardxform.errors import OutputError

__all__ = ["Results", "results_of"]

_FILES: Final = ((SELECT, KEEP), (EVALUATE, EVALUATION), (SELECT, "saliency.png"), (EVALUATE, "evaluation.png"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What is there.

    Attributes:
        folder: the directory of results.
        files: those that can be used.
        why_not: why nothing of it can be; empty when something can.

    """

    folder: Path
    files: tuple[Path, ...] = ()
    why_not: str = ""

    @property
    def manifest(self) -> Path | None:
        """The experts that were chosen."""
        return next((path for path in self.files if path.name == KEEP), None)

    @property
    def evaluations(self) -> tuple[Path, ...]:
        """What was measured."""
        return tuple(path for path in self.files if path.name == EVALUATION)

    @property
    def pictures(self) -> tuple[Path, ...]:
        """What was drawn."""
        return tuple(path for path in self.files if path.suffix == ".png")


def results_of(out: Path) -> Results | None:
    """Look for the directory that `compress` makes beside OUT; None where there is none.

    Raises:
        OutputError: OUT's record is damaged.

    """
    folder = folder_of(Path(os.path.abspath(out)) if out.name in ("", "..") else out)
    if not folder.is_dir():
        return None
    record = read_record(out / PROVENANCE)
    try:
        entries = read_entries(folder)
    except OutputError as e:
        return Results(folder=folder, why_not=str(e))
    made = entries.get(QUANTIZE)
    if made is None or not made.done or record is None or made.facts.get("plan") != record.fingerprint:
        return Results(folder=folder, why_not=f"not of {out} as it is")
    files = tuple(folder / name for stage, name in _FILES if _is_whole(folder / name, entries.get(stage)))
    return Results(folder=folder, files=files, why_not="" if files else "no result as it was written")


def _is_whole(path: Path, entry: Entry | None) -> bool:
    """Whether a file is as a finished stage wrote it."""
    wanted = entry.files.get(path.name) if entry is not None and entry.done else None
    return wanted is not None and wanted == file_sha256(path)
