"""What a repository of the hub holds at one commit: names, sizes and hashes, and where its whole files lie.

A value, but for `fetch`, which brings small files to the hub client's own cache and checks them. Shards are streamed:
read by ranges and not stored, unless they lie in that cache already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardxform.checkpoint.remote.names import SCHEME
from shardxform.errors import RemoteError

__all__ = ["Remote", "RemoteFile", "holds"]

_BLOCK = 1 << 20


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
        downloads: what fetches, a `downloads.Downloads`; modules point one way, so its type is not named here.

    """

    repo: str
    commit: str
    folder: Path
    files: Mapping[str, RemoteFile] = field(repr=False)
    streamed: frozenset[str]
    downloads: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}@{self.commit}"

    def fetch(self, name: str) -> Path:
        """Have a small file in `folder`, whole and checked against the hub's hash; of what is not there, its place.

        Raises:
            RemoteError: the hub does not give it, or gives something else.

        """
        path = self.folder / name
        if name not in self.files:
            return path.resolve() if path.is_file() else path  # the cache of the client is one of links
        if path.is_file():
            if not holds(path, self.files[name]):
                raise RemoteError(f"{path}: not what the hub says of {self}/{name}; remove the file and run again")
            return path.resolve()
        self.downloads.download(self, name)
        return path.resolve()

    def sha256(self, name: str) -> str:
        """SHA-256 of a file by the hub's listing; empty where that has none."""
        return self.files[name].sha256 if name in self.files else ""


def holds(path: Path, file: RemoteFile) -> bool:
    """Whether a file here has the content that the hub's hash says."""
    digest: Any = hashlib.sha256()
    if not file.sha256:
        digest = hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return bool(digest.hexdigest() == file.etag)
