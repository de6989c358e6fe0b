"""Which files of an output are published: those that its record names, documents, and the pictures of its card.

Reads names, sizes and small files. Never published: hidden files, links, work directories, what shardxform did not
write and no client reads; that is listed instead.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from shardxform.base.progress import OnProgress, Progress
from shardxform.checkpoint.record import PROVENANCE, read_record
from shardxform.checkpoint.sidecars import fault_of, is_document
from shardxform.checkpoint.table import CONFIG, GGUF_SUFFIX, INDEX
from shardxform.errors import CheckpointError, OutputError
from shardxform.execution.output import PARTIAL, WORK, last_of
from shardxform.publish.card.writing import read_readme

__all__ = ["Contents", "Digests", "PublishedFile", "contents_of", "git_blob_id", "is_repo_name", "sha256_of_all"]

Digests = Mapping[str, str]
"""SHA-256 of files, in hexadecimal, by their names."""

_PIECE: Final = 4 << 20
_EVERY: Final = 1 << 20  # bytes between two words of progress
_PICTURE: Final = re.compile(r"!\[[^\]\n]*\]\(([A-Za-z0-9][\w.-]{0,99}\.png)\)", re.ASCII)
_REPO: Final = re.compile(r"(?=.{3,96}$)[A-Za-z0-9][\w.-]*/\w(?:[\w.-]*\w)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """One file to be published; `name` is relative to the output, with slashes."""

    name: str
    path: Path
    nbytes: int

    @property
    def is_shard(self) -> bool:
        """Whether it holds tensors."""
        return self.name.endswith((".safetensors", GGUF_SUFFIX))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What of an output is published.

    Attributes:
        root: the output.
        items: the files, by name.
        left_out: visible files and directories that are not; directories with a slash at the end.

    """

    root: Path
    items: tuple[PublishedFile, ...]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(item.nbytes for item in self.items)

    @property
    def shards(self) -> tuple[PublishedFile, ...]:
        """The shards among the files."""
        return tuple(item for item in self.items if item.is_shard)


def is_repo_name(name: str) -> bool:
    """Whether a hub can have a repository of this name, owner/name."""
    return _REPO.fullmatch(name) is not None and not re.search(r"--|\.\.|\.git$", name)


def contents_of(out: Path) -> Contents:
    """List what is to be published of an output.

    Raises:
        CheckpointError: there is no such directory.
        OutputError: it is unfinished, no output of shardxform, or a file of it is missing, no plain file, or one that
            no client can read.

    """
    try:
        names = sorted(entry.name for entry in os.scandir(out))
    except OSError as e:
        raise CheckpointError(f"{out}: expected an output directory: {e.strerror}") from e
    _refuse_unfinished(out, names)
    record = read_record(out / PROVENANCE)
    if record is None or last_of(record) not in names:
        last = CONFIG if record is None else last_of(record)
        raise OutputError(f"{out}: expected an output of shardxform with its {PROVENANCE} and {last}; not uploaded")
    wanted = {*record.files, PROVENANCE, *_documents(out, names)}
    items = tuple(_item(out, name) for name in sorted(wanted))
    _refuse_faulty(items)
    folders = {name.split("/")[0] for name in wanted if "/" in name}
    return Contents(root=out, items=items, left_out=tuple(_left_out(out, names, wanted, folders)))


def sha256_of_all(items: tuple[PublishedFile, ...], on_progress: OnProgress | None) -> Digests:
    """Hash files through one buffer, with progress after every piece or megabyte."""
    total, done, digests = sum(item.nbytes for item in items), 0, {}
    told = 0
    for item in items:
        digest = hashlib.sha256()
        for piece in _pieces(item.path):
            digest.update(piece)
            done += len(piece)
            if on_progress and (done >= total or done - told >= _EVERY):
                told = done
                on_progress(Progress(min(done, total), total, 0))
        digests[item.name] = digest.hexdigest()
    return digests


def git_blob_id(path: Path) -> str:
    """Id by which git, and with it the hub, knows a file that is not large: the SHA-1 of its length and bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    for piece in _pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            yield piece


def _refuse_unfinished(out: Path, names: list[str]) -> None:
    left = next((name for name in names if name == WORK or name.endswith(PARTIAL)), None)
    if left is not None:
        raise OutputError(
            f"{out / left}: left by an unfinished run; run the command that makes {out} again, to its end"
        )


def _documents(out: Path, names: list[str]) -> Iterator[str]:
    """Names of files for people: licence, card, and the pictures that the card shows."""
    pictures = {found[1] for found in _PICTURE.finditer(read_readme(out))}
    for name in names:
        if (is_document(name) or name in pictures) and _is_plain(out / name):
            yield name


def _item(out: Path, name: object) -> PublishedFile:
    """One file of the record, which a stranger may have written."""
    pure = PurePosixPath(name) if isinstance(name, str) and "\0" not in name else None
    if pure is None or pure.is_absolute() or len(pure.parts) > 2 or any(p.startswith(".") for p in pure.parts):
        raise OutputError(f"{out / PROVENANCE}: names a file that is none of a checkpoint: {_brief(name)}")
    path = out / pure
    if not _is_plain(path) or (len(pure.parts) > 1 and path.parent.is_symlink()):
        raise OutputError(f"{path}: expected a file of the output, found {_found(path)}; not uploaded")
    return PublishedFile(name=str(pure), path=path, nbytes=path.stat().st_size)


def _refuse_faulty(items: tuple[PublishedFile, ...]) -> None:
    """Refuse small files that no client can read; shards, index and config are verified as a whole."""
    for item in items:
        if item.is_shard or item.name in (CONFIG, INDEX, PROVENANCE) or item.name.endswith(".png"):
            continue
        try:
            fault = fault_of(item.path, item.name)
        except OSError as e:
            fault = e.strerror or str(e)
        if fault:
            raise OutputError(f"{item.path}: {fault}; not uploaded")


def _left_out(out: Path, names: list[str], wanted: set[Any], folders: set[str]) -> Iterator[str]:
    for name in names:
        if name.startswith(".") or name in wanted:
            continue
        if name not in folders:
            yield name + ("/" if (out / name).is_dir() else "")
            continue
        inner = sorted(f"{name}/{entry.name}" for entry in os.scandir(out / name))
        yield from (path for path in inner if path not in wanted and not path.split("/")[1].startswith("."))


def _is_plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _found(path: Path) -> str:
    return "a link" if path.is_symlink() else "something else" if path.exists() else "none"


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
