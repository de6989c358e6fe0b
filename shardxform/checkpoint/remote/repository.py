"""What a SRC on the command line means, and what a repository of the hub holds at one commit.

Values, but for `fetch`, which brings small files to the hub client's own cache and checks them. Shards are streamed:
read by ranges and not stored, unless they lie in that cache already.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from shardxform.base.file_system import FileSystem, FolderReader, SourceReader
from shardxform.errors import CheckpointError, RemoteError

__all__ = ["SCHEME", "Remote", "RemoteFile", "RepoName", "has_content", "is_ambiguous", "open_source", "parse_source"]

SCHEME: Final = "hf://"
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*", re.ASCII)
_MAX_NAME: Final = 96  # the hub's own limit, of owner and name together
_FORM: Final = "owner/name[@revision]"
_GGUF: Final = ".gguf"
_BLOCK: Final = 1 << 20


# -- names -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RepoName:
    """A repository of the hub, at a branch, tag or commit; `as_path` when it could have been meant as a path here.

    `file` is the one file in GGUF of it that is meant, by its path in the repository; empty for all of it.
    """

    repo: str
    revision: str = "main"
    as_path: bool = field(default=False, compare=False)
    file: str = ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}{'/' * bool(self.file)}{self.file}@{self.revision}"


def parse_source(text: str) -> Path | RepoName:
    """Say what SRC means; a folder of that name wins over a repository.

    Raises:
        CheckpointError: `hf://` before what cannot be the name of a repository.

    """
    if text.startswith(SCHEME):
        name = _repo_name(text.removeprefix(SCHEME)) or _file_name(text.removeprefix(SCHEME))
        if name is None:
            raise CheckpointError(f"{text}: expected {SCHEME}{_FORM}, or {SCHEME}owner/name/FILE.gguf[@revision]")
        return name
    path, name = Path(text), _repo_name(text)
    return path if name is None or path.exists() else replace(name, as_path=True)


def _file_name(text: str) -> RepoName | None:
    """A file in GGUF of a repository."""
    path, at, revision = text.partition("@")
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    parts = file.split("/")
    repo = _repo_name(f"{owner}/{name}{at}{revision}")
    if repo is None or not file.endswith(_GGUF) or not all(part.isprintable() and part.strip(".") for part in parts):
        return None
    return replace(repo, file=file)


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


# -- what is there -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file at the commit.

    Attributes:
        name: its path in the repository.
        nbytes: its size.
        blob_id: SHA-1 that git gives its content, or the pointer to it.
        sha256: of its content, where the hub knows it: of large files.

    """

    name: str
    nbytes: int
    blob_id: str
    sha256: str

    @property
    def etag(self) -> str:
        """What the hub says in its ETag."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A repository at a commit.

    Attributes:
        repo: owner/name.
        commit: the full id.
        folder: where the hub client keeps whole files of this commit.
        files: everything in it, by name; nothing when the hub was not asked, offline.
        streamed: shards that are read by ranges; others lie whole in `folder`.
        downloads: what fetches, a `reading.Downloads`; modules point one way, so its type is not named here.

    """

    repo: str
    commit: str
    folder: Path
    files: Mapping[str, RemoteFile] = field(repr=False)
    streamed: frozenset[str]
    downloads: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}@{self.commit}"

    def named(self, file: str) -> str:
        """What people call one of its files."""
        return f"{SCHEME}{self.repo}/{self.files[file].name}@{self.commit}"

    def fetch(self, name: str) -> Path:
        """Have a small file in `folder`, whole and checked against the hub's hash; of what is not there, its place.

        Raises:
            RemoteError: the hub does not give it, or gives something else.

        """
        path = self.folder / name
        if name not in self.files:
            return path.resolve() if path.is_file() else path  # the cache of the client is one of links
        if path.is_file():
            if not has_content(path, self.files[name]):
                raise RemoteError(f"{path}: not what the hub says of {self}/{name}; remove the file and run again")
            return path.resolve()
        self.downloads.download(self, name)
        return path.resolve()

    def sha256(self, name: str) -> str:
        """SHA-256 of a file by the hub's listing; empty where that has none."""
        return self.files[name].sha256 if name in self.files else ""


def open_source(root: Path, remote: Remote | None, fs: FileSystem, *, ahead: bool = False) -> SourceReader:
    """Open the shards of a source; none is read yet.

    Args:
        root: folder of the whole files.
        remote: the repository that the others are in.
        fs: effects.
        ahead: much is going to be wanted long before it is read, and some be read more than once.

    """
    whole = FolderReader(root, fs)
    if remote is None or not remote.streamed:
        return whole
    reader: SourceReader = remote.downloads.reader(remote, whole, ahead=ahead)
    return reader


def has_content(path: Path, file: RemoteFile) -> bool:
    """Whether a file here has the content that the hub's hash says."""
    digest: Any = hashlib.sha256()
    if not file.sha256:
        digest = hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return bool(digest.hexdigest() == file.etag)
