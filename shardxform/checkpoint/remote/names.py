"""What a SRC on the command line means: a folder here, or a repository of the hub and a revision of it.

Pure but for looking whether a folder is there. Asks nothing of the hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from shardxform.errors import CheckpointError

__all__ = ["SCHEME", "RepoName", "is_ambiguous", "parse_source"]

SCHEME: Final = "hf://"
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*", re.ASCII)
_MAX_NAME: Final = 96  # the hub's own limit, of owner and name together
_FORM: Final = "owner/name[@revision]"


@dataclass(frozen=True, slots=True)
class RepoName:
    """A repository of the hub, at a branch, tag or commit; `as_path` when it could have been meant as a path here."""

    repo: str
    revision: str = "main"
    as_path: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}@{self.revision}"


def parse_source(text: str) -> Path | RepoName:
    """Say what SRC means; a folder of that name wins over a repository.

    Raises:
        CheckpointError: `hf://` before what cannot be the name of a repository.

    """
    if text.startswith(SCHEME):
        name = _repo_name(text.removeprefix(SCHEME))
        if name is None:
            raise CheckpointError(f"{text}: expected {SCHEME}{_FORM}")
        return name
    path, name = Path(text), _repo_name(text)
    return path if name is None or path.exists() else replace(name, as_path=True)


def is_ambiguous(text: str) -> bool:
    """Whether a folder that is there has a name that a repository could have too."""
    return not text.startswith(SCHEME) and _repo_name(text) is not None and Path(text).exists()


def _repo_name(text: str) -> RepoName | None:
    repo, at, revision = text.partition("@")
    parts = repo.split("/")
    if len(parts) != 2 or not all(_NAME.fullmatch(part) and ".." not in part and "--" not in part for part in parts):
        return None
    if len(repo) > _MAX_NAME or (at and (not _REVISION.fullmatch(revision) or ".." in revision)):
        return None
    return RepoName(repo, revision) if at else RepoName(repo)
